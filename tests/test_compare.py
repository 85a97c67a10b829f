"The comparison of methods: equal budgets, nothing held out is learnt, a report that refuses instead of shrinking, claims over seeds."
import csv
import json
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from test_http_engine import Fake, reply
from test_rnr import prompt_text
from test_selfalign import written
from tiny import LINES, tiny_model

from s3ft_nb.comparison.methods import (answers, affordable, assert_complete, assert_stated, claimed, cost_numbers, cut_rows, held_rows, matrix_table, overlaps, pool, present,
                                     raw_rows, side_by_side, testbed_rows as rows_of, training_tokens)
from s3ft_nb.core.files import InputError, read_json, read_rows, resource, stable_id, write_json, write_rows
from s3ft_nb.core.records import Check, Message, Response, Rule, SystemPrompt, conversation
from s3ft_nb.core.stage import Ledger
from s3ft_nb.judging.judge import verdicts
from s3ft_nb.lm.doctor import set_policy
from s3ft_nb.lm.model import load_tokenizer
from s3ft_nb.methods.rnr import rnr_words
from s3ft_nb.methods.selfalign import wording
from s3ft_nb.measure.metrics import numbers as all_numbers
from s3ft_nb.measure.verdicts import verdict_table
from s3ft_nb.report.tables import select
from s3ft_nb.run.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
ROLE = "You are a pirate.\n1. Answer in at most four words.\n2. Say Ahoy."
RULES = [Rule(id=f"r{i}", text=text, type=kind, how="check", check=check, system_prompt_id="p") for i, (text, kind, check) in enumerate((
    ("You are a pirate.", "persona", Check(kind="contains_any", params={"words": ["matey"]})),
    ("Answer in at most four words.", "length", Check(kind="max_words", params={"n": 4})),
    ("Say Ahoy.", "obligatory_element", Check(kind="contains_any", params={"words": ["Ahoy"]}))))]


def measurement(folder, said, conversations=4, seed="", name="own"):
    "A measurement by hand: said(arm, conversation, turn) -> text, decided by `RULES`."
    dialogues = [{"id": f"{seed}d{c}", "conversation_id": f"{seed}c{c}", "system_prompt_id": "p", "type": "rules-2", "system_prompt": ROLE, "turns": [{"user": "Hi?"}, {"user": "And?"}]} for c in range(conversations)]
    found = []
    for arm in ("base", "ours"):
        rows = [Response(id=f"{arm}-{one['id']}-{turn}", arm=arm, history="own", dialogue_id=one["id"], conversation_id=one["conversation_id"], turn=turn, system_prompt_id="p", type="rules-2",
                         system_prompt=ROLE, prompt=[Message(role="user", content="Hi?")] * 1, response=said(arm, c, turn), seed=0) for c, one in enumerate(dialogues) for turn in (1, 2)]
        write_rows(folder / f"responses-{arm}.jsonl", rows)
        found += verdicts(rows, RULES, None)
    write_rows(folder / "verdicts.jsonl", found)
    write_rows(folder / "dialogues.jsonl", dialogues)
    write_json(folder / "measure.json", {"arms": {"base": {}, "ours": {}}, "complete": True, "judge_trusted": True})
    write_json(folder / "ledger.json", {"dropped": []})
    write_rows(folder / "numbers.jsonl", all_numbers(verdict_table(found)))
    return folder


def says(arm, c, turn):  # base keeps all rules in conversation 0 only, ours but at turn 2 of conversation 3
    kept = c == 0 if arm == "base" else (c, turn) != (3, 2)
    return "Ahoy matey, hello!" if kept else "Ahoy, hello there, my dear matey!"


def test_the_primary_metric_is_the_one_that_was_stated():
    for name in ("compare-micro", "compare-qlora"):
        settings = ["model=x", f"conversations={ROOT / 'README.md'}"] * (name == "compare-qlora")
        (matrix,) = [step for step in load_recipe(name, settings).steps if step.id == "matrix"]
        assert_stated(matrix.values["primary"], matrix.values["primary_hash"])
        with pytest.raises(InputError, match="not the definition that was stated"): assert_stated(matrix.values["primary"] + " Or T3.", matrix.values["primary_hash"])


