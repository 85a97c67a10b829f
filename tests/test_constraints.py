"Soft constraints with stub engines: every rejection has its reason, the winner is carried forward, and both sides of a pair are outputs."
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import InputError, read_json, read_rows, stable_id, write_bytes, write_json, write_rows
from s3ft_nb.core.split import evaluation_texts
from s3ft_nb.core.stage import Stage, rows_hash
from s3ft_nb.judging.checks import run_check
from s3ft_nb.judging.judge import Judgement, make_judge, verdict_of
from s3ft_nb.judging.pairs import pair_summary
from s3ft_nb.judging.rules import rules_finder
from s3ft_nb.lm.dpo import PairSettings, parse_pair
from s3ft_nb.lm.model import model_hash
from s3ft_nb.methods.constraints import (ConstraintClass, ConstraintPath, assert_combinable, by_checklist, construct, curriculum,
                                         any_order, go_with, in_both_orders, in_shape, judger_numbers, level_messages, pair_rows, read_classes, refine_pairs, reorder,
                                         why_no_constraint, write_outputs)
from s3ft_nb.methods.conflicts import contradiction
from s3ft_nb.methods.rnr import Instruction
from s3ft_nb.judging.rules import rule_from

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("S3FT_SHARED", ROOT.parent / "shared")) / "data"
ORDERS = ("easy-hard", "shuffled", "reversed", "single")
WORDS = ("lantern", "umbrella", "anchor", "candle", "ribbon")
NAMES = ("tone", "place", "hero", "speaker", "ending")
CLASSES = [ConstraintClass(name=name, kind="soft", ideas=[{"ask": f"{name}: something", "reverse": "Do the opposite of this: {text}"}]) for name in NAMES]
SAYS = dict(zip(NAMES, (f"Bring in the {word}." for word in WORDS)))
SEEDS = [Instruction(id=f"s{i}", text=f"Where do {thing} come from?", response="From afar.", conversation_id=f"c{i}", split="train")
         for i, thing in enumerate(("apples", "bridges", "glaciers", "hammers", "islands", "kettles"))]


def engine(say, name="stub"):
    "An engine that says `say(request)`."
    row = lambda one: {"id": one["id"], "tokens": 5, "finish": "stop"} | (said if isinstance(said := say(one), dict) else {"text": said})
    return SimpleNamespace(name=name, generate=lambda requests, seed, progress=None: [row(one) for one in requests])


def writer(request):
    "The constraint of the class that a request names."
    return SAYS[request["messages"][1]["content"].splitlines()[-1].split(":")[0]]


def responder(request, drop=0.4):
    "A response with some of the words that are asked for, by the request's id."
    rng, text = random.Random(request["id"]), " ".join(one["content"] for one in request["messages"])
    return " ".join(["From afar", request["id"].rpartition("/")[2], *(word for word in WORDS if f"the {word}." in text and rng.random() > drop)])


def judge(responses, rules):
    "A judge that looks for the word of each rule."
    find = rules_finder(rules)
    return [verdict_of(row, rule, Judgement(rule.text.split()[-1][:-1] in row.response), "stub") for row in responses for rule in find(row)]


def made(tmp_path, k=5, respond=responder):
    paths = construct(SEEDS, CLASSES, k, engine(writer), Stage(tmp_path / "construct"))
    return paths, write_outputs(paths, engine(respond), Stage(tmp_path / "outputs"))


def letters(choose):
    "An engine that scores the letter that `choose(first, second)` names."
    def score(requests, labels, progress=None):
        out = []
        for one in requests:
            first, second = (part.split("\n")[1] for part in one["messages"][1]["content"].split("[")[-2:])
            out.append({"id": one["id"], "outside": 0.0, "logprobs": [0.0 if label == choose(first, second) else -9.0 for label in labels]})
        return out
    return SimpleNamespace(name="letters", score=score)


# Classes

