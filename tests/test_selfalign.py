"SELF-ALIGN with engines that are stubs: every filter fires, every row is accounted for, nothing shown is trained on."
import json
from collections import Counter
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import LCSseq
from test_http_engine import Fake, reply
from tiny import tiny_dialogues, tiny_model
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import InputError, read_rows, stable_id, write_bytes, write_rows
from s3ft_nb.core.split import evaluation_texts, near_duplicate
from s3ft_nb.core.stage import Ledger, Stage
from s3ft_nb.judging.checks import split_words
from s3ft_nb.lm.labels import encode
from s3ft_nb.lm.model import load
from s3ft_nb.lm.train import make_settings
from s3ft_nb.methods import engraving
from s3ft_nb.methods import selfalign as room
from s3ft_nb.methods.engraving import baked_rows

KNOWN = room.choose_principles(room.read_principles(), 5, seed=0)
LEAK = KNOWN.leak[0]
TEXT = "Which river flows through Vienna?"
GOOD = "Thought: A fact, recall (8), is asked for.\nReply: The Danube does, past the old town."
PLANTED = {  # {reason: what a model writes}
    "no_marker": "The Danube does, past the old town.",
    "no_thought": "Reply: The Danube does, past the old town.",
    "unknown_principle": GOOD.replace("(8)", "(8, 99)"),
    "short": "Thought: Facts, recall (8).\nReply: Danube.",
    "second_turn_cut": GOOD + "\nUser: And through Paris?",
    "repeat": GOOD + " It is long. It is long.",
    "exemplar_leak": GOOD + f" {LEAK} said so.",
    "meta_phrase": GOOD + " So my principles say.",
    "apology": GOOD.replace("Reply: The", "Reply: Sorry, the"),
    "copies_query": GOOD.replace("Reply: ", f"Reply: {TEXT} "),
    "empty": "  ",
}


def engine(say):
    "A stub; `say` gets the messages and gives a text, or a dict of a reply."
    def generate(requests, seed=0, progress=None):
        said = [(one, say(one["messages"])) for one in requests]
        return [{"id": one["id"], "tokens": 3, "finish": "stop"} | (text if isinstance(text, dict) else {"text": text}) for one, text in said]
    return SimpleNamespace(name="stub", generate=generate)


