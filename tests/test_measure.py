"Measuring: arms, edited rules, records, sheets, and the command from end to end."
import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import papermill
import pytest
from fastcore.docments import docments
from test_rules import SPLIT
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import InputError, model_folder, read_json, read_rows, write_rows
from s3ft_nb.core.records import Check, Rule, SystemPrompt
from s3ft_nb.core.stage import Stage
from s3ft_nb.judging.judge import Judgement, judge_planted, verdict_of
from s3ft_nb.judging.ifeval import can_detect_language
from s3ft_nb.judging.rules import rules_finder
from s3ft_nb.measure.arms import make_arm, make_fit, read_arm
from s3ft_nb.measure.benchmarks import guard_numbers, guard_responses
from s3ft_nb.measure.config import make_config, options
from s3ft_nb.measure.dialogues import change_system, compose, pair_scripts, user_blocks
from s3ft_nb.measure.measure import Arm, measure, measure_arms, prepare
from s3ft_nb.measure.metrics import compare_folders
from s3ft_nb.report.page import measurement_section, write_report

ROOT = Path(__file__).parents[1]
PIRATE = SystemPrompt(id="pirate", type="persona", text="Talk like a pirate {and} use at most 3 words.")
RULES = [Rule(id="p1", type="persona", how="judge", text="Talk like a pirate.", system_prompt_id="pirate"),
         Rule(id="p2", type="length", how="check", check=Check(kind="max_words", params={"n": 3}), text="At most 3 words.", system_prompt_id="pirate")]
SIZE = lambda messages: sum(len(one["content"].split()) for one in messages)


class Sailor:
    "Follows its system prompt for `good` turns, or when it is reminded."
    name = "sailor"

    def __init__(self, good=2): self.good, self.calls, self.seen = good, 0, []

    def generate(self, requests, seed=0, progress=None):
        self.calls += 1
        self.seen += requests
        aye = lambda one: one.get("turn", 1) <= self.good or "Keep to your instructions" in one["messages"][-1]["content"]
        return [{"id": one["id"], "text": "Arr, aye." if aye(one) else "It is what it is indeed.", "tokens": 3, "finish": "stop"} for one in requests]


def hears(responses, rules):
    known = lambda one: one.id.endswith("good") if one.arm == "planted" else "arr" in one.response.lower()
    return [verdict_of(one, rule, Judgement(known(one)), "ears") for one in responses for rule in rules_finder(rules)(one)]


hears.name = "ears"


def plays(n=3, n_turns=4):
    return pair_scripts(compose(user_blocks(), n, n_turns, 0), [PIRATE], n, n_turns)


def play(folder, arms, rows=None, rules=RULES, judge=hears, **more):
    arms = {name: Arm(lambda engine=engine: engine) for name, engine in arms.items()}
    return measure_arms(arms, rows or plays(), rules, Stage(folder), judge, ("own",), known=judge_planted(judge, "en"), **more)


def test_an_arm_that_shows_more_is_cut_earlier(tmp_path):
    arm = make_arm(read_arm("few_shot:1"), Sailor(), examples={PIRATE.text: [{"user": "a " * 20, "assistant": "b " * 20}]})
    fit = lambda engine: make_fit(SIZE, 120, render=getattr(engine, "change", lambda messages: messages))
    assert play(tmp_path, {"base": Sailor(), "few_shot-1": arm}, plays(1, 6), fit=fit)["complete"]
    base, shots = (read_rows(tmp_path / f"responses-{name}.jsonl") for name in ("base", "few_shot-1"))
    assert len(shots[-1]["prompt"]) < len(base[-1]["prompt"])
    assert max(SIZE(one["messages"]) for one in arm.engine.seen) <= 120