@pytest.mark.parametrize("language", ["en", "zh"])
def test_bundled_classes(language):
    classes = read_classes(language=language)
    soft, hard = ([one for one in classes if one.kind == kind] for kind in ("soft", "hard"))
    assert len(soft) == 6 and all(len(one.ideas) == 6 and all(idea["ask"] for idea in one.ideas) for one in soft)
    assert sum(len(one.ideas) for one in hard) >= 24 and all(len(idea["says"]) == 3 for one in hard for idea in one.ideas)
    path = ConstraintPath(id="p", seed_id="s", conversation_id="c", instruction={"en": "Where is the moon?", "zh": "月亮在哪里？"}[language], language=language)
    for text in (text for one in hard for idea in one.ideas for text in idea["says"]):
        assert rule_from(text).check, text
        assert why_no_constraint(text, path, 30) is None, text
    asked = [idea.get("ask") or idea["says"][0] for one in classes for idea in one.ideas]
    assert len({*asked}) == len(asked) and all("{text}" in idea["reverse"] for one in soft for idea in one.ideas)
    for a, b in itertools.combinations(classes, 2): assert go_with(a, [b]) == go_with(b, [a])


def test_a_checkable_reverse_is_at_odds_with_its_constraint():
    pairs = [(idea["says"][0], idea["reverse"]) for one in read_classes() if one.kind == "hard" for idea in one.ideas if rule_from(idea["reverse"]).check]
    assert len(pairs) >= 10 and not [pair for pair in pairs if not contradiction([*map(rule_from, pair)])]


@pytest.mark.parametrize("change, message", [
    ({"apart": ["nobody"]}, "nobody"), ({"name": "place"}, "place"), ({"kind": "stiff"}, "kind"), ({"ideas": []}, "ideas"), ({"ideas": [{"reverse": "No."}]}, "ask or says"),
    ({"ideas": [{"ask": "tone: mood", "says": ["Be sad."], "reverse": "No."}]}, "ask or says")])
def test_a_wrong_file_of_classes_is_one_line(tmp_path, change, message):
    rows = [one.model_dump() for one in CLASSES]
    with pytest.raises(InputError, match=message) as error: read_classes(write_json(tmp_path / "classes.json", {"classes": [rows[0] | change, *rows[1:]]}))
    assert "\n" not in str(error.value) and "classes.json" in str(error.value)


@pytest.mark.parametrize("k, share", [(6, 1.0), (0, 0.5), (1, 0.0), (2, 1.5)])
def test_more_constraints_than_go_together_are_refused(k, share):
    with pytest.raises(InputError, match="cannot be combined"): assert_combinable(CLASSES, k, share)


def test_soft_and_hard_are_drawn_as_stated(tmp_path):
    count = lambda share, k=5: [one.kind for path in construct(SEEDS, read_classes(), k, engine(lambda one: f"Talk of {one['id']} in passing."), Stage(tmp_path / f"{share}"), soft_share=share)
                                for one in path.constraints]
    assert {*count(0.0)} == {"hard"} and {*count(1.0, 3)} == {"soft"} and {*count(0.5)} == {"hard", "soft"}


# Construction

def test_every_rejection_has_its_reason_and_the_ledger_balances(tmp_path):
    said = {"wrong_language": "请用比喻。", "unreadable": "Sure, here it is.\nBe brief.", "too_long": "Be " + "very " * 20 + "brief.", "changes_task": "What is the capital of Peru?",
            "unfinished": {"text": "Be", "finish": "length"}, "engine_error": {"error": "no response"}}
    due = iter([*said.values(), "Answer in at most 10 words.", "Answer in at most 10 words!", "Answer in at least 20 words.", "Be solemn."])
    stage = Stage(tmp_path)
    (path,) = construct(SEEDS[:1], CLASSES, 2, engine(lambda one: next(due)), stage, tries=8)
    stage.close(1, len(path.constraints))
    assert stage.ledger.as_dict()["reasons"] == {name: 1 for name in sorted([*said, "repeat", "conflict"])}
    assert [one.text for one in path.constraints] == ["Answer in at most 10 words.", "Be solemn."]
    assert {one["detail"] for one in stage.ledger.dropped if one["reason"] == "conflict"} == {"Answer in at most 10 words. | Answer in at least 20 words."}