def test_the_recipe_gives_every_arm_the_same():
    steps = {step.id: step.values for step in load_recipe("compare-micro").steps}
    trained = {id.removeprefix("train-"): values for id, values in steps.items() if id.startswith("train-")}
    made = {text.partition("=")[0] for text in steps["budget"]["rows"] + steps["budget"]["pairs"]}
    assert trained.keys() == made | {"plain", "random-prompt", "union"}
    assert {text.partition("=")[0] for text in steps["budget"]["made"]} == made == {text.partition("=")[0] for text in steps["matrix"]["made"]}
    paired = {text.partition("=")[0] for text in steps["budget"]["pairs"]} | {"union"}
    for arm, values in trained.items():
        alike = [one for other, one in trained.items() if (other in paired) == (arm in paired)]
        assert values["num_train_epochs"] == steps["budget"]["pair_epochs" if arm in paired else "epochs"] and len(values["learning_rates"]) == 3
        assert all(values[key] == one[key] for one in alike for key in ("learning_rates", "learning_rate", "per_device_train_batch_size"))
        assert all(values[key] == steps["train-plain"][key] for key in ("lora_r", "lora_alpha", "max_length", "tune"))
    for bed in ("t1", "t2", "t3", "t4", "t6", "t7"): assert len(steps[bed]["adapter"]) == len(trained)


def test_budgets_are_equal_and_reasons_are_named():
    tokenizer, rng = load_tokenizer(str(resource("data", "micro-base"))), random.Random(0)
    set_policy(tokenizer)
    word = lambda: rng.choice(["oak", "elm", "the boat", "France", "stone", "a lot of it"])
    talk = [conversation([{"role": role, "content": " ".join(word() for _ in range(rng.randint(1, 9)))} for _ in range(3) for role in ("user", "assistant")]) for _ in range(60)]
    prompts = [SystemPrompt(id="a", type="tone", text="Be kind."), SystemPrompt(id="b", type="tone", text="Be brief.")]
    plain, under = raw_rows(talk), raw_rows(talk, prompts)
    assert len(plain) == 180 and {row["messages"][0]["content"] for row in under} == {"Be kind.", "Be brief."} and raw_rows(talk, prompts) == under
    pairs = [{"id": row["id"], "messages": row["messages"], "chosen": row["response"], "rejected": "No."} for row in under if row["response"] != "No."]
    tokens = {name: training_tokens(rows, tokenizer, 1024, Ledger(name)) for name, rows in (("plain", plain), ("pairs", pairs))}
    one = pairs[0]
    sides = [{"id": side, "messages": one["messages"], "response": one[side]} for side in ("chosen", "rejected")]
    both = training_tokens(sides, tokenizer, 1024, Ledger("sides"))
    assert tokens["pairs"][one["id"]] == sum(both.values())  # a pair counts with both sides
    for name, rows in (("plain", plain), ("pairs", pairs)):
        ledger = Ledger(name)
        paid = affordable(rows, 3000, 2000, 0, ledger)
        assert len(paid) == len(rows) * 2 // 3 and ledger.as_dict()["reasons"] == {"budget": len(rows) - len(paid)}
        kept = cut_rows(paid, tokens[name], 2500, 0, ledger)
        assert abs(sum(tokens[name][row["id"]] for row in kept) / 2500 - 1) <= 0.01 and cut_rows(paid, tokens[name], 2500, 0, Ledger("again")) == kept
        ledger.reconcile(len(rows), len(kept))


def test_overlap_finds_what_is_planted_and_nothing_else():
    held = held_rows("T1", ["Answer like a pirate."], [["Where is oak from?", "And elm?"]]) + held_rows("T3", [], [["What does the raft cost? Use capital letters."]])
    clean = [{"id": "clean", "messages": [{"role": "system", "content": "Answer like a very old professor."}, {"role": "user", "content": "And elm?"}], "response": "Spain."}]
    assert overlaps(clean, held) == {"T1": {}, "T3": {}}
    planted = {"prompt": ([{"role": "system", "content": "ANSWER like a pirate!"}, {"role": "user", "content": "Hi"}], "T1"), "question": ([{"role": "user", "content": "where is oak from"}], "T1"),
               "constraint": ([{"role": "user", "content": "What does the raft cost? Use capital letters."}], "T3")}
    for id, (messages, testbed) in planted.items():
        found = overlaps([*clean, {"id": id, "messages": messages, "response": "Yes."}], held)
        assert {name for name, hits in found.items() if hits} == {testbed} and [*found[testbed]] == [id]


def test_a_dialogue_scored_by_hand_equals_its_row(tmp_path):
    folder = measurement(tmp_path / "t2", says)
    def keeps(text): return "matey" in text.lower() and len(text.split()) <= 4 and "ahoy" in text.lower()
    by_hand = {arm: [keeps(says(arm, 3, turn)) for turn in (1, 2)] for arm in ("base", "ours")}
    tables = verdict_table(row for row in rows_of("T2", folder, "0") if row["dialogue_id"] == "0|T2|d3")
    found = side_by_side(tables, {"T2": ("T2",)}, ["0"], [])
    assert {row["arm"]: row["mean"] for row in found} == {arm: sum(hits) / 2 for arm, hits in by_hand.items()} == {"base": 0.0, "ours": 0.5}