def test_edited_rules_are_judged_anew_and_a_new_arm_is_played_alone(tmp_path):
    rows, base = plays(), Sailor()
    first = play(tmp_path, {"base": base}, rows)
    assert base.calls == 4
    edited = [RULES[0], RULES[1].model_copy(update={"check": Check(kind="max_words", params={"n": 9})})]
    base, again = Sailor(), Sailor()
    play(tmp_path, {"base": base, "repeat": make_arm(read_arm("repeat"), again)}, rows, edited)
    assert (base.calls, again.calls) == (0, 4)
    kept = Counter((row["arm"], row["rule_id"], row["satisfied"]) for row in read_rows(tmp_path / "verdicts.jsonl"))
    assert kept["base", "p2", True] == 12 and kept["base", "p1", True] == 6 and kept["repeat", "p1", True] == 12
    with pytest.raises(InputError, match="with other temperature"): play(tmp_path, {"base": Sailor()}, rows, settings={"temperature": 1})
    with pytest.raises(InputError, match="with other dialogues"): play(tmp_path, {"base": Sailor()}, rows[1:])
    assert first["settings"] == read_json(tmp_path / "measure.json")["settings"]
    found = {(row["arm"], row["against"]): row for row in read_rows(tmp_path / "numbers.jsonl") if (row["metric"], row["part"]) == ("adherence", "all")}
    assert found["base", ""]["mean"] == 0.5 and found["repeat", "base"]["mean"] == 0.5 and found["repeat", "base"]["p"] is not None


def test_a_system_prompt_replaced_mid_conversation_brings_its_own_rules(tmp_path):
    rows = [change_system(row, 3, SystemPrompt(id="shout", type="case", text="Shout.")) for row in plays(2, 4)]
    rules = [*RULES, Rule(id="s1", type="case", how="check", check=Check(kind="uppercase"), text="Shout.", system_prompt_id="shout")]
    play(tmp_path, {"base": Sailor()}, rows, rules)
    due = {(row["turn"], row["rule_id"]) for row in read_rows(tmp_path / "verdicts.jsonl")}
    assert due == {(1, "p1"), (1, "p2"), (2, "p1"), (2, "p2"), (3, "s1"), (4, "s1")}
    assert {row["system_prompt"] for row in read_rows(tmp_path / "responses-base.jsonl") if row["turn"] > 2} == {"Shout."}
    with pytest.raises(InputError, match="shout has no rules"): play(tmp_path / "x", {"base": Sailor()}, rows)


def test_the_guard_sees_a_model_that_began_to_refuse(tmp_path):
    class Refuser(Sailor):
        def generate(self, requests, seed=0, progress=None): return [{"id": one["id"], "text": "I'm sorry, but I can't help with that.", "finish": "stop"} for one in requests]

    users = [f"Question {i}?" for i in range(12)]
    before, after = (guard_responses(engine, users, Stage(tmp_path / name)) for name, engine in (("a", Sailor(9)), ("b", Refuser())))
    found = {(row["metric"], row["against"]): row["mean"] for row in guard_numbers("new", before, after) if row["arm"] == "new"}
    assert found["plain_refusals", "base"] == 1


def judge_that(name, says):
    def judge(responses, rules): return [verdict_of(one, rule, says(one), name) for one in responses for rule in rules_finder(rules)(one)]
    judge.name = name
    return judge


def test_a_judge_that_knows_nothing_makes_no_headline(tmp_path):
    about = play(tmp_path, {"base": Sailor(), "repeat": make_arm(read_arm("repeat"), Sailor())}, judge=judge_that("yes", lambda one: Judgement(True)))
    rows = read_rows(tmp_path / "numbers.jsonl")
    whole = {(row["arm"], row["metric"]): row["mean"] for row in rows if row["part"] == "all" and not row["against"]}
    assert not about["judge_trusted"] and "The judge yes is not trusted: its kappa with known verdicts is 0." in about["warnings"][0]
    assert whole["base", "adherence"] == 0.5 and whole["base", "verdicts"] == whole["base", "verdicts_unsettled"] == 12  # of p2, and of p1
    assert {row["key"] for row in rows if row["part"] == "rule"} == {"p2"} and {row["key"]: row["mean"] for row in rows if row["part"] == "unsettled"} == {"p1": 1.0}
    section = measurement_section(tmp_path)
    assert section["headline"].startswith("base keeps the 1 of 2 rules that a program checks in 50") and section["notes"][0] == about["warnings"][0]
    assert [table["title"] for table in section["parts"][-1]["tables"] if "untrusted" in table["title"]] and len(read_rows(tmp_path / "verdicts.jsonl")) == 48
    for name in "bc": play(tmp_path / name, {"base": Sailor()}, rules=RULES[:1], judge=judge_that("yes", lambda one: Judgement(True)))
    with pytest.raises(InputError, match="no verdicts with own"): compare_folders([tmp_path / "b", tmp_path / "c"])