def test_one_constraint_is_added_at_a_time_and_stays(tmp_path):
    seen = []
    paths = construct(SEEDS, CLASSES, 5, engine(lambda one: seen.append(one) or writer(one)), Stage(tmp_path))
    for path in paths:
        assert len({one.type for one in path.constraints}) == 5
        texts = [level_messages(path, k)[-1]["content"] for k in range(6)]
        assert all(new == f"{old} {one.text}" for old, new, one in zip(texts, texts[1:], path.constraints))
        asked = [one["messages"][1]["content"].splitlines()[1] for one in seen if one["id"].startswith(path.id)]
        assert asked == texts[:5]
        assert level_messages(path, 3, "system") == [{"role": "system", "content": " ".join(one.text for one in path.constraints[:3])}, {"role": "user", "content": path.instruction}]
    assert read_rows(write_rows(tmp_path / "paths.jsonl", paths), ConstraintPath) == paths


def evaluation(tmp_path):
    "Files of an evaluation that has two instructions of `SEEDS`, a first constraint, and three constraints in another order."
    talk = [{"id": f"t{i}", "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "From afar."}]} for i, text in enumerate((SEEDS[0].text.upper(), SEEDS[1].text))]
    texts = ["Bring in the lantern.", "Bring in the ribbon! Bring in the anchor. Bring in the candle."]
    prompts = [{"id": str(i), "type": "constraints", "text": text, "split": "eval"} for i, text in enumerate(texts)]
    return [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in {"eval": talk, "eval_prompts": prompts}.items()]


def test_what_the_evaluation_has_leaves_before_anything_is_asked(tmp_path):
    texts, seen = {*map(any_order, evaluation_texts(evaluation(tmp_path)))}, []
    one = lambda name, evaluation, n=0: (stage := Stage(tmp_path / name), construct(SEEDS, CLASSES, 5, engine(lambda row: seen.append(row) or writer(row)), stage, tries=9, evaluation=evaluation, n_instructions=n))
    stage, paths = one("apart", texts)
    stage.close(len(SEEDS), sum(len(path.constraints) for path in paths))
    assert {row["id"] for row in stage.ledger.dropped if row["reason"] == "held_out"} >= {"s0", "s1"} and {path.seed_id for path in paths} == {"s2", "s3", "s4", "s5"}
    assert not [row for row in seen if SEEDS[0].text in str(row) or SEEDS[1].text in str(row)]
    texts_of = lambda paths: [any_order(level_messages(path, k, "system")[0]["content"]) for path in paths for k in range(1, len(path.constraints) + 1)]
    assert not texts & {*texts_of(paths)} and texts & {*texts_of(one("together", set())[1])}  # the second finds what was planted
    assert {path.seed_id for path in one("drawn", texts, 4)[1]} == {"s2", "s3", "s4", "s5"} and len(one("two", texts, 2)[1]) == 2


def test_pairs_about_what_the_evaluation_has_are_refused(tmp_path):
    paths, outputs, comparisons = judged(tmp_path)
    folders = {"construct": {"paths": paths}, "outputs": {"outputs": outputs}, "judger": {"comparisons": comparisons}}
    for folder, files in folders.items():
        for name, rows in files.items(): write_rows(tmp_path / folder / f"{name}.jsonl", rows)
    steps = "".join(f'{name}_from = "{tmp_path / name}"\n' for name in folders)
    recipe = f'name = "one"\ndescription = "One step."\n[steps.one]\nnotebook = "constraints/04_pairs.ipynb"\n{steps}evaluation = ["{evaluation(tmp_path)[0]}"]\n'
    done = CliRunner().invoke(app, ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and f"is about {SEEDS[0].text!r}, which the evaluation has" in done.output and "Traceback" not in done.output, done.output


def test_an_engine_that_only_talks_is_one_error(tmp_path):
    with pytest.raises(InputError, match="none of 6 instructions can be used: 18 unreadable") as error: construct(SEEDS, CLASSES, 3, engine(lambda _: "Sure, here is one more."), Stage(tmp_path))
    assert "\n" not in str(error.value)


def test_a_path_without_all_outputs_leaves(tmp_path):
    paths = construct(SEEDS, CLASSES, 2, engine(writer), Stage(tmp_path / "construct"))
    bad = {f"{paths[0].id}/1": {"error": "no response"}, f"{paths[1].id}/0": " "}
    stage = Stage(tmp_path / "outputs")
    outputs = write_outputs(paths, engine(lambda one: bad.get(one["id"], "From afar.")), stage)
    stage.close(len(paths), len({one["path_id"] for one in outputs}))
    assert stage.ledger.as_dict()["reasons"] == {"empty": 1, "engine_error": 1} and len(outputs) == 3 * (len(paths) - 2)


# The Judger

def assert_chain(paths, outputs, comparisons):
    "Each comparison has the winner of the step before, both sides come from the outputs step."
    ids, best = {one["id"] for one in outputs}, {path.id: f"{path.id}/0" for path in paths}
    for row in comparisons:
        assert {row.earlier, row.newer} <= ids and row.earlier == best[row.path_id] and row.newer == f"{row.path_id}/{row.k}"
        if row.winner == "b": best[row.path_id] = row.newer


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "tie", None]), min_size=30, max_size=30))
def test_the_winner_is_carried_forward(tmp_path_factory, verdicts):
    paths, outputs = made(tmp_path_factory.mktemp("run"))
    said, verdicts = {one["id"]: one["text"] for one in outputs}, [*verdicts[:-1], "b"]
    due = iter(verdicts)
    comparisons = reorder(paths, outputs, lambda rows, stage: [{"winner": next(due)} for _ in rows], Stage(tmp_path_factory.mktemp("judger")))
    assert_chain(paths, outputs, comparisons)
    rows = pair_rows(paths, outputs, comparisons, stage := Stage(tmp_path_factory.mktemp("pairs")))
    stage.close(len(comparisons), len(rows))
    by_id, won = {row.newer: row for row in comparisons}, {row.newer: row.newer if row.winner == "b" else row.earlier for row in comparisons}
    for row in rows:
        at = by_id[row["id"]]
        assert {row["chosen"], row["rejected"]} == {said[at.earlier], said[at.newer]} and row["chosen"] == said[won[at.newer]]
        if at.k >= 2: assert said[won[f"{at.path_id}/{at.k - 1}"]] in (row["chosen"], row["rejected"])
    reasons = stage.ledger.as_dict()["reasons"]
    assert reasons.get("tie", 0) == verdicts.count("tie") and reasons.get("undecided", 0) == verdicts.count(None)