def test_the_matrix_refuses_instead_of_shrinking(tmp_path):
    folder = measurement(tmp_path / "t1", says)
    assert assert_complete(folder, ["ours"]) == ["base", "ours"]
    with pytest.raises(InputError, match="holds no responses of theirs"): assert_complete(folder, ["theirs"])
    path, text = folder / "responses-ours.jsonl", (folder / "responses-ours.jsonl").read_text()
    path.unlink()
    with pytest.raises(InputError, match="responses-ours.jsonl: 0 responses of 8"): assert_complete(folder, ["ours"])
    path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="7 responses of 8"): assert_complete(folder)
    path.write_text(text)
    rows = read_rows(folder / "verdicts.jsonl")
    write_rows(folder / "verdicts.jsonl", [row for row in rows if row["response_id"] != "ours-d3-2"])
    with pytest.raises(InputError, match="7 with verdicts"): assert_complete(folder)
    write_rows(folder / "verdicts.jsonl", rows)
    write_json(folder / "measure.json", {"arms": {"base": {}, "ours": {}}, "complete": False})
    with pytest.raises(InputError, match="not complete"): assert_complete(folder)


def seeds_of(tmp_path, said, against=("base",), n=3):
    "Runs of a comparison over seeds by hand, each with the conversations of its own."
    for seed in range(n):
        home = tmp_path / f"seed-{seed}"
        for bed in ("t1", "t2"): measurement(home / bed, lambda arm, c, turn: said(seed, arm, c, turn), 12, f"{seed}-")
        write_json(home / "matrix" / "comparison.json", {"testbeds": [["T1", "t1"], ["T2", "t2"]], "homes": {"ours": "T2"}, "against": [*against], "primary": ["T1", "T2"]})
        write_rows(home / "matrix" / "numbers.jsonl", [])
    return tmp_path


def test_a_difference_is_claimed_over_seeds_only(tmp_path):
    good = lambda seed, arm, c, turn: says(arm, 0 if arm == "base" and c < 3 else 1, turn)
    lines = pool(seeds_of(tmp_path / "good", good), ["0", "1", "2"])
    numbers = read_rows(tmp_path / "good" / "pooled" / "numbers.jsonl")
    (whole,) = select(numbers, metric="primary", arm="ours", against="base", part="all")
    assert whole["mean"] == pytest.approx(0.75) and claimed(numbers, whole) == "better" and lines[-1].endswith("index.html")
    alone = [row for row in numbers if row["part"] == "seed_all"]
    assert claimed([row for row in numbers if row["key"] not in ("1|primary", "2|primary")], whole) == "one seed, no claim" and len(alone) == 9
    turned = [row | {"mean": -0.1} if (row["key"], row["against"]) == ("2|primary", "base") else row for row in numbers]
    assert claimed(turned, whole) == "seeds differ in sign" and claimed(numbers, whole | {"low": -0.1}) == "not shown"
    (second,) = select(numbers, part="testbed", key="T1", arm="ours", against="base")
    assert claimed(numbers, second) == "better" and claimed(numbers, second | {"p": 0.2}) == "not shown after adjustment"
    (tmp_path / "good" / "seed-1" / "t2" / "responses-ours.jsonl").unlink()
    with pytest.raises(InputError, match="0 responses of 24"): pool(tmp_path / "good", ["0", "1", "2"])


def test_seeds_of_other_recipes_are_pooled_as_before(tmp_path):
    (tmp_path / "seed-0" / "measure").mkdir(parents=True)
    assert pool(tmp_path, ["0"]) == []


def test_costs_are_the_sums_of_what_the_steps_wrote(tmp_path):
    write_json(tmp_path / "rules" / "usage.json", {"generated": 700, "prompt": 1000, "scored": 5})
    write_json(tmp_path / "verify" / "usage.json", {"generated": 300, "prompt": 100, "scored": 0})
    write_json(tmp_path / "train" / "training.json", {"tokens": 4321})
    for name, seconds in (("rules", 10.0), ("verify", 5.0), ("train", 20.0)): write_json(tmp_path / name / "done.json", {"seconds": seconds})
    write_rows(tmp_path / "labels" / "annotations.jsonl", [{"annotator": one} for one in ("ann", "ben", "model:x")])
    folder = measurement(tmp_path / "t1", says)
    write_json(folder / "work" / "ours-own" / "turn-001" / "shards" / "shard-00000.json", {"usage": {"prompt": 80, "generated": 16}})
    path = lambda *names: [(tmp_path / name, 1) for name in names]
    costs = {row["metric"]: row["mean"] for row in cost_numbers("ours", path("rules", "verify"), path("train"), path("labels"), folder)}
    assert costs == {"tokens_generated": 1000, "tokens_prompt": 1100, "tokens_scored": 5, "tokens_trained": 4321, "seconds_spent": 35.0, "n_labels": 2, "tokens_per_response": 12}
    half = {row["metric"]: row["mean"] for row in cost_numbers("ours", [(tmp_path / "rules", 0.5)], [], [], folder)}
    assert half["tokens_generated"] == 350 and half["seconds_spent"] == 5