@pytest.mark.parametrize("rules", [RULES, RULES[:1]])
def test_unreadable_verdicts_still_get_a_page(tmp_path, rules):
    about = play(tmp_path, {"base": Sailor(), "repeat": make_arm(read_arm("repeat"), Sailor())}, rules=rules, judge=judge_that("mute", lambda one: Judgement(rationale="unreadable")))
    assert not about["judge_trusted"] and "could be compared" in about["warnings"][0]
    section, page = measurement_section(tmp_path), write_report([tmp_path], tmp_path / "report", "Measurement")
    assert page.is_file() and section["headline"].startswith("base keeps the 1 of 2" if len(rules) > 1 else "No rule is settled")


def test_an_arm_without_a_decided_turn_is_no_end(tmp_path):
    known = lambda one: Judgement(one.id.endswith("good")) if one.arm == "planted" else Judgement(True if one.arm == "base" else None)
    about = play(tmp_path, {"base": Sailor(), "repeat": make_arm(read_arm("repeat"), Sailor())}, rules=RULES[:1], judge=judge_that("shy", known))
    assert about["judge_trusted"] and not [row for row in read_rows(tmp_path / "numbers.jsonl") if row["against"]]


def test_every_option_has_help_and_the_notebook_has_every_option():
    for name, group in options().items(): assert docments(group)[name], name
    named = papermill.inspect_notebook(str(ROOT / "nbs/chain/shared/measure.ipynb"))
    assert set(options()) == set(named) - {"main"}
    for name, group in options().items():
        if name not in ("out", "system_prompt"): assert named[name]["help"] == docments(group)[name], name


# ---- Records and sheets

PROMPTS = [f"Answer in at most {n} words. {extra}" for n in (3, 6, 9) for extra in ("", "Never use commas.", "End with \"matey\".", "Write in lower case.")]


def record(n, n_turns=3):
    say = lambda i, t: ["Aye, that is so.", "fine matey", "It is what it is, and nothing else, I say.", "ok"][(i + t) % 4]
    return [{"id": f"r{i}", "model": ["small", "org/large"][i % 2], "messages": [
        {"role": "system", "content": PROMPTS[i % 12]},
        *[one for t in range(n_turns) for one in ({"role": "user", "content": f"Question {t} of {i}?"}, {"role": "assistant", "content": say(i, t)})]]} for i in range(n)]