def test_checklist_prefers_what_keeps_more_and_what_fits(tmp_path):
    paths, outputs = made(tmp_path)
    comparisons = reorder(paths, outputs, by_checklist(lambda stage: judge), Stage(tmp_path / "judger"))
    assert_chain(paths, outputs, comparisons)
    assert {row.winner for row in comparisons} == {"a", "b", "tie"}
    for row in comparisons:
        a, b = (sum(pair[side] for pair in row.verdicts.values()) for side in (0, 1))
        assert len(row.verdicts) == row.k and row.winner == ("b" if b > a else "a" if a > b else "tie")
    twice = reorder(paths, outputs, by_checklist(lambda stage: judge, margin=2), Stage(tmp_path / "margin"))
    assert sum(row.winner == "tie" for row in twice) > sum(row.winner == "tie" for row in comparisons)
    def misfits(responses, rules):  # what has an even step tells something else
        found = [row.model_copy(update={"rationale": "bad_context: elsewhere" if row.response_id.split("/")[1] in "024" else "good"}) for row in judge(responses, rules)]
        return [row.model_copy(update={"judge": "explanation:stub"}) for row in found]
    fits = reorder(paths, outputs, by_checklist(lambda stage: misfits), Stage(tmp_path / "fits"))
    assert all(row.winner == ("b" if row.newer.endswith(("1", "3", "5")) else "a") for row in fits if (row.earlier[-1] in "024") != (row.newer[-1] in "024"))