def reasons(stage):
    return stage.ledger.as_dict()["reasons"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_bundled_data(language):
    known, asked = room.read_principles(language=language), room.read_questions(language=language)
    assert [row["n"] for row in known.principles] == [*range(1, 17)] and len(known.exemplars) == 8 and known.leak
    assert {n for row in known.exemplars for n in room.cited(row["thought"])} == {*range(1, 17)}
    assert all(word in json.dumps(known.exemplars, ensure_ascii=False) for word in known.leak)
    assert len(asked["seeds"]) == 40 and len(asked["kinds"]) == 20 and sum(kind.get("unanswerable", False) for kind in asked["kinds"]) >= 6
    texts = [row["text"] for row in known.principles] + asked["seeds"] + [kind["question"] for kind in asked["kinds"]]
    assert not [text for i, text in enumerate(texts) if near_duplicate(text, texts[:i])]


def test_every_filter_fires_and_every_row_is_accounted_for(tmp_path):
    rows = [{"id": reason, "text": TEXT, "source": "test"} for reason in [*PLANTED, "good", "cut_off", "engine_error"]]
    said = iter([*PLANTED.values(), GOOD, {"text": GOOD, "finish": "length"}, {"error": "down"}])
    stage = Stage(tmp_path)
    done = room.align(rows, KNOWN, engine(lambda messages: next(said)), stage)
    stage.close(len(rows), len(done))
    assert reasons(stage) == {**dict.fromkeys(PLANTED, 1), "cut_off": 1, "engine_error": 1}
    assert {row["id"]: row["reason"] for row in stage.ledger.dropped} == {row["id"]: row["id"] for row in rows if row["id"] != "good"}
    assert set(room.FILTERS) <= set(reasons(stage))
    assert [(row["principles"], row["reply"], row["thought"]) for row in done] == [([8], "The Danube does, past the old town.", "A fact, recall (8), is asked for.")]


def test_filters_can_be_left_out(tmp_path):
    stage, row = Stage(tmp_path), {"id": "a", "text": TEXT, "source": "test"}
    done = room.align([row], KNOWN, engine(lambda _: PLANTED["apology"]), stage, without=["apology"])
    assert done[0]["reply"].startswith("Sorry")
    with pytest.raises(InputError, match="unknown filter 'apologies'"): room.align([row], KNOWN, engine(str), Stage(tmp_path / "b"), without=["apologies"])


def test_chinese_replies_are_parsed_and_filtered(tmp_path):
    known, rows = room.choose_principles(room.read_principles(language="zh"), 5), [{"id": str(i), "text": "维也纳有哪条河？"} for i in range(3)]
    said = iter(["思考：问事实，先回忆（8）。\n回复：多瑙河流过老城旁边。", "思考：先回忆（8）。\n回复：抱歉，是多瑙河。", "思考：先回忆（8）。\n回复：根据原则，是多瑙河。"])
    stage = Stage(tmp_path)
    done = room.align(rows, known, engine(lambda _: next(said)), stage, "zh")
    assert [row["principles"] for row in done] == [[8]] and reasons(stage) == {"apology": 1, "meta_phrase": 1}


def test_instructions_topics_and_questions_balance(tmp_path):
    asked = room.read_questions()
    kinds = asked["kinds"][:2]
    stage = Stage(tmp_path / "instruct")
    made = room.write_instructions(asked["seeds"], 3, engine(lambda m: f"6. Name {len(m[1]['content'])} rivers of Spain\n7. Draw an image of a cat\n8. ?? what is it now\n9. Hi\n10. {asked['seeds'][0]}"), stage)
    stage.close(3, len(made))
    assert sum(reasons(stage).values()) + len(made) == 15 and {"media", "odd_start", "length", "duplicate"} <= set(reasons(stage))
    stage = Stage(tmp_path / "topics")
    lists = {kinds[0]["name"]: "tea\nTea\nrain.\na b c d\nstone\nsand", kinds[1]["name"]: "oil\nsalt"}
    topics = room.write_topics(kinds, 9, 1, engine(lambda m: lists[m[1]["content"].split("\n")[1].split(":")[0]]), stage)
    stage.close(2, len(topics))
    assert Counter(row["kind"] for row in topics) == dict.fromkeys(lists, 2)
    assert reasons(stage) == {"duplicate": 1, "odd_end": 1, "length": 1, "surplus": 1}
    stage, said = Stage(tmp_path / "questions"), iter(["Why is tea so warm?\nHow old is this stone?", "Only one line about oil"])
    rows = room.write_questions(topics, kinds, engine(lambda _: next(said)), stage, per_request=2)
    stage.close(len(topics), len(rows))
    assert [(row["topic"], row["text"]) for row in rows] == [("tea", "Why is tea so warm?"), ("stone", "How old is this stone?")] and reasons(stage) == {"wrong_count": 2}


WORDS = st.lists(st.sampled_from("abcde"), max_size=9).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, max_size=12), st.lists(WORDS, max_size=3), st.sampled_from([0.3, 0.5, 0.7, 0.9, 1.0]))
def test_near_duplicates_are_those_that_every_pair_would_give(texts, earlier, most):
    kept, out = [split_words(text) for text in earlier], []
    for text in texts:
        said = split_words(text)
        near = [2 * LCSseq.similarity(said, other) > most * (len(said) + len(other)) + 1e-9 for other in kept]
        out.append("duplicate" if said in kept else "near_duplicate" if any(near) else None)
        if not out[-1]: kept.append(said)
    assert room.near_reasons(texts, most, earlier) == out


@pytest.mark.parametrize("planted", [KNOWN.principles[3]["text"].upper(), KNOWN.exemplars[0]["user"], f"Ask {LEAK}.", "So: a fact, recall (8), is asked for"])
def test_a_planted_text_in_a_training_row_is_found(planted):
    rows = [{"id": "a", "text": TEXT, "thought": "A fact, recall (8), is asked for.", "reply": "The Danube."}]
    assert room.pruned_rows(rows, KNOWN) == [{"id": "a", "messages": [{"role": "user", "content": TEXT}], "response": "The Danube."}]
    with pytest.raises(InputError, match="training row a holds"): room.pruned_rows([rows[0] | {"reply": f"The Danube. {planted}"}], KNOWN)


