"RNR with stub engines: what is planted is found, what is rejected has its reason, and nothing is kept that breaks a rule."
import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http_engine import Fake, reply
from tiny import tiny_model
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import InputError, read_rows, write_bytes, write_rows
from s3ft_nb.core.records import Check, Conversation, Rule, Sample
from s3ft_nb.core.split import near_duplicate
from s3ft_nb.core.stage import Stage
from s3ft_nb.methods.conflicts import contradiction
from s3ft_nb.judging.judge import Judgement, verdict_of
from s3ft_nb.judging.rules import rule_from, rules_finder
from s3ft_nb.methods import rnr
from s3ft_nb.methods.rnr import (RolePrompt, draw_requests, explaining_judge, instructions_of, judge_rules, mix, parse_prompt, parse_range, plain_rows, preference_rows,
                                 read_examples, rule_samples, stepwise, verify, why_rejected, write_prompts)
from s3ft_nb.methods.s3ft.restyle import restyle

SHARED = Path(os.environ.get("S3FT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
THINGS = ("apples", "bridges", "candles", "dolphins", "engines", "forests", "glaciers", "hammers", "islands", "jackets", "kettles", "lanterns")
RULES = ("Be brief.", "Sound cheerful.", "Mention a lantern.", "Speak as if to a child.", "Compare something to the sea.", "Name no city.")


def talk(id, *texts, split=None):
    return Conversation(id=id, split=split, messages=[{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)])


TALKS = [talk(f"c{i}", f"Where do {thing} come from, and since when?", f"Old {thing} come from afar.", f"And what do {thing} cost?", "Little.") for i, thing in enumerate(THINGS)]


def engine(say, **more):
    "An engine that says `say(request)`."
    row = lambda one: {"id": one["id"], "tokens": 5, "finish": "stop"} | (said if isinstance(said := say(one), dict) else {"text": said})
    return SimpleNamespace(name="stub", generate=lambda requests, seed, progress=None: [row(one) for one in requests], **more)


def asked_k(request): return int(request["messages"][1]["content"].rstrip().splitlines()[-2])


def prompt_text(k, rules=RULES): return "\n".join(["You are a tailor.", *(f"{i}. {rule}" for i, rule in enumerate(rules[:k], 1))])


def made(tmp_path, per_instruction=1, k_range=(1, 6)):
    "Instructions, system prompts and the requests for them."
    instructions = instructions_of(TALKS, Stage(tmp_path / "instructions"))
    requests = draw_requests(instructions, read_examples()[0], 0, k_range, per_instruction=per_instruction)
    return instructions, write_prompts(requests, engine(lambda one: prompt_text(asked_k(one))), Stage(tmp_path / "rules")), requests


def shows(text):
    "A judge that looks for a text of each rule."
    def judge(responses, rules):
        find = rules_finder(rules)
        return [verdict_of(row, rule, Judgement(text(rule) in row.response), "stub") for row in responses for rule in find(row)]
    return judge


# Instructions

def test_instructions_share_no_family_across_halves_and_keep_their_turns(tmp_path):
    rows = [*TALKS, talk("twin", *(message.content for message in TALKS[0].messages)), talk("zh", "水为什么会结冰？", "因为冷。"), talk("alone", "Is anyone there?"),
            talk("long", "Why? " * 20_000, "Because.")]
    stage = Stage(tmp_path, "instructions")
    found = instructions_of(rows, stage, "all")
    stage.close(len(rows), len(found))
    assert stage.ledger.as_dict()["reasons"] == {"first_left_out": 1, "no_response": 1, "repeated": 1, "too_long": 1, "wrong_language": 1}
    train, held = ([row.text for row in found if row.split == split and not row.history] for split in ("train", "eval"))
    assert train and held and not any(near_duplicate(text, held) for text in train)
    assert {len(row.history) for row in found} == {0, 2}
    assert len({(row.conversation_id, row.split) for row in found}) == len({row.conversation_id for row in found})


def test_what_a_conversation_says_of_its_split_holds_and_a_leak_leaves(tmp_path):
    near = "Where do apples come from, and since when??"
    rows = [talk("a", "Where do apples come from, and since when?", "Afar.", split="eval"), talk("b", near + "!x", "Afar.", split="train"), talk("c", "Who loves chess?", "Monks.", split="train")]
    stage = Stage(tmp_path, "instructions")
    found = instructions_of(rows, stage)
    assert {row.conversation_id: row.split for row in found} == {"a": "eval", "c": "train"}
    assert stage.ledger.as_dict()["reasons"] == {"leak": 1}


def test_chinese_rows_under_english_are_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="none of 2 conversations can be used: 2 wrong_language") as error:
        instructions_of([talk("a", "水为什么会结冰？", "因为冷。"), talk("b", "谁喜欢下棋？", "僧人。")], Stage(tmp_path))
    assert "\n" not in str(error.value) and (tmp_path / "ledger.json").exists()
    assert len(instructions_of([talk("a", "水为什么会结冰？", "因为冷。")], Stage(tmp_path / "zh"), language="zh")) == 1


def test_instructions_that_are_all_like_those_to_evaluate_with_are_one_clear_error(tmp_path):
    rows = [talk(f"{i}", f"What about boat {i}, please?", "It is boat.") for i in range(12)]
    rows = [row.model_copy(update={"split": "eval" if i < 3 else "train"}) for i, row in enumerate(rows)]
    with pytest.raises(InputError, match="no user message is left to train on: {'leak': 9}.*begin differently"): instructions_of(rows, Stage(tmp_path))


# Requests

@pytest.mark.parametrize("text", ["1-x", "0", "0-3", "5-2", "", "-1", "1-6-7"])
def test_a_wrong_range_is_refused(text):
    with pytest.raises(InputError, match="k_range"): parse_range(text)


def test_k_is_uniform_seeded_and_free_of_order(tmp_path):
    instructions = instructions_of(TALKS, Stage(tmp_path))
    draw = lambda rows, seed=0: {one["id"]: one["k"] for one in draw_requests(rows, read_examples()[0], seed, parse_range("1-6"), per_instruction=100)}
    ks = Counter(draw(instructions).values())
    assert set(ks) == {1, 2, 3, 4, 5, 6} and all(130 < n < 270 for n in ks.values())
    assert draw(instructions) == draw(instructions[::-1]) != draw(instructions, 1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_bundled_examples(language):
    good, bad = read_examples("", language)
    assert sorted(row["prompt"].count("\n") for row in good) == [1, 2, 3, 4, 5, 6] and len(bad) >= 4
    for row in good + bad: assert (why_rejected(row["prompt"], row["prompt"].count("\n"), row["instruction"], language) or [None])[0] == row.get("reason")
    texts = [row["prompt"] for row in good]
    assert not any(near_duplicate(text, texts[:i]) for i, text in enumerate(texts))
    request = rnr.write_messages("Why?", 3, good, language, guideline=True, counters=bad)
    assert all(row["why"] in request[0]["content"] for row in bad) and rnr.rnr_words(language)["guideline"].strip() in request[0]["content"]
    assert len(rnr.write_messages("Why?", 3, good, language)[0]["content"]) < len(request[0]["content"]) / 2


# Rejection

C = lambda kind, **params: Check(kind=kind, params=params)
PLANTED = [  # twenty contradictions, by kinds and by parameters
    (C("max_words", n=10), C("min_words", n=11)), (C("max_words", n=10), C("word_range", num_least=20, num_most=30)),
    (C("max_sentences", n=2), C("n_sentences", n=3)), (C("sentence_range", num_least=4, num_most=6), C("max_sentences", n=3)),
    (C("n_bullets", n=3), C("n_bullets", n=4)), (C("n_lines", n=2), C("n_bullets", n=5)), (C("emojis", num_most=0), C("emojis", num_least=2)),
    (C("max_words", n=3), C("n_sentences", n=5)), (C("max_words", n=2), C("contains_all", words=["sea", "moon", "tide"])),
    (C("lowercase"), C("uppercase")), (C("starts_with", words=["Well"]), C("starts_with", words=["Now", "So"])),
    (C("ends_with", words=["farewell"]), C("ends_with", words=["good night"])), (C("wrapped", left="(", right=")"), C("wrapped", left="[", right="]")),
    (C("starts_with_character", character="a"), C("starts_with", words=["Well"])), (C("wrapped", left="{", right="}"), C("ends_with_character", character="!")),
    (C("contains_any", words=["sea"]), C("contains_none", words=["sea", "moon"])), (C("contains_all", words=["lantern", "map"]), C("no_character", character="p")),
    (C("contains_character", character="!"), C("no_character", character="!")),
    (C("length_constraints:number_words", num_words=50, relation="at least"), C("length_constraints:number_words", num_words=20, relation="less than")),
    (C("only_code_block"), C("code_blocks", num_least=2))]
FINE = [(C("max_words", n=10), C("min_words", n=10)), (C("starts_with", words=["Well", "Now"]), C("starts_with", words=["Now then"])), (C("wrapped", left="(", right=")"), C("starts_with", words=["Well"])),
        (C("lowercase"), C("max_words", n=3)), (C("contains_any", words=["sea", "lake"]), C("contains_none", words=["sea"])), (C("n_lines", n=5), C("n_bullets", n=3)), (C("emojis", num_least=1), C("emojis", num_most=3))]


def of_check(check, i): return Rule(id=f"r{i}", text=f"Rule {i}.", how="check", check=check)


@pytest.mark.parametrize("pair", PLANTED, ids=lambda pair: "-".join(one.kind.split(":")[-1] for one in pair))
def test_planted_contradictions_are_found(pair):
    assert contradiction([of_check(one, i) for i, one in enumerate(pair)]) and contradiction([of_check(one, i) for i, one in enumerate(pair[::-1])])


def test_what_can_be_kept_together_is_no_contradiction():
    assert not [pair for pair in FINE if contradiction([of_check(one, i) for i, one in enumerate(pair)])]
    texts = [("Never answer without a lantern.", "Include a lantern each time."), ("Do not use exclamation marks.", "Use a bulleted list.")]
    assert not [pair for pair in texts if contradiction([*map(rule_from, pair)])]


IN_WORDS = [("Answer in at most 10 words.", "Answer in at least 50 words."), ("Write in lower case only.", "Write in capital letters only."), ("Do not use emojis.", "Use emojis in every reply."),
            ("Keep away from the sea.", "Compare things to the sea."), ("Start with the word \"Psst\".", "Start with the word \"Well\"."), ("Mention the word \"ink\".", "Do not use the word \"ink\"."),
            ("Put your words down in lower case only.", "Type in capital letters only."), ("Answer in one sentence.", "Answer in exactly three sentences."),
            ("Use exactly two bullet points.", "Use exactly five bullet points."), ("End with the word \"farewell\".", "End with the word \"amen\"."), ("Use no commas.", "Use at least two commas."),
            ("Do not mention the moon.", "Always mention the moon."), ("Be brief.", "Be detailed."), ("Answer briefly.", "Explain everything at length."), ("Answer with one word.", "Answer in full sentences."),
            ("Answer in at most three words.", "Answer in exactly five sentences."), ("Avoid lists.", "Answer in lists."), ("Leave out the price.", "Always mention the price."),
            ("Put your reply in square brackets.", "Format: in curly braces."), ("Type with tildes instead of full stops.", "Write with exclamation marks instead of full stops.")]  # twenty, in words


def test_every_reason_is_named_in_the_ledger_and_it_balances(tmp_path):
    said = {"unreadable": "Sure, here are the rules", "wrong_count": prompt_text(4), "repeated": prompt_text(3, ("Be brief.", "Sound cheerful.", "Be brief!")),
            "sets_task": prompt_text(3, ("Be brief.", "Sound cheerful.", "What is the capital of Peru?")), "restates_instruction": "restate",
            "wrong_language": "你是一位老裁缝。\n1. 话要简短。\n2. 语气要亲切。\n3. 提到丝绸。", "leak": "You are a sailor.\n1. Sing of storms.\n2. Whisper.\n3. Praise the captain.",
            "unfinished": {"text": prompt_text(3), "finish": "length"}, "engine_error": {"error": "no response"}, None: prompt_text(3)}
    said |= {("contradiction", i): prompt_text(3, (*pair, "Sound cheerful.")) for i, pair in enumerate(IN_WORDS)}
    instructions = instructions_of(TALKS, Stage(tmp_path / "instructions"))
    requests = draw_requests(instructions, read_examples()[0], k_range=(3, 3), per_instruction=3)[:len(said)]
    due = dict(zip((one["id"] for one in requests), said.items(), strict=True))
    texts = {one["id"]: one["instruction"].text for one in requests}
    say = lambda one: prompt_text(3, ("Be brief.", "Sound cheerful.", "Say " + texts[one["id"]].rstrip("?") + ".")) if due[one["id"]][1] == "restate" else due[one["id"]][1]
    stage = Stage(tmp_path / "rules")
    kept = write_prompts(requests, engine(say), stage, evaluation=[said["leak"]])
    stage.close(len(requests), len(kept))
    reasons = stage.ledger.as_dict()["reasons"]
    assert reasons == {"contradiction": len(IN_WORDS)} | {reason: 1 for reason in said if isinstance(reason, str)} and len(kept) == 1
    assert {one["detail"] for one in stage.ledger.dropped if one["reason"] == "contradiction"} == {" | ".join(pair) for pair in IN_WORDS}


def test_a_role_or_a_set_of_rules_for_evaluation_leaves():
    text, rejected = prompt_text(3), lambda *lists: why_rejected(prompt_text(3), 3, "Why is the sea salty?", held_out=lists)
    assert rejected(["tailor"]) == rejected(["lantern", "tailor", "brief", "cheerful"]) == ("leak", text)
    assert rejected() is rejected(["tailor", "cheerful"], ["lantern", "tailor", "brief", "calm"], ["sailor"], ["tail"]) is None  # other sets of rules


@pytest.mark.parametrize("say", ["Sure, here are the rules", "Sure, here are the rules:\n1. Be brief.", "", "Of course! 1. Be brief."])
def test_an_engine_that_only_talks_is_one_error(tmp_path, say):
    instructions = instructions_of(TALKS, Stage(tmp_path / "instructions"))
    with pytest.raises(InputError, match=f"none of {len(instructions)} system prompts can be used"):
        write_prompts(draw_requests(instructions, read_examples()[0], k_range=(1, 1)), engine(lambda one: say), Stage(tmp_path / "rules"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    found = parse_prompt(text)
    assert found is None or (found[0] and all(found[1]))
    why_rejected(text, 2, "Why is the sea salty?")


# Responses and verification

def test_every_rule_occurs_in_what_the_engine_wrote(tmp_path):
    _, prompts, _ = made(tmp_path, 3)
    assert {row.k for row in prompts} == {1, 2, 3, 4, 5, 6}
    for row in prompts: assert len(row.rules) == row.k + 1 and all(rule.text in row.written for rule in row.rules)
    assert read_rows(write_rows(tmp_path / "prompts.jsonl", prompts), RolePrompt) == prompts


def echo(request):
    "Every rule of the system prompt, or in a rewriting request the response and the setting."
    system, last = (request["messages"][i]["content"] for i in (0, -1))
    if "[Reply]" not in last: return " ".join(re.sub(r"^\d+\. ", "", line) for line in system.splitlines())
    return f"{last.split('[Reply]' + chr(10))[1].split(chr(10) + '[')[0]} {last.splitlines()[-1]}"


@pytest.mark.parametrize("write", ["direct", "stepwise"])
def test_one_rule_less_and_the_row_leaves(tmp_path, write):
    instructions, prompts, _ = made(tmp_path, 2)
    samples, stage = rule_samples(prompts, instructions), Stage(tmp_path / write)
    done = restyle(samples, engine(echo), stage) if write == "direct" else stepwise(samples, prompts, engine(echo), stage)
    stage.close(len(samples), len(done))
    judge = shows(lambda rule: rule.text)
    verdicts = judge_rules(done, prompts, judge)
    kept = verify(done, verdicts, Stage(tmp_path / "whole"))
    assert len(kept) == len(done) and len(verdicts) == sum(row.k + 1 for row in prompts)
    rules, rng = {row.id: row.rules for row in prompts}, random.Random(0)
    for one in done:
        lost = rng.choice(rules[one.system_prompt_id]).text
        less = [row.model_copy(update={"response": row.response.replace(lost, "")}) if row.id == one.id else row for row in done]
        stage = Stage(tmp_path / f"{write}-{one.id}")
        left = verify(less, judge_rules(less, prompts, judge), stage)
        stage.close(len(less), len(left))
        assert {row.id for row in done} - {row.id for row in left} == {one.id} and stage.ledger.as_dict()["reasons"] == {"rule_broken": 1}


def test_five_of_six_rules_kept_is_not_kept(tmp_path):
    instructions, prompts, _ = made(tmp_path, k_range=(6, 6))
    done = restyle(rule_samples(prompts, instructions), engine(lambda one: echo(one).replace("Name no city.", "")), Stage(tmp_path / "responses"))
    with pytest.raises(InputError, match=f"none of {len(done)} responses can be used: {len(done)} rule_broken"): verify(done, judge_rules(done, prompts, shows(lambda rule: rule.text)), Stage(tmp_path / "verify"))


def test_a_stepwise_engine_that_fails_midway_leaves_in_the_ledger(tmp_path):
    instructions, prompts, _ = made(tmp_path, k_range=(2, 2))
    samples, stage = rule_samples(prompts, instructions), Stage(tmp_path / "responses")
    broken = {samples[0].id: "", samples[1].id: {"error": "busy"}}
    done = stepwise(samples, prompts, engine(lambda one: broken.get(one["id"], echo(one))), stage)
    stage.close(len(samples), len(done))
    assert stage.ledger.as_dict()["reasons"] == {"empty": 1, "engine_error": 1} and len(done) == len(samples) - 2


def test_the_explanation_decides_fit_and_rule(tmp_path):
    instructions, prompts, _ = made(tmp_path, k_range=(1, 1))
    done = restyle(rule_samples(prompts, instructions), engine(echo), Stage(tmp_path / "responses"))
    row = "A\nAsked: {}. Told: {}. Setting: {}. Style: plain. Shown: {}."
    said = {"kept": row.format("tea", "tea", "calm", "calm"), "rule_broken": row.format("tea", "tea", "calm", "nothing"), "bad_context": row.format("tea", "milk", "calm", "calm"),
            "undecided": "I cannot say.", "not_applicable": "E" + row.format("tea", "tea", "calm", "calm")[1:]}
    due = dict(zip((one.id for one in done), itertools.cycle(said)))
    stage = Stage(tmp_path / "verify")
    verdicts = judge_rules(done, prompts, explaining_judge(engine(lambda one: said[due[one["id"].split("/")[0]]]), stage.part("judge")))
    kept = verify(done, verdicts, stage)
    stage.close(len(done), len(kept))
    assert {one["id"]: one["reason"] for one in stage.ledger.dropped} == {id: name for id, name in due.items() if name != "kept"}
    assert all(row.judge == "explanation:stub" and row.rationale for row in verdicts)


def test_kill_and_resume_give_the_same_bytes(tmp_path):
    instructions, prompts, requests = made(tmp_path, 2)
    calls = itertools.count()

    def chain(folder, say):
        prompts = write_prompts(requests, engine(lambda one: say(prompt_text(asked_k(one)))), Stage(tmp_path / folder / "rules", shard_size=4))
        done = stepwise(rule_samples(prompts, instructions), prompts, engine(lambda one: say(echo(one))), Stage(tmp_path / folder / "responses", shard_size=4))
        write_rows(tmp_path / folder / "responses.jsonl", done)

    def dies(text):
        if next(calls) in (9, 60): raise KeyboardInterrupt
        return text
    chain("whole", lambda text: text)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): chain("cut", dies)
    chain("cut", dies)
    files = lambda name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json*")}
    assert files("cut") == files("whole")


# Training rows

@settings(max_examples=50, deadline=None)
@given(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), st.lists(st.integers(1, 20), min_size=60, max_size=90), st.integers(0, 9))
def test_mixtures_have_their_share_and_equal_tokens(share, sizes, seed):
    rows = [{"id": str(i), "n": n} for i, n in enumerate(sizes)]
    budget = min(sum(sizes[:30]), sum(sizes[30:]))
    found = mix(rows[:30], rows[30:], share, budget, lambda row: row["n"], seed)
    ruled = sum(row["n"] for row in found if int(row["id"]) < 30)
    assert abs(ruled - share * budget) <= 20 and abs(sum(row["n"] for row in found) - budget) <= 40
    assert len({row["id"] for row in found}) == len(found) and found == mix(rows[:30], rows[30:], share, budget, lambda row: row["n"], seed)


def test_plain_rows_have_no_system_prompt(tmp_path):
    rows = plain_rows(instructions_of(TALKS, Stage(tmp_path), "all"))
    assert all([one["role"] for one in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2) + ["user"] for row in rows)


def test_a_reversed_rule_makes_the_chosen_response_perfect(tmp_path):
    instructions, prompts, _ = made(tmp_path, k_range=(2, 2))
    samples = rule_samples(prompts, instructions, draws=2)
    lost = {row.id: ("Sound cheerful.", "Be brief. Sound cheerful.")[i % 2] for i, row in enumerate(samples)}  # one and two rules broken
    done = restyle(samples, engine(lambda one: echo(one).replace(lost[one["id"]], "")), Stage(tmp_path / "responses"))
    verdicts = judge_rules(done, prompts, shows(lambda rule: rule.text))
    stage = Stage(tmp_path / "pairs")
    rows = preference_rows(done, verdicts, prompts, stage)
    stage.close(len(prompts), len(rows))
    assert len(rows) == len(prompts)
    for row in rows:
        system = row["messages"][0]["content"].splitlines()
        assert system[:2] == ["You are a tailor.", "1. Be brief."] and system[2] == "2. Do the opposite of this: Sound cheerful."
        assert "Be brief." in row["chosen"] and "Be brief." not in row["rejected"] and row["chosen"] != row["rejected"]
        assert [pair[0] for pair in row["verdicts"].values()] == [True, True, False]


# The notebooks

@pytest.mark.parametrize("change, message", [('k_range = "1-x"', "k_range: '1-x' is no range"), ("max_new_tokens = 1", "unfinished"), ('language = "zh"', "none of")], ids=["range", "all rejected", "language"])
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, change, message):
    recipe = f'name = "one"\ndescription = "One step."\n[steps.rules]\nnotebook = "rnr/02_rules.ipynb"\nn_instructions = 2\ndtype = "float32"\n{change}\n'
    done = CliRunner().invoke(app, ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2, done.output
    assert message in done.output and "Traceback" not in done.output


@pytest.mark.parametrize("row, reason", [({"output": None}, "unknown_format"), ({"output": ""}, "blank_message"), ({"instruction": "why? " * 20_000, "output": "Because."}, "too_long")],
                         ids=["no output", "empty output", "100,000 characters"])
def test_instruction_files_without_a_usable_row_are_one_line_and_exit_code_2(tmp_path, row, reason):
    rows = [{name: value for name, value in ({"instruction": f"Why is {thing} there?", "input": ""} | row).items() if value is not None} for thing in THINGS]
    recipe = 'name = "one"\ndescription = "One step."\n[steps.conversations]\nnotebook = "shared/conversations.ipynb"\non_error = "skip"\n'
    words = ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--set", f"conversations.conversations={write_bytes(tmp_path / 'rows.json', json.dumps(rows).encode())}"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and f"left out: {len(rows)} {reason}" in done.output and "Traceback" not in done.output, done.output


def test_samples_are_rows(tmp_path):
    instructions, prompts, _ = made(tmp_path)
    samples = rule_samples(prompts, instructions)
    assert read_rows(write_rows(tmp_path / "samples.jsonl", samples), Sample) == samples
    assert {row.type for row in samples} <= {f"rules-{k}" for k in range(1, 7)}


# Real instructions, a teacher behind a server, and a model of another architecture

def teacher(number, body, headers):
    "Writes system prompts, responds, and judges: the sixth rule is violated, all else satisfied."
    text = body["messages"][-1]["content"]
    if rnr.rnr_words("en")["blocks"]["prompt"] in text: return 200, reply(prompt_text(int(text.rstrip().splitlines()[-2]))), {}
    if "verdict:" not in body["messages"][0]["content"]: return 200, reply("That depends on the day, and on who asks. " * 5), {}
    return 200, reply(f"Verdict: {'violated' if RULES[-1] in text else 'satisfied'}\nEvidence: none\nReason: so it is."), {}


SMALL = ["batch_size=16", "served_model=teacher", "conversations.max_chars=700", "conversations.n_conversations=40", "conversations.n_eval_conversations=6", "verify.judge_way=words", "responses.max_new_tokens=24",
         "train.num_train_epochs=1", "train.max_length=1024", "measure.dialogues=2", "measure.turns=2", "measure.max_new_tokens=16", "measure.guard=2", "measure.agreement=0", "dtype=float32"]


def alpaca(folder):
    "The self-instruct seeds as an Alpaca file."
    rows = [json.loads(line) for line in (SHARED / "self-instruct/seed_tasks.jsonl").read_text().splitlines()]
    rows = [{"instruction": row["instruction"], **row["instances"][0]} for row in rows]
    return write_bytes(folder / "alpaca.json", json.dumps(rows).encode())


FILES = {"self-instruct": lambda folder: SHARED / "self-instruct/seed_tasks.jsonl", "alpaca": alpaca, "openassistant": lambda folder: SHARED / "openassistant/en_100_tree.jsonl.gz"}


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("self-instruct", "qwen3"), ("alpaca", "gemma"), ("openassistant", "llama")])
def test_real_instructions_and_another_architecture(tmp_path, name, kind, monkeypatch):
    if not SHARED.exists(): pytest.skip("no shared data")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-3f9a81c07d5e")
    server = Fake(teacher)
    words = ["rnr-qlora", *(word for pair in [f"model={tiny_model(tmp_path / 'model', kind)}", f"conversations={FILES[name](tmp_path)}", f"base_url={server.url}", *SMALL] for word in ("--set", pair))]
    planned = CliRunner().invoke(app, ["plan", *words, "--out", str(tmp_path / "run")])
    assert planned.exit_code == 0 and all(word in planned.output for word in ("rows", "trained", "GiB", "cpu")), planned.output
    done = CliRunner().invoke(app, ["run", *words, "--out", str(tmp_path / "run")])
    server.http.shutdown()
    assert done.exit_code == 0, done.output[-3000:]
    ledgers = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "run").rglob("ledger.json")}
    for one in ledgers.values(): assert one.get("expected", one.get("rows_in", 0)) == one.get("rows_out", 0) + len(one["dropped"]), one["stage"]
    assert set(ledgers["verify"]["reasons"]) == {"rule_broken"} and ledgers["verify"]["rows_out"]
    numbers = read_rows(tmp_path / "run/report/numbers.jsonl")
    assert {row["arm"] for row in numbers if row["metric"] == "adherence"} == {"base", "plain", "rnr", "verified"}