@pytest.mark.parametrize("mode", ["checklist", "pair"])
def test_swapping_a_and_b_gives_the_same_winners(tmp_path, mode):
    paths, outputs = made(tmp_path)
    longer = letters(lambda first, second: "A" if len(first) > len(second) else "B" if len(second) > len(first) else "C")
    compare = lambda: by_checklist(lambda stage: judge) if mode == "checklist" else in_both_orders(longer)
    said = {one["id"]: one for one in outputs}
    due = [(path, said[f"{path.id}/{k - 1}"] | {"k": k}, said[f"{path.id}/{k}"]) for path in paths for k in range(1, 6)]
    straight = [row["winner"] for row in compare()(due, Stage(tmp_path / "straight"))]
    turned = [row["winner"] for row in compare()([(path, b, a) for path, a, b in due], Stage(tmp_path / "turned"))]
    assert [{"a": "b", "b": "a"}.get(one, one) for one in turned] == straight and {"a", "b"} <= {*straight}


def test_a_judge_that_always_says_a_gives_ties_and_a_warning(tmp_path):
    paths, outputs = made(tmp_path)
    comparisons = reorder(paths, outputs, in_both_orders(letters(lambda first, second: "A")), Stage(tmp_path / "judger"))
    assert {row.winner for row in comparisons} == {"tie"} and {row.earlier[-2:] for row in comparisons} == {"/0"}
    with pytest.warns(UserWarning, match="POSITION BIAS: the judge chose the first place"): pair_summary([row.model_dump() for row in comparisons])
    numbers = {row["metric"]: row["mean"] for row in judger_numbers(comparisons, paths, outputs) if not row["key"]}
    assert numbers["judger_ties"] == 1 and numbers["order_agreement"] == 0
    with pytest.raises(InputError, match="none of 30 comparisons can be used: 30 tie"): pair_rows(paths, outputs, comparisons, Stage(tmp_path / "pairs"))