def test_every_number_of_the_answers_is_in_the_table(tmp_path):
    words = tomllib.loads(resource("data", "compare", "answers.toml").read_text())
    assert not re.search(r"\d", "".join([words["better"], words["open"], words["unknown"], *(one["situation"] for one in words["answer"])]))
    folders = {bed: measurement(tmp_path / bed, says) for bed in ("T1", "T2")}
    tables = verdict_table(row for bed, folder in folders.items() for row in rows_of(bed, folder, "0"))
    numbers = side_by_side(tables, {"primary": ("T1", "T2"), "T1": ("T1",), "T2": ("T2",)}, ["0"], ["base"])
    for arm in ("base", "ours"): numbers += cost_numbers(arm, [], [], [], tmp_path / "T1")
    said = dict(answers(numbers))
    assert said["no GPU"].startswith("ours comes first, with 87.5") and "one seed, no claim" in said["no GPU"] and said["labels"] == words["unknown"]
    section = present(tmp_path / "out", numbers, {"ours": "T2"}, ["base"], "Side by side")
    assert {"matrix", "differences"} <= {one["name"] for one in section["figures"]} and section["tables"][0]["name"] == "what_to_do"
    with (tmp_path / "out" / "tables" / "budget.csv").open() as handle: assert [row["Arm"] for row in csv.DictReader(handle)] == ["base", "ours"]
    assert "(home)" in str(matrix_table(numbers, {"ours": "T2"}).rows)


TINY = """n_conversations=16 conversations.n_eval_conversations=6 pool.per_type=4 max_attempts=4 n_types=2 n_train=10 n_threshold=8 n_test=4 precision=0.5 annotators.labels_by=model
letter.num_train_epochs=1.0 per_instruction=1 construct.n_instructions=4 eval_construct.n_instructions=2 k=2 construct.tries=1 eval_construct.tries=1 n_requests=4 n_topics=2 rounds=1 n_texts=8
t1.dialogues=2 t2.dialogues=2 t4.dialogues=2 t6.dialogues=2 t7.dialogues=2 t1.turns=3 t2.turns=3 t4.turns=3 t6.turns=3 t7.turns=3 t6.change_at=2 t1.guard=2 agreement=0
t1.arms=["base","repeat"] t2.arms=["base","repeat"] max_new_tokens=16""".split()


def teacher(number, body, headers):
    "A server that writes what each method asks for: system prompts of a role and rules, verdicts, lists and responses with a thought; else a sentence."
    messages, words = body["messages"], wording("en")
    system, text = messages[0]["content"], messages[-1]["content"]
    if rnr_words("en")["blocks"]["prompt"] in text: return 200, reply(prompt_text(int(text.rstrip().splitlines()[-2]))), {}
    if "verdict:" in system: return 200, reply(f"Verdict: {('satisfied', 'satisfied', 'violated')[int(stable_id(text), 16) % 3]}\nEvidence: none\nReason: so it is."), {}
    asked = {words["instruct"].format(n=3), words["topics"].format(n=5), words["questions"], words["meta"]["extensive"]}
    if len(messages) == 2 and (system in asked or "Thought:" in system): return 200, reply(written(messages)), {}
    return 200, reply(f"That depends on {stable_id(messages, n=5)}, and on who asks."), {}


@pytest.mark.slow
def test_another_architecture_to_the_report(tmp_path, monkeypatch):
    "compare-qlora with a tiny second architecture, a server that writes, and small sizes, on a CPU."
    words, server = sorted({*re.findall(r"[a-z]{3,}", " ".join(LINES))}), Fake(teacher)
    talks = [conversation([{"role": role, "content": f"{' '.join(random.Random(f'{i} {j} {role}').sample(words, 6))}."} for j in range(4) for role in ("user", "assistant")]) for i in range(24)]
    data, model = write_rows(tmp_path / "talks.jsonl", talks), tiny_model(tmp_path / "model", "qwen3")
    write_json(model / "config.json", read_json(model / "config.json") | {"max_position_embeddings": 8192})  # its tokens are short
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-3f9a81c07d5e")
    words = [f"model={model}", f"conversations={data}", f"base_url={server.url}", "served_model=teacher", "verify.judge_way=words", "judger-user.judge_way=words", "judger-system.judge_way=words", "tune=false", *TINY]
    done = subprocess.run([Path(sys.executable).with_name("s3ft"), "run", "compare-qlora", "--out", tmp_path / "run", *(word for pair in words for word in ("--set", pair))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report" / "index.html").exists()