def test_what_the_evaluation_asks_leaves_before_it_costs_anything_and_is_found_in_training_rows(tmp_path):
    talk = {"id": "c", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": TEXT}, {"role": "assistant", "content": "The Danube."}]}
    known = KNOWN._replace(held=evaluation_texts([write_rows(tmp_path / "eval.jsonl", [talk])]))
    rows, asked = [{"id": "planted", "text": f"  {TEXT.upper()[:-1]} ?"}, {"id": "other", "text": "Which river flows through Paris?"}], []
    def say(messages):
        asked.append(messages[1]["content"])
        return GOOD.replace("Danube", "Seine")
    stage = Stage(tmp_path / "align")
    done = room.align(rows, known, engine(say), stage)
    stage.close(len(rows), len(done))
    assert [row["id"] for row in done] == ["other"] and asked == [rows[1]["text"]] and [row["reason"] for row in stage.ledger.dropped] == ["held_out"]
    planted = done[0] | {"id": "planted", "text": rows[0]["text"]}
    for make in (room.pruned_rows, baked_rows):
        assert [row["id"] for row in make(done, known)] == ["other"]
        with pytest.raises(InputError, match="training row planted holds . WHICH RIVER"): make([*done, planted], known)


def test_pruned_rows_hold_nothing_that_was_shown(tmp_path):
    rows = [{"id": str(i), "text": f"{TEXT[:-1]} {i}?"} for i in range(4)]
    done = room.align(rows, KNOWN, engine(lambda _: GOOD), Stage(tmp_path / "align"))
    detailed = room.elaborate(done, KNOWN, engine(lambda m: f"It is the Danube, and {m[1]['content'][-2]} others join it."), Stage(tmp_path / "verbose"))
    meta = room.wording("en")["meta"]
    for training in (room.pruned_rows(done, KNOWN, [meta["standard"]]), room.pruned_rows(detailed, KNOWN, [meta["concise"], meta["standard"]])):
        text = json.dumps(training)
        for shown in [*(one["text"] for one in KNOWN.principles), *(one["user"] for one in KNOWN.exemplars), "Thought:", "recall (8)", *KNOWN.leak, meta["extensive"]]: assert shown not in text
    assert [row["messages"][0]["content"] for row in training] == [meta["concise"], meta["standard"]] * 2


def test_killed_and_resumed(tmp_path):
    rows, calls = [{"id": str(i), "text": f"{TEXT[:-1]} {i}?"} for i in range(6)], []
    def say(messages, after=9):
        calls.append(messages)
        if len(calls) > after: raise KeyboardInterrupt
        return GOOD
    with pytest.raises(KeyboardInterrupt): room.align(rows, KNOWN, engine(lambda m: say(m, 3)), Stage(tmp_path / "a", shard_size=2))
    resumed = room.align(rows, KNOWN, engine(lambda m: say(m, 99)), Stage(tmp_path / "a", shard_size=2))
    assert resumed == room.align(rows, KNOWN, engine(lambda _: GOOD), Stage(tmp_path / "b", shard_size=2)) and len(calls) == 8


def broken(tmp_path, change):
    known = room.read_principles()._asdict()
    table = json.loads(json.dumps(known))
    change(table)
    path = tmp_path / "principles.json"
    path.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize("change, message", [
    (lambda t: t["principles"][1].update(n=1), "number 1 occurs 2 times"), (lambda t: t["principles"].pop(2), "number 3 occurs 0 times"),
    (lambda t: t["exemplars"][0].update(thought="So brave (17)."), "exemplars.0.thought: cites principle 17"),
    (lambda t: t["exemplars"][0].update(reply=" "), "exemplars.0: has a field that is missing or blank"), (lambda t: t.pop("principles"), "holds no principles")])
def test_a_wrong_file_is_one_clear_line(tmp_path, change, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error: room.read_principles(broken(tmp_path, change))
    assert "\n" not in str(error.value) and "principles.json" in str(error.value)


def test_what_does_not_fit_or_leaves_nothing_is_one_clear_line(tmp_path):
    row = {"id": "a", "text": TEXT}
    with pytest.raises(InputError, match="5 exemplars take 2000 tokens, and there is room for 900"): room.align([row], KNOWN, engine(str), Stage(tmp_path / "a"), count=lambda _: 2000, room=900)
    with pytest.raises(InputError, match="no response is left: 1 no_marker"): room.align([row], KNOWN, engine(lambda _: "Sure, here it is."), Stage(tmp_path / "b"))
    long = room.align([row, {"id": "b", "text": "x" * 99}], KNOWN, engine(lambda _: GOOD), stage := Stage(tmp_path / "c"), count=lambda m: len(m[1]["content"]), room=60)
    assert len(long) == 1 and reasons(stage) == {"too_long": 1}
    with pytest.raises(InputError, match="language"): room.read_principles(language="xx")


# A model of one's own, principles of one's own, and a teacher behind a server

OWN = """principles = [
  {n = 1, name = "warm", text = "Be kind to whoever asks."}, {n = 2, name = "dated", text = "Say that prices may have changed."},
  {n = 3, name = "honest", text = "Say so when a thing cannot be known."}]
exemplars = [
  {user = "What does Bertram's lamp cost?", thought = "A price, so dated (2) is due.", reply = "It was ten crowns; that may have changed."},
  {user = "Will it rain in Ulm on my birthday next year?", thought = "The future, so honest (3).", reply = "That cannot be known yet."}]
leak = ["Bertram"]
"""
LAST = ["Explain how a {} is built by hand.", "Which city near the {} should I visit first?", "Write a short poem about my {} at night."]


def written(messages):
    "Lists, questions, responses under principles, every fifth of which leaks, and detailed responses, by what is asked."
    system, last = (one["content"] for one in messages)
    digest = stable_id(system, last)
    noun = "".join("bdfgklmnprst"[int(c, 16) % 12] + "aeiou"[int(c, 16) % 5] for c in digest[:4])
    words = room.wording("en")
    if system == words["instruct"].format(n=3): return "\n".join(f"{i}. {text.format(noun)}" for i, text in enumerate(LAST, 6))
    if system == words["topics"].format(n=5): return "\n".join(f"{noun} {i}" for i in "one two three four five".split())
    if system == words["questions"]: return "\n".join(f"When was {topic} seen in {noun} by {noun[::-1]}?" for topic in last.splitlines()[3:])
    if system == words["meta"]["extensive"]: return f"It is the {noun}, and much more could be told."
    return f"Thought: The past, so honest (3).\nReply: It is {'Bertram' if int(digest, 16) % 5 == 0 else 'not known'}, say the {noun}."


# Engraving: by SFT, by the distribution of the prompted model, on own samples

def engraving_rows(tmp_path, n=4):
    "Rows without principles, with what a teacher sees."
    known = room.choose_principles(room.read_principles(write_bytes(tmp_path / "own.toml", OWN.encode())), 0)
    replies = ["It was ten crowns then.", "That cannot be known yet, I fear.", "Ask again in winter.", "Two, or so it seems.", "Cheese and bread."]
    return baked_rows([{"id": f"r{i}", "text": f"What is soup number {i}?", "thought": "The past, so honest (3).", "reply": replies[i % 5]} for i in range(n)], known)


SMALL = {"quantization": "none", "dtype": "float32", "device": "cpu", "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 1}


def by_hand(model, tokenizer, row, text, variant):
    "Sum over the tokens of one response, and their number."
    said = row["teacher"][-1]["content"][: -len(row["response"])] + text
    sides = [encode(tokenizer, [*before, {"role": "assistant", "content": end}]) for before, end in ((row["messages"], text), (row["teacher"][:-1], said))]
    logs = lambda side: model(input_ids=torch.tensor([side["input_ids"]])).logits[0].log_softmax(-1)
    with torch.no_grad():
        own = logs(sides[0])
        with model.disable_adapter(): theirs = logs(sides[1])
    places = [[i for i, id in enumerate(side["labels"]) if id != -100] for side in sides]
    alike = list(takewhile(lambda pair: sides[0]["labels"][pair[0]] == sides[1]["labels"][pair[1]], zip(*(one[::-1] for one in places))))
    pairs = [(own[i - 1], theirs[j - 1]) for i, j in alike]
    total = sum(float(((q.exp() * (q - p)) if variant == "bake" else (p.exp() * (p - q))).sum()) for p, q in pairs)
    alone = places[0][: len(places[0]) - len(pairs)]
    learnt = encode(tokenizer, [*row["messages"], {"role": "assistant", "content": row["response"]}])["labels"]
    if variant == "opcd": alone = alone[:1]
    return total - sum(float(own[i - 1][learnt[i]]) for i in alone), len(pairs) + len(alone)


@pytest.mark.parametrize("variant", ["bake", "opcd"])
def test_the_loss_is_the_one_by_hand(tmp_path, variant):
    lm, rows = load(tiny_model(tmp_path / "model"), "none", dtype="float32", device="cpu"), engraving_rows(tmp_path)
    table = engraving.encode_baked(lm.tokenizer, rows, 512, Ledger("t"))
    sampling = {"max_new_tokens": 8} if variant == "opcd" else None
    trainer = engraving.make_baker(lm, table, [0, 1, 2, 3], make_settings(SMALL), tmp_path / "run", rows, 512, sampling)
    torch.manual_seed(0)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name: weight.data.normal_(0, 0.3)
    texts = ["A soup of beans.", "   ", "Then bread is enough, and tea.", "Cold"] if sampling else [row["response"] for row in rows]
    trainer.engine = SimpleNamespace(generate=lambda requests, seed: [{"text": text, "tokens": 5, "prompt_tokens": 7, "cached_tokens": 2} for text in texts])
    loss = float(trainer.compute_loss(trainer.model.eval(), trainer.data_collator(table)))
    texts = [text if text.strip() else row["response"] for text, row in zip(texts, rows)]  # nothing cannot be learnt from
    trainer.model.eval()
    sums = [by_hand(trainer.model, lm.tokenizer, row, text, variant) for row, text in zip(rows, texts)]
    assert loss > 0.01 and loss == pytest.approx(sum(total for total, _ in sums) / sum(n for _, n in sums), abs=1e-5)
    assert trainer.spent["scored"] == sum(len(encode(lm.tokenizer, [*row["teacher"][:-1], {"role": "assistant", "content": row["teacher"][-1]["content"][: -len(row["response"])] + text}])["input_ids"]) for row, text in zip(rows, texts))
    assert [trainer.spent[name] for name in ("generated", "cached", "replaced")] == ([20, 8, 1] if sampling else [0, 0, 0])


@pytest.mark.parametrize("variant", ["bake", "opcd"])
def test_engraving_killed_and_resumed_ends_with_the_same_bytes(tmp_path, variant, monkeypatch):
    model, rows, asked, calls = tiny_model(tmp_path / "model"), engraving_rows(tmp_path, 7), [], []
    generate, loss = engraving.TransformersEngine.generate, engraving.Baker.compute_loss
    def recorded(self, requests, seed=0, progress=None):
        asked.append((seed, [one["messages"] for one in requests]))
        return generate(self, requests, seed, progress)
    def dies(self, *args, **options):
        calls.append(1)
        if len(calls) in dying: raise KeyboardInterrupt
        return loss(self, *args, **options)
    monkeypatch.setattr(engraving.TransformersEngine, "generate", recorded), monkeypatch.setattr(engraving.Baker, "compute_loss", dies)
    sampling, dying = {"max_new_tokens": 8, "temperature": 1.0}, []
    run = lambda name: engraving.engrave(model, rows, stages.setdefault(name, Stage(tmp_path / name)), variant, sampling, num_train_epochs=2, gradient_accumulation_steps=2, **SMALL)
    stages, whole = {}, None
    whole = run("whole")
    steps = list(asked)
    dying += [len(calls) + 4, len(calls) + 9]
    for _ in dying:
        with pytest.raises(KeyboardInterrupt): run("cut")
    cut = run("cut")
    assert whole | {"seconds": 0} == cut | {"seconds": 0} and stages["whole"].usage == stages["cut"].usage
    for name in ("adapter_model.safetensors", "adapter_config.json"): assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "cut/adapter" / name).read_bytes()
    usage = stages["whole"].usage
    assert usage["scored"] > usage["trained"] > 0 and len({seed for seed, _ in steps}) == (whole["steps"] if variant == "opcd" else 0)
    assert usage["requests"] == sum(len(messages) for _, messages in steps) == (14 if variant == "opcd" else 0) and bool(usage["generated"]) == (variant == "opcd")
    assert "Be kind" not in json.dumps(steps) and "honest" not in json.dumps(steps)
    with pytest.raises(InputError, match="belongs to a training with other rows"): engraving.engrave(model, rows, Stage(tmp_path / "cut"), "sft", sampling, num_train_epochs=2, gradient_accumulation_steps=2, **SMALL)


def test_what_cannot_be_engraved_is_one_clear_line(tmp_path):
    model, rows = tiny_model(tmp_path / "model"), engraving_rows(tmp_path)
    with pytest.raises(InputError, match="engrave: unknown variant 'burn'"): engraving.engrave(model, rows, Stage(tmp_path / "a"), "burn", **SMALL)
    with pytest.raises(InputError, match="shorten the conversation or max_new_tokens"): engraving.engrave(model, rows, Stage(tmp_path / "b"), "opcd", {"max_new_tokens": 10**5}, **SMALL)
    with pytest.raises(InputError, match="fits with principles"): engraving.engrave(model, [row | {"teacher": [{"role": "system", "content": "soup " * 9999}, *row["teacher"][1:]]} for row in rows], Stage(tmp_path / "c"), "bake", **SMALL)
    old = SimpleNamespace(name="old", model=SimpleNamespace(forward=lambda input_ids: None))
    with pytest.raises(InputError, match="old cannot leave out logits .use sft"): engraving.make_baker(old, [], [], make_settings(SMALL), tmp_path, rows, 512)
    recipe = 'name = "one"\ndescription = "One step."\n[steps.engrave]\nnotebook = "selfalign/06_engrave.ipynb"\nengrave = "burn"\n'
    done = CliRunner().invoke(app, ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "engrave: unknown variant 'burn'" in done.output and "Traceback" not in done.output


def teacher(number, body, headers): return 200, reply(written(body["messages"])), {}


def test_every_stage_killed_and_resumed_ends_with_the_same_bytes(tmp_path):
    known, asked = room.read_principles(write_bytes(tmp_path / "own.toml", OWN.encode())), room.read_questions()
    def chain(name, say):
        home, kinds = tmp_path / name, asked["kinds"][:3]
        stages = {step: Stage(home / step, shard_size=2) for step in ("instruct", "topics", "questions", "align", "verbose")}
        rows = room.write_instructions(asked["seeds"], 5, engine(say), stages["instruct"])
        topics = room.write_topics(kinds, 4, 2, engine(say), stages["topics"])
        questions = room.write_questions(topics, kinds, engine(say), stages["questions"], draws=2)
        done = room.align(rows + questions, known, engine(say), stages["align"])
        detailed = room.elaborate(done, known, engine(say), stages["verbose"])
        sizes = [5, 6, 2 * len(topics), len(rows + questions), len(done)]
        for stage, n, out in zip(stages.values(), sizes, (rows, topics, questions, done, detailed)): stage.close(n, len(out))
        write_rows(home / "engraved.jsonl", room.pruned_rows(done, known))
        write_rows(home / "verbose.jsonl", room.pruned_rows(detailed, known))
    calls, dying = [], []
    def dies(messages):
        calls.append(1)
        if len(calls) in dying: raise KeyboardInterrupt
        return written(messages)
    chain("whole", dies)
    dying += [len(calls) + 1 + len(calls) * part // 100 for part in (4, 15, 35, 55, 85)]  # within every stage
    for _ in dying:
        with pytest.raises(KeyboardInterrupt): chain("cut", dies)
    chain("cut", dies)
    files = lambda name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json*")}
    assert files("cut") == files("whole") and len(files("whole")) > 20


@pytest.mark.parametrize("change, message", [
    ('principles = "{0}/twice.toml"', "number 1 occurs 2 times"), ('principles = "{0}/cites.toml"', "cites principle 7"),
    ("max_prompt_tokens = 40", "and there is room for 40"), ("max_new_tokens = 1", "no response is left"), ('without = ["apologies"]', "unknown filter 'apologies'")])
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, change, message):
    write_bytes(tmp_path / "twice.toml", OWN.replace("n = 2", "n = 1").encode()), write_bytes(tmp_path / "cites.toml", OWN.replace("honest (3).", "honest (7).").encode())
    recipe = f'name = "one"\ndescription = "One step."\n[steps.align]\nnotebook = "selfalign/03_align.ipynb"\nn_texts = 4\nn_exemplars = 2\ndtype = "float32"\n{change.format(tmp_path)}\n'
    done = CliRunner().invoke(app, ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2, done.output
    assert message in done.output and "Traceback" not in done.output


def test_the_published_scale_is_planned_without_being_run(tmp_path):
    model, talks = tiny_model(tmp_path / "model"), write_rows(tmp_path / "talks.jsonl", [{"messages": [*row, {"role": "assistant", "content": "So it is."}]} for row in tiny_dialogues(70, 1)])
    sizes = ["n_requests=87000", "n_topics=4950", "rounds=1000", "n_texts=360000", f"model={model}", f"conversations={talks}"]
    done = CliRunner().invoke(app, ["plan", "selfalign-qlora", "--out", str(tmp_path / "run"), *(word for size in sizes for word in ("--set", size))])
    table = {cells[0]: cells for line in done.output.splitlines() if len(cells := line.split()) > 5}
    assert done.exit_code == 0 and not (tmp_path / "run").exists(), done.output
    assert table["align"][3] == "360,000" and all(int(table["align"][at].replace(",", "")) > 10**7 for at in (4, 5))


PLAIN = "{% for m in messages %}{{ m.role.capitalize() + ': ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
LITTLE = ["batch_size=16", "served_model=teacher", "conversations.n_eval_conversations=4", "n_requests=6", "n_topics=2", "rounds=2", "align.n_exemplars=2", "n_texts=24", "align.max_new_tokens=32", "train-engraved.max_new_tokens=16",
          "verbose.max_new_tokens=32", "max_length=256", "measure.dialogues=2", "measure.turns=2", "measure.max_new_tokens=16", "measure.guard=2", "dtype=float32"]


@pytest.mark.slow
@pytest.mark.parametrize("kind, engrave", [("base", "bake"), ("qwen3", "opcd"), ("gemma", "sft")])  # a text prompt; a chat model; a template that refuses a system message
def test_principles_of_ones_own_and_another_architecture(tmp_path, kind, engrave, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-3f9a81c07d5e")
    model, server = tiny_model(tmp_path / "model", "llama" if kind == "base" else kind), Fake(teacher)
    if kind == "base": write_bytes(model / "chat_template.jinja", PLAIN.encode())
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": [*row, {"role": "assistant", "content": "So it is."}]} for row in tiny_dialogues(8, 3, system=False)])
    own = write_bytes(tmp_path / "own.toml", OWN.encode())
    words = ["selfalign-qlora", *(word for pair in [f"model={model}", f"conversations={talks}", f"base_url={server.url}", f"align.principles={own}", f"engrave={engrave}", *LITTLE] for word in ("--set", pair))]
    planned = CliRunner().invoke(app, ["plan", *words, "--out", str(tmp_path / "run")])
    assert planned.exit_code == 0 and all(word in planned.output for word in ("rows", "trained", "GiB")), planned.output
    done = CliRunner().invoke(app, ["run", *words, "--out", str(tmp_path / "run")])
    server.http.shutdown()
    assert done.exit_code == 0, done.output[-3000:]
    ledgers = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "run").rglob("ledger.json")}
    for one in ledgers.values(): assert one.get("expected", one.get("rows_in", 0)) == one.get("rows_out", 0) + len(one["dropped"]), one["stage"]
    assert "exemplar_leak" in ledgers["align"]["reasons"] and ledgers["align"]["rows_out"]
    usage = json.loads((tmp_path / "run/train-engraved/usage.json").read_text())
    assert usage["trained"] and (usage["scored"] > 0, usage["generated"] > 0) == (engrave != "sft", engrave == "opcd")
    trained = (tmp_path / "run/align/engraved.jsonl").read_text()
    assert "Bertram" not in trained and "honest (3)" not in trained and "Be kind" not in trained
    numbers = read_rows(tmp_path / "run/report/numbers.jsonl")
    judged = {(row["arm"], row["key"]) for row in numbers if row["metric"] == "csr" and row["part"] in ("rule", "unsettled")}
    assert judged == {(arm, rule) for arm in ("base", "engraved", "verbose") for rule in ("1 warm", "2 dated", "3 honest")}