@pytest.mark.parametrize("answer", ["Both are good in their way.", "[[A]]", ""])
def test_a_judge_that_answers_otherwise_is_one_clear_line(tmp_path, answer):
    paths, outputs = made(tmp_path)
    talks = engine(lambda _: answer)
    talks.score = lambda requests, labels, progress=None: [{"id": one["id"], "logprobs": [-9.0, -9.0, -9.0], "outside": 1.0} for one in requests]
    for name, compare in {"pair": in_both_orders(talks), "checklist": by_checklist(lambda stage: make_judge(talks, "words", stage=stage))}.items():
        with pytest.raises(InputError, match="none of 30 comparisons is decided") as error: reorder(paths, outputs, compare, Stage(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_server_that_fails_leaves_a_comparison_undecided(tmp_path):
    paths, outputs = made(tmp_path)
    fails = letters(lambda first, second: "A" if len(first) > len(second) else "B")
    whole = fails.score
    fails.score = lambda requests, labels, progress=None: [{"id": one["id"], "error": "timed out"} if f"{paths[0].id}/" in one["id"] else one for one in whole(requests, labels)]
    comparisons = reorder(paths, outputs, in_both_orders(fails), Stage(tmp_path / "judger"))
    assert {row.winner for row in comparisons if row.path_id == paths[0].id} == {None} and {row.winner for row in comparisons if row.path_id == paths[1].id} != {None}


def test_agreement_with_checks_is_counted_where_checks_differ(tmp_path):
    path = ConstraintPath.model_validate(made(tmp_path)[0][0].model_dump())
    rule = rule_from('Mention the word "ink".')
    path = path.model_copy(update={"constraints": [path.constraints[0].model_copy(update={"text": rule.text, "rule": rule})]})
    outputs = [{"id": f"{path.id}/{k}", "path_id": path.id, "k": k, "text": text} for k, text in enumerate(("No word.", "Some ink."))]
    for winner, agrees in (("b", 1.0), ("a", 0.0), ("tie", None)):
        comparisons = reorder([path], outputs, lambda rows, stage: [{"winner": winner}], Stage(tmp_path / winner))
        assert {row["metric"]: row["mean"] for row in judger_numbers(comparisons, [path], outputs)}.get("check_agreement") == agrees


# Pairs

def judged(tmp_path):
    paths, outputs = made(tmp_path)
    return paths, outputs, reorder(paths, outputs, by_checklist(lambda stage: judge), Stage(tmp_path / "judger"))


def test_rpo_asks_the_chosen_response_for_what_it_does(tmp_path):
    paths, outputs, comparisons = judged(tmp_path)
    rows = pair_rows(paths, outputs, comparisons, Stage(tmp_path / "pairs"), how="rpo")
    by_id, turned = {path.id: path for path in paths}, 0
    for row in rows:
        text, (path_id, k) = row["messages"][-1]["content"], row["id"].split("/")
        for one in by_id[path_id].constraints[:int(k)]:
            asks = one.reverse not in text
            assert (one.text.split()[-1][:-1] in row["chosen"]) == asks  # perfect
            turned += not asks
        assert any((one.text.split()[-1][:-1] in row["rejected"]) != (one.reverse not in text) for one in by_id[path_id].constraints[:int(k)])
    assert turned
    bare = [row.model_copy(update={"verdicts": {}}) for row in comparisons]
    with pytest.raises(InputError, match="rpo needs a verdict"): pair_rows(paths, outputs, bare, Stage(tmp_path / "bare"), how="rpo")


def test_refine_mends_one_failed_constraint_and_nothing_else(tmp_path):
    paths, outputs, comparisons = judged(tmp_path)
    said = {one["text"] for one in outputs}
    def mend(request):
        parts = request["messages"][1]["content"]
        word, reply = parts.splitlines()[-1].split()[-1][:-1], parts.split("[Reply]\n")[1].split("\n[")[0]
        return reply if "1 " in reply else f"{word}." if "2 " in reply else f"{reply} {word}"  # unchanged, all else lost, mended
    stage = Stage(tmp_path / "pairs")
    rows = refine_pairs(paths, outputs, comparisons, engine(mend), judge, stage)
    stage.close(len(comparisons), len(rows))
    assert stage.ledger.as_dict()["reasons"]["not_mended"] and rows
    for row in rows:
        assert row["rejected"] in said and row["chosen"].startswith(row["rejected"]) and row["how"] == "refine"
        assert sum(now is not before for now, before in row["verdicts"].values()) == 1


def test_pseudo_pairs_need_no_label(tmp_path):
    "o_k is chosen and o_(k-1) rejected, and nobody is asked; equal texts are no pair, and a Judger's comparisons are refused."
    paths, outputs, comparisons = judged(tmp_path)
    outputs = [row | {"text": outputs[i - 1]["text"]} if row["id"] == f"{paths[0].id}/2" else row for i, row in enumerate(outputs)]
    rows = pair_rows(paths, outputs, reorder(paths, outputs, None, stage := Stage(tmp_path / "pseudo")), stage, how="pseudo")
    stage.close(5 * len(paths), len(rows))
    said = {one["id"]: one["text"] for one in outputs}
    assert [(row["chosen"], row["rejected"]) for row in rows] == [(said[row["id"]], said[f"{row['id'][:-1]}{row['k'] - 1}"]) for row in rows]
    assert stage.ledger.as_dict()["reasons"] == {"tie": 1} and {row["how"] for row in rows} == {"pseudo"} and not any(row["verdicts"] for row in rows)
    with pytest.raises(InputError, match="no Judger"): pair_rows(paths, outputs, comparisons, Stage(tmp_path / "judged"), how="pseudo")
    with pytest.raises(InputError, match="scrambled"): pair_rows(paths, outputs, comparisons, Stage(tmp_path / "unknown"), how="mixed")


def test_scrambled_pairs_are_the_same_pairs_the_wrong_way_round(tmp_path):
    paths, outputs, comparisons = judged(tmp_path)
    rows = pair_rows(paths, outputs, comparisons, Stage(tmp_path / "pairs"))
    turned = pair_rows(paths, outputs, comparisons, Stage(tmp_path / "turned"), how="scrambled")
    assert [[*map(list, row["verdicts"].values())] for row in turned] == [[pair[::-1] for pair in row["verdicts"].values()] for row in rows]
    assert [(row["chosen"], row["rejected"]) for row in turned] == [(row["rejected"], row["chosen"]) for row in rows]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=40), st.integers(1, 4), st.integers(0, 9))