def test_two_hundred_recorded_conversations_under_twelve_prompts(tmp_path):
    rows = record(200)
    odd = [{"id": "bare", "messages": rows[0]["messages"][1:]}, {"id": "robot", "messages": [*rows[1]["messages"], {"role": "robot", "content": "Beep."}]},
           {"id": "tool", "messages": [*rows[2]["messages"], {"role": "tool", "content": "42"}]},
           {"id": "silent", "messages": rows[3]["messages"][:2]}, {"id": "open", "messages": [*rows[4]["messages"][:-1], {"role": "assistant", "content": "Other."}, {"role": "user", "content": "And?"}]}]
    about = measure(make_config(tmp_path / "out", recorded=write_rows(tmp_path / "record.jsonl", [*rows, *odd])))
    ledger, found = read_json(tmp_path / "out" / "ledger.json"), read_rows(tmp_path / "out" / "numbers.jsonl")
    assert about["complete"] and about["judge"] == "checks" and ledger["rows_out"] == 201 and ledger["reasons"]["no_system_prompt"] == 1
    assert {one["id"] for one in ledger["dropped"]} == {"bare", "robot", "tool", "silent"}, ledger["dropped"]
    assert {row["arm"] for row in found} >= {"small", "org-large"} and {row["history"] for row in found} == {"recorded"}
    assert len({row["key"] for row in found if row["part"] == "prompt"}) == 12
    responses = read_rows(tmp_path / "out" / "responses-small.jsonl")
    assert len(responses) == 300 + 3 and {row["model"] for row in responses} == {"small"} or "responses-record.jsonl"
    again = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    measure(make_config(tmp_path / "out", recorded=tmp_path / "record.jsonl"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")} == again


@pytest.mark.slow
def test_ten_thousand_recorded_conversations_take_three_minutes_and_little_memory(tmp_path):
    path, began = write_rows(tmp_path / "record.jsonl", record(10_000, 5)), time.monotonic()
    measure(make_config(tmp_path / "out", recorded=path))
    assert time.monotonic() - began < 180
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2_000_000  # kilobytes


def test_recorded_responses_score_as_they_did_when_they_were_played(tmp_path):
    "One set of responses, judged when it was played and judged from a record, gives the same numbers."
    rules = [rule.model_copy(update={"system_prompt_id": ""}) for rule in RULES[1:]]
    measure_arms({"base": Arm(Sailor)}, plays(4, 5), rules, Stage(tmp_path / "played"), None, ("own",))
    talks = {}
    for row in read_rows(tmp_path / "played" / "responses-base.jsonl"):
        talks[row["dialogue_id"]] = [{"role": "system", "content": row["system_prompt"]}, *row["prompt"], {"role": "assistant", "content": row["response"]}]
    path = write_rows(tmp_path / "base.jsonl", [{"id": id, "messages": messages} for id, messages in talks.items()])
    measure(make_config(tmp_path / "recorded", recorded=path, rules=write_rows(tmp_path / "rules.jsonl", rules)))
    numbers = lambda name: {(row["part"], row["key"] if row["part"] != "prompt" else "", row["metric"]): (row["mean"], row["low"], row["high"], row["n"])
                            for row in read_rows(tmp_path / name / "numbers.jsonl") if row["part"] not in ("stance", "history")}
    played, recorded = numbers("played"), numbers("recorded")
    shared = played.keys() & recorded.keys()
    assert len(shared) > 30 and {key: played[key] for key in shared} == {key: recorded[key] for key in shared}


SESSIONS = {"s1": "11 10 11", "s2": "11 11 11", "s3": "11 1? 10", "s4": "11 ?0 11"}  # per round: format, role
CELLS = [(s, t, c, mark) for s, rounds in SESSIONS.items() for t, marks in enumerate(rounds.split(), 1) for c, mark in zip(("format", "role"), marks)]


def sheet_of(form, path):
    "The sessions as a verdict sheet: JSON Lines, CSV, or SysBench's `_eval.json`."
    words = {"1": "yes", "0": "no", "?": ""}
    if form == "jsonl": return write_rows(path / "sheet.jsonl", [{"session_id": s, "round": t, "constraint_id": c, "constraint_type": c, "followed": {"1": 1, "0": 0, "?": None}[mark]} for s, t, c, mark in CELLS])
    if form == "csv":
        (path / "sheet.csv").write_text("dialog_id;turn_index;criterion;category;verdict\n" + "".join(f"{s};{t};{c};{c};{words[mark]}\n" for s, t, c, mark in CELLS))
        return path / "sheet.csv"
    rows = [{"system_id": s, "messages": [{"role": role, "content": f"{role} {t}"} for t in (1, 2, 3) for role in ("user", "assistant")],
             "eval_results": {f"user {t}": {"评判结果": {c: {"1": "是", "0": "否", "?": "?"}[mark] for c, mark in zip("12", marks)}, "criteria": {"1": {"criteria_type": "format"}, "2": {"criteria_type": "role"}}}
                              for t, marks in enumerate(rounds.split(), 1)}} for s, rounds in SESSIONS.items()]
    (path / "sheet_eval.json").write_text(json.dumps(rows, ensure_ascii=False))
    return path / "sheet_eval.json"


@pytest.mark.parametrize("form", ["jsonl", "csv", "sysbench"])
def test_sheets_of_verdicts_give_csr_isr_and_ssr(tmp_path, form):
    "An undecided cell leaves CSR; its turn fails with another violation (s4), else leaves ISR and ends what SSR and survival see (s3)."
    told = s3ft("compare", sheet_of(form, tmp_path), "--out", tmp_path / "out")
    assert told.exit_code == 0 and (tmp_path / "out" / "report" / "index.html").exists(), told.stderr
    found = {(row["part"], row["key"], row["metric"]): row["mean"] for row in read_rows(tmp_path / "out" / "numbers.jsonl")}
    expected = {("all", "", "csr"): 19 / 22, ("all", "", "adherence"): 8 / 11, ("all", "", "ssr"): (1 / 3 + 1 + 1 / 3) / 3, ("all", "", "verdicts_undecided"): 2,
                ("type", "format", "csr"): 1, ("type", "role", "csr"): 8 / 11, ("type", "format", "adherence"): 1, ("type", "role", "adherence"): 8 / 11, ("type", "role", "ssr"): 5 / 9,
                ("turn", "1", "adherence"): 1, ("turn", "2", "adherence"): 1 / 3, ("turn", "3", "adherence"): 3 / 4, ("turn", "2", "csr"): 4 / 6,
                ("turn", "1", "survival"): 1, ("turn", "2", "survival"): 1 / 3, ("turn", "3", "survival"): 1 / 3}
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_two_sheets_of_the_same_conversations_are_compared(tmp_path):
    first, second = sheet_of("jsonl", tmp_path), tmp_path / "other.jsonl"
    write_rows(second, [row | {"followed": 0} for row in read_rows(first)])
    told = s3ft("compare", first, second, "--out", tmp_path / "out")
    assert told.exit_code == 0 and "other minus sheet" in told.stdout, told.stderr
    row = next(row for row in read_rows(tmp_path / "out" / "numbers.jsonl") if row["against"] and (row["part"], row["metric"]) == ("all", "adherence"))
    assert row["mean"] == pytest.approx(-8 / 11)  # on the eleven turns that both decide


# ---- The command

def s3ft(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


SMALL = ("--dialogues", 3, "--turns", 3, "--arms", "base,remind:2")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "A small measurement of the micro base."
    folder = tmp_path_factory.mktemp("measure")
    (folder / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words.")
    return folder, s3ft("measure", "--system-prompt", folder / "sea.txt", "--out", folder / "run", *SMALL)


def test_measure_from_end_to_end(measured):
    folder, told = measured
    assert told.exit_code == 0, told.stderr
    names = {path.name for path in (folder / "run").iterdir()}
    assert names >= {"measure.json", "rules.jsonl", "dialogues.jsonl", "responses-base.jsonl", "responses-remind-2.jsonl", "verdicts.jsonl", "numbers.jsonl", "ledger.json", "usage.json", "report"}
    verdicts, responses, about = read_rows(folder / "run" / "verdicts.jsonl"), read_rows(folder / "run" / "responses-base.jsonl"), read_json(folder / "run" / "measure.json")
    assert len(responses) == 3 * 3 * 2 and {row["judge"] for row in verdicts} == {"checks", "discriminator:micro-base"}
    assert {row["response_id"] for row in verdicts} >= {row["id"] for row in responses}
    assert about["complete"] and set(about["options"]) == set(options()) - {"out", "fresh"} and "same family" in about["warnings"][-1]
    assert " threads" in about["machine"] and about["dtype"] in ("float32", "bfloat16")
    page = (folder / "run" / "report" / "index.html").read_text()
    assert about["machine"] in page and "run.dtype" in page
    assert {row["metric"] for row in read_rows(folder / "run" / "numbers.jsonl") if row["part"] == "judge"} >= {"kappa", "undecided"}
    assert read_json(folder / "run" / "usage.json")["generated"] > 0


def test_measuring_again_changes_nothing_and_other_settings_are_refused(measured):
    folder, _ = measured
    before = {path.name: path.read_bytes() for path in (folder / "run").glob("*.json*")}
    words = ["measure", "--system-prompt", folder / "sea.txt", "--out", folder / "run", *SMALL]
    assert s3ft(*words).exit_code == 0
    assert {path.name: path.read_bytes() for path in (folder / "run").glob("*.json*")} == before
    refused = s3ft(*words, "--temperature", 1.0)
    assert refused.exit_code == 2 and "holds a measurement with other temperature" in refused.stderr and refused.stderr.count("\n") == 1


def test_the_step_of_a_recipe_and_the_command_find_the_same_numbers(measured):
    "The notebook that recipes run, and `s3ft measure`: every number is the same."
    folder, _ = measured
    chosen = {"out": str(folder / "step"), "system_prompt": str(folder / "sea.txt"), "dialogues": 3, "turns": 3, "arms": ["base", "remind:2"]}
    papermill.execute_notebook(str(ROOT / "nbs/chain/shared/measure.ipynb"), str(folder / "step.ipynb"), chosen, progress_bar=False)
    for name in ("numbers.jsonl", "verdicts.jsonl", "usage.json", "measure.json"): assert (folder / "step" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    assert (folder / "step" / "section.json").exists()


def test_json_for_programs(measured, tmp_path):
    folder, _ = measured
    told = s3ft("measure", "--system-prompt", folder / "sea.txt", "--out", folder / "run", *SMALL, "--json")
    found = json.loads(told.stdout)
    assert found["headline"] == measurement_section(folder / "run")["headline"] and Path(found["report"]).is_file()
    assert {(row["arm"], row["metric"]) for row in found["numbers"]} >= {("base", "adherence"), ("remind-2", "csr")}
    shutil.copytree(folder / "run", tmp_path / "other")
    told = s3ft("compare", folder / "run", tmp_path / "other", "--out", tmp_path / "both", "--json")
    found = json.loads(told.stdout)
    assert [row["mean"] for row in found["numbers"] if row["against"] and row["metric"] == "csr"][-1] == 0 and found["folder"] == str(tmp_path / "both")


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_file_whose_name_is_not_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/s\xe9a.txt"
    with open(path, "w") as file: file.write("Answer in at most 9 words.")
    told = s3ft("measure", "--system-prompt", os.fsdecode(path), "--rules-only", "--out", tmp_path / "out")
    assert told.exit_code == 0 and "max_words" in told.stdout, told.stderr


BAD = [
    ([], "no system prompt"),
    (["--system-prompt", "none.txt"], "none.txt: no such file"),
    (["--system-prompt", "sea.txt", "--arms", "base,base"], "named twice"),
    (["--system-prompt", "sea.txt", "--arms", "remind:0"], "is no arm"),
    (["--system-prompt", "sea.txt", "--histories", "mine"], "unknown history 'mine'"),
    (["--system-prompt", "sea.txt", "--user-turns", "weekend"], "unknown set of user turns in en 'weekend'"),
    (["--system-prompt", "sea.txt", "--conflicting", "1.5"], "sum to at most 1"),
    (["--system-prompt", "sea.txt", "--model", "./none"], "none"),
    (["--system-prompt", "sea.txt", "--engine", "oracle"], "unknown engine 'oracle'"),
    (["--system-prompt", "sea.txt", "--max-new-tokens", "5000"], "do not fit a model of 1024"),
    (["--system-prompt", "empty.txt"], "is empty"),
    (["--system-prompt", "sea.txt", "--user", "grumpy"], "unknown persona 'grumpy'"),
    (["--system-prompt", "sea.txt", "--judge-way", "gut", "--rules", "rules.jsonl"], "unknown way 'gut'"),
    (["--system-prompt", "sea.txt", "--adapter", "a=x", "--adapter", "a=y"], "named twice"),
    (["--recorded", "bare.jsonl"], "no conversation has a system prompt"),
]


@pytest.mark.parametrize("words, line", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea.txt").write_text("From now on you are a pirate.")
    (tmp_path / "empty.txt").write_text("\n")
    write_rows(tmp_path / "rules.jsonl", [{"text": "Be shy.", "how": "judge"}])
    write_rows(tmp_path / "bare.jsonl", [{"messages": record(1)[0]["messages"][1:]}])
    refused = s3ft("measure", *words, "--dialogues", 2, "--turns", 2)
    assert refused.exit_code == 2 and line in refused.stderr, refused.stderr
    assert len([one for one in refused.stderr.splitlines() if one.startswith("s3ft: ")]) == 1 and not list(tmp_path.glob("runs/*/responses*"))


def test_rules_only_writes_a_file_that_is_used(tmp_path):
    (tmp_path / "shy.md").write_text("Be considerate.\n\n- Never use the word \"great\".\n")
    shown = s3ft("measure", "--system-prompt", tmp_path / "shy.md", "--rules-only", "--out", tmp_path / "out")
    assert shown.exit_code == 0 and "check" in shown.stdout and "judge" in shown.stdout
    path = tmp_path / "out" / "rules.jsonl"
    path.write_text(path.read_text().splitlines()[-1] + "\n")
    assert [rule.how for rule in prepare(make_config(tmp_path / "out", system_prompt=tmp_path / "shy.md", turns=2, dialogues=2)).rules] == ["check"]


CHECKABLE = {"bank": 3, "api": 4, "pirate": 3, "chinese": 4, "long": 5}  # Rules that a careful reader would give a program


@pytest.mark.parametrize("name", CHECKABLE)
def test_the_verb_splits_prompts_of_all_sorts(tmp_path, name):
    text, wanted = SPLIT[name]
    if not can_detect_language() and "language" in str(wanted): pytest.skip("langdetect is not installed")
    (tmp_path / "prompt.txt").write_text(text)
    told = s3ft("measure", "--system-prompt", tmp_path / "prompt.txt", "--rules-only", "--json", "--out", tmp_path / "out")
    rules = json.loads(told.stdout)
    assert len(rules) == len(wanted) and all(rule["text"].startswith(begins) for rule, (begins, *_) in zip(rules, wanted))
    assert 2 * sum(rule["how"] == "check" for rule in rules) >= CHECKABLE[name]


def test_the_headline_of_a_bank_bot_rests_on_checked_rules(tmp_path):
    (tmp_path / "bank.txt").write_text(SPLIT["bank"][0])
    told = s3ft("measure", "--system-prompt", tmp_path / "bank.txt", "--out", tmp_path / "out", "--dialogues", 2, "--turns", 2, "--arms", "base", "--histories", "own", "--guard", 0, "--agreement", 4)
    assert told.exit_code == 0 and told.stdout.startswith("base keeps the 2 of 7 rules that a program checks"), told.output
    assert "is not trusted on planted responses" in told.stderr and "warning: The judge discriminator:micro-base is not trusted" in told.stdout
    rows = read_rows(tmp_path / "out" / "numbers.jsonl")
    assert len({row["key"] for row in rows if row["part"] == "rule"}) == 2 and len({row["key"] for row in rows if row["part"] == "unsettled"}) == 5


def test_a_prompt_that_the_model_cannot_hold_is_said_to_be_too_long(tmp_path):
    (tmp_path / "long.txt").write_text("Answer in at most six words. " + "The shop sells pens of many sorts and colours. " * 300)
    told = s3ft("measure", "--system-prompt", tmp_path / "long.txt", "--out", tmp_path / "out", "--dialogues", 2, "--turns", 2, "--arms", "base", "--histories", "own", "--guard", 0, "--agreement", 0)
    assert told.exit_code == 2 and "no arm could respond: base, own history: 4 message_too_long" in told.stderr, told.output


def test_best_of_is_chosen_by_the_rules(tmp_path):
    (tmp_path / "sea.txt").write_text("Talk gently to the user. Answer in at most 6 words.")
    about = measure(make_config(tmp_path / "out", system_prompt=tmp_path / "sea.txt", dialogues=2, turns=2, arms="base,best_of:2", histories="own"))
    assert "best of 2 by discriminator" in about["arms"]["best_of-2"]["engine"]


@pytest.mark.slow
def test_twelve_turns_take_three_minutes_at_most(tmp_path):
    (tmp_path / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words.")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "measure", "--model", "micro-base", "--system-prompt", str(tmp_path / "sea.txt"), "--turns", "12", "--out", str(tmp_path / "out")])
    assert done.returncode == 0 and time.monotonic() - began <= 180


@pytest.mark.slow
def test_a_killed_measurement_resumes_with_the_same_bytes(tmp_path):
    (tmp_path / "sea.txt").write_text("From now on you are a pirate.")
    run = lambda name, **more: subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "measure", "--system-prompt", str(tmp_path / "sea.txt"), "--turns", "24",
                                               "--dialogues", "2", "--arms", "base,repeat", "--out", str(tmp_path / name)], capture_output=True, **more)
    assert run("whole").returncode == 0
    for seconds in (12, 18):
        try: run("killed", timeout=seconds)  # ends with SIGKILL
        except subprocess.TimeoutExpired: pass
    assert run("killed").returncode == 0
    for name in ("measure.json", "ledger.json", "usage.json", "dialogues.jsonl", "responses-base.jsonl", "responses-repeat.jsonl", "verdicts.jsonl", "numbers.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture
def server(tmp_path):
    "A real OpenAI-compatible server with the micro base."
    if not importlib.util.find_spec("fastapi"): pytest.skip("transformers serve needs fastapi and uvicorn")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", model_folder("micro-base"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with (tmp_path / "serve.log").open("w") as log: process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2); break
            except OSError: time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.slow
def test_a_real_server_is_measured(server, tmp_path):
    (tmp_path / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words.")
    told = s3ft("measure", "--engine", "http", "--base-url", server, "--model", model_folder("micro-base"), "--tokenizer", "micro-base", "--system-prompt", tmp_path / "sea.txt",
                "--dialogues", 3, "--turns", 4, "--arms", "base,repeat", "--out", tmp_path / "out")
    assert told.exit_code == 0, told.stderr
    responses = read_rows(tmp_path / "out" / "responses-base.jsonl")
    assert len(responses) == 3 * 4 * 2 and sum("Arr" in row["response"] or "Ahoy" in row["response"] for row in responses) > 0
    assert json.loads((tmp_path / "out" / "measure.json").read_text())["arms"]["base"].endswith(server.split("/")[2])