def test_every_order_has_the_same_pairs_and_steps(levels, cut, seed):
    rows = [{"id": str(i), "k": k} for i, k in enumerate(levels)]
    if not min(levels) <= cut < max(levels):
        with pytest.raises(InputError, match="cut"): curriculum(rows, cut, "easy-hard", seed)
        return
    stages = {order: curriculum(rows, cut, order, seed) for order in ORDERS}
    assert all(sorted(row["id"] for part in parts for row in part) == sorted(row["id"] for row in rows) for parts in stages.values())
    assert all(row["k"] <= cut for row in stages["easy-hard"][0]) and all(row["k"] > cut for row in stages["easy-hard"][1])
    assert stages["reversed"] == stages["easy-hard"][::-1] and [*map(len, stages["shuffled"])] == [*map(len, stages["easy-hard"])] and len(stages["single"]) == 1


@pytest.mark.parametrize("place", ["user", "system"])
def test_published_shapes_hold_the_same_pairs(tmp_path, place):
    paths, outputs, comparisons = judged(tmp_path)
    for row in pair_rows(paths, outputs, comparisons, Stage(tmp_path / "pairs"), place):
        own = parse_pair(row)
        assert [one[-1]["content"] for one in own] == [row["chosen"], row["rejected"]] and own[0][0]["role"] == place
        for shape in ("trl", "llama-factory"): assert parse_pair(json.loads(json.dumps(in_shape(row, shape)))) == own


def test_kill_and_resume_give_the_same_bytes(tmp_path):
    calls = itertools.count()

    def chain(folder, say):
        at = lambda name: Stage(tmp_path / folder / name, shard_size=4)
        paths = construct(SEEDS, CLASSES, 4, engine(lambda one: say(writer(one))), at("construct"))
        outputs = write_outputs(paths, engine(lambda one: say(responder(one))), at("outputs"))
        talks = letters(lambda first, second: say("A" if len(first) > len(second) else "B" if len(second) > len(first) else "C"))
        comparisons = reorder(paths, outputs, in_both_orders(talks), at("judger"))
        checked = reorder(paths, outputs, by_checklist(lambda stage: make_judge(engine(lambda one: say(f"Verdict: {'satisfied' if len(one['id']) % 2 else 'violated'}\nEvidence: none\nReason: so.")), "words", stage=stage)), at("checked"))
        mended = refine_pairs(paths, outputs, checked, engine(lambda one: say("From afar with a " + " ".join(WORDS))), judge, at("refine"))
        for name, rows in {"pairs": pair_rows(paths, outputs, comparisons, at("pairs")), "mended": mended}.items(): write_rows(tmp_path / folder / f"{name}.jsonl", rows)

    def dies(text):
        if next(calls) in (9, 40, 60, 90, 130): raise KeyboardInterrupt
        return text
    chain("whole", lambda text: text)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt): chain("cut", dies)
    chain("cut", dies)
    files = lambda name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json*")}
    assert files("cut") == files("whole")


# The notebooks and recipes

@pytest.mark.parametrize("notebook, change, message", [("01_construct", "k = 9\nn_instructions = 2", "9 constraints"), ("03_judger", 'mode = "trio"', "trio"), ("04_pairs", "cut = 5", "cut"),
                                                       ("04_pairs", f'pairs = "pseudo"\njudger_from = "{ROOT}/data/micro-run/judger"', "rest on no Judger")])
def test_what_is_wrong_is_one_line_and_exit_code_2(tmp_path, notebook, change, message):
    recipe = f'name = "one"\ndescription = "One step."\n[steps.one]\nnotebook = "constraints/{notebook}.ipynb"\n{change}\n'
    if notebook != "04_pairs": recipe += 'dtype = "float32"\n'
    done = CliRunner().invoke(app, ["run", str(write_bytes(tmp_path / "one.toml", recipe.encode())), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2, done.output
    assert message in done.output and "Traceback" not in done.output


def test_an_image_part_is_one_line(tmp_path):
    row = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}]}, {"role": "assistant", "content": "A boat."}]}
    path = write_rows(tmp_path / "talk.jsonl", [row])
    done = CliRunner().invoke(app, ["run", "constraints-qlora", "--set", f"model={tiny_model(tmp_path / 'model')}", "--set", f"conversations={path}", "--set", "conversations.on_error=raise", "--out", str(tmp_path / "run")])
    assert done.exit_code == 2 and "talk.jsonl" in done.output and "Traceback" not in done.output


TINY = ["batch_size=16", "conversations.n_conversations=24", "conversations.n_eval_conversations=6", "conversations.max_chars=4000", "instructions.max_chars=300", "construct.n_instructions=20",
        "eval_construct.n_instructions=3", "k=2", "cut=1", "construct.soft_share=0.2", "outputs.max_new_tokens=12", "levels.max_new_tokens=8", "agreement=20",
        "measure.dialogues=2", "measure.turns=2", "measure.max_new_tokens=8", "measure.guard=0", "lora_r=4"]
SPOKEN = [("length", "hard", "Answer in at most 5 words."), ("letter", "hard", 'Do not use the letter "o".'), ("reader", "soft", "Explain it to a tired child."), ("tone", "soft", "Sound like a night porter.")]
FILES = [("self-instruct/seed_tasks.jsonl", "llama"), ("openassistant/en_100_tree.jsonl.gz", "qwen3")]


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", FILES)
def test_public_instructions_and_another_architecture(name, kind, tmp_path):
    "To the report: the second stage starts from the adapter of the first, nothing trained on is in the evaluation, and a judge decides soft constraints."
    if not (SHARED / name).exists(): pytest.skip("no shared data")
    model, out = tiny_model(tmp_path / "model", kind), tmp_path / "run"
    classes = write_json(tmp_path / "classes.json", {"classes": [{"name": name, "kind": kind, "ideas": [{"says": [text], "reverse": "Do the opposite."}]} for name, kind, text in SPOKEN]})
    words = [word for pair in [f"model={model}", f"conversations={SHARED / name}", f"classes={classes}", *TINY] for word in ("--set", pair)]
    done = subprocess.run([str(Path(sys.executable).with_name("s3ft")), "run", "constraints-qlora", "--out", str(out), *words], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (out / "report" / "index.html").exists()
    kept = {name: value for name, value in read_json(out / "train-no-judger" / "training.json")["settings"].items() if name not in ("save_steps", "report_to")}
    rows, adapter = read_rows(out / "no_judger_pairs" / "easy-hard-2.jsonl"), out / "no_judger_first" / "adapter"
    claim = lambda start: stable_id(model_hash(model), rows_hash(rows), PairSettings(**kept).model_dump(exclude={"save_steps", "report_to"}), *map(model_hash, start), n=24)
    assert read_json(out / "train-no-judger" / "training.json")["claim"] == claim([adapter]) != claim([])
    texts = {*map(any_order, evaluation_texts([out / "eval_construct" / "eval.jsonl", ROOT / "data/constraints/eval.jsonl", out / "conversations" / "eval.jsonl"]))}
    trained = [one["content"] for path in read_rows(out / "construct" / "paths.jsonl", ConstraintPath) for k in (1, 2) for one in level_messages(path, k, "system")]
    assert texts and trained and texts.isdisjoint(map(any_order, trained))
    for folder, rules in (("levels/played", "rules.jsonl"), ("measure", "rules.jsonl")):
        soft, verdicts = {row["id"] for row in read_rows(out / folder / rules) if row["how"] == "judge"}, read_rows(out / folder / "verdicts.jsonl")
        judged = [row["judge"] for row in verdicts if row["rule_id"] in soft]  # of the dialogues that are played
        assert judged and all(name.startswith("letters:") for name in judged)
        assert {row["metric"] for row in read_rows(out / folder / "numbers.jsonl") if row["part"] == "judge"} >= {"undecided"}
    swapped = [row for row in read_rows(out / "levels" / "numbers.jsonl") if row["part"] == "swapped"]
    assert {row["metric"] for row in swapped} >= {"judger_ties", "judger_undecided", "order_agreement"}
