"Measuring: long dialogues that are stopped, arms, edited rules, and the verbs from end to end."
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest
from typer.testing import CliRunner

from s3ft_nb.run.setup import Study, Wish, guard_adapters, prepare_measure, run_measure
from s3ft_nb.cli import app
from s3ft_nb.core.stage import Ledger
from s3ft_nb.core.records import Check, SystemPrompt
from s3ft_nb.core.files import InputError, read_json, read_rows, write_rows
from s3ft_nb.measure.arms import make_arm, read_arm, remind
from s3ft_nb.measure.measure import measure
from s3ft_nb.measure.dialogues import STANCES, change_system, compose, empty_scripts, simulated_user, under, user_blocks
from s3ft_nb.measure.rollout import rollout
from s3ft_nb.core.records import Rule
from s3ft_nb.judging.judge import Judgement, verdict_of
from s3ft_nb.judging.rules import rules_for

PIRATE = SystemPrompt(id="pirate", type="persona", text="Talk like a pirate {and} use at most 3 words.")
RULES = [Rule(id="p1", type="persona", how="judge", text="Talk like a pirate.", system_prompt_id="pirate"),
         Rule(id="p2", type="length", how="check", check=Check(kind="max_words", params={"n": 3}), text="At most 3 words.", system_prompt_id="pirate")]
SIZE = lambda messages: sum(len(one["content"].split()) for one in messages)


class Sailor:
    "Obeys for `good` turns or when told again; stops the process it runs in after `stop` calls."
    name = "sailor"

    def __init__(self, good=2, stop=10**9): self.good, self.stop, self.calls, self.seen = good, stop, 0, []

    def generate(self, requests, seed=0, progress=None):
        if self.calls == self.stop: raise KeyboardInterrupt
        self.calls += 1
        self.seen += requests
        aye = lambda one: one.get("turn", 1) <= self.good or "Keep to your instructions" in one["messages"][-1]["content"]
        return [{"id": one["id"], "text": "Arr, aye." if aye(one) else "It is what it is indeed.", "tokens": 3, "finish": "stop"} for one in requests]


def hears(replies, rules):
    return [verdict_of(reply, rule, Judgement("arr" in reply.response.lower()), "ears") for reply in replies for rule in rules_for(reply, rules)]


def plays(n=3, n_turns=4, **more):
    return under(compose(user_blocks(), n, n_turns, 0, **more), [PIRATE], n, n_turns)


def test_sixty_turns_survive_being_stopped_and_no_turn_is_played_twice(tmp_path):
    rows, whole, calls = plays(3, 60), Sailor(), 0
    expected = rollout(whole, rows, "base", folder=tmp_path / "whole")
    for stop in (7, 7, 20, 10**9):
        engine = Sailor(stop=stop)
        try: found = rollout(engine, rows, "base", folder=tmp_path / "stopped")
        except KeyboardInterrupt: assert list((tmp_path / "stopped").glob("turn-*"))
        calls += engine.calls
    assert found == expected and calls == whole.calls == 60
    assert not list((tmp_path / "stopped").glob("turn-*"))
    assert len(found[59].prompt) == 2 * 60 - 1


def test_turns_of_another_rollout_are_not_taken_for_its_own(tmp_path):
    rows = plays(2, 5)
    with pytest.raises(KeyboardInterrupt): rollout(Sailor(stop=3), rows, "base", folder=tmp_path)
    for path in tmp_path.glob("shards.json"): path.unlink()
    engine = Sailor()
    assert rollout(engine, rows, "base", seed=1, folder=tmp_path)[0].seed != rollout(Sailor(), rows, "base", folder=tmp_path / "other")[0].seed
    assert engine.calls == 5


@pytest.mark.parametrize("history", ["own", "original"])
def test_overflow_is_cut_or_stops_and_is_in_the_books(tmp_path, history):
    rows = [row | {"turns": [{"user": f"word {i}", "stance": "neutral", "original": "so it is"} for i in range(8)]} for row in plays(2, 8)]
    cut, stop = Ledger("cut"), Ledger("stop")
    limits = {"history": history, "max_prompt_tokens": 30, "count_tokens": SIZE}
    whole = rollout(Sailor(0), rows, "base", folder=tmp_path / "cut", ledger=cut, **limits)
    short = rollout(Sailor(0), rows, "base", folder=tmp_path / "stop", ledger=stop, overflow="stop", **limits)
    assert len(whole) == 16 and cut.as_dict()["notes"]["prompts_shortened"] > 0 and not cut.dropped
    assert 0 < len(short) < 16 and stop.as_dict()["reasons"] == {"context_full": 16 - len(short)}
    assert {reply.id: reply.turn for reply in short}.items() <= {reply.id: reply.turn for reply in whole}.items()
    assert all(SIZE([{"content": reply.system_prompt}, *(one.model_dump() for one in reply.prompt)]) <= 30 for reply in whole + short)
    with pytest.raises(InputError, match="no such choice 'wrap'"): rollout(Sailor(), rows, "base", folder=tmp_path / "x", overflow="wrap")


def test_a_simulated_user_is_told_what_kind_of_turn_is_due_and_is_resumed(tmp_path):
    class Guest:
        name = "guest"
        def __init__(self): self.asked = []
        def generate(self, requests, seed=0):
            self.asked += [one["messages"][0]["content"] for one in requests]
            return [{"id": one["id"], "text": f"Guest says {len(one['messages'])}."} for one in requests]

    rows, guest = under(empty_scripts(2, 6, 0, conflicting=0.5), [PIRATE], 2, 6), Guest()
    with pytest.raises(KeyboardInterrupt): rollout(Sailor(stop=4), rows, "base", folder=tmp_path, write_user=simulated_user(guest))
    found = rollout(Sailor(), rows, "base", folder=tmp_path, write_user=simulated_user(guest))
    assert [reply.prompt[-1].content for reply in found[:6]] == [f"Guest says {2 * turn}." for turn in range(1, 7)]
    pushed = sum("stop that" in text for text in guest.asked)
    assert sum(turn["stance"] == "conflicting" for row in rows for turn in row["turns"]) <= pushed < len(guest.asked)
    assert "{and}" in "".join(guest.asked)  # braces in a system prompt are text
    assert not any("stop that" in one.content for reply in found for one in reply.prompt)


def test_reminders_stay_where_they_were_given_when_a_history_is_cut():
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(1, 13) for role in ("user", "assistant")][:-1]
    whole = remind([{"role": "system", "content": PIRATE.text}, *turns], 12, every=4)
    for gone in range(1, 12):
        cut = remind([{"role": "system", "content": PIRATE.text}, *turns[2 * gone:]], 12, every=4)
        assert cut[1:] == whole[1 + 2 * gone:]
    assert [one["content"].split("\n")[0] for one in whole if "Keep to" in one["content"]] == ["user 4", "user 8", "user 12"]


def test_an_arm_that_shows_more_is_cut_earlier(tmp_path):
    rows = plays(1, 6)
    arm = make_arm(read_arm("few_shot:1"), Sailor(), examples={PIRATE.text: [{"user": "a " * 20, "assistant": "b " * 20}]})
    limits = {"max_prompt_tokens": 120, "count_tokens": SIZE}
    about = measure({"base": Sailor(), "few_shot-1": arm}, rows, RULES, tmp_path, hears, ("own",), **limits)
    assert about["complete"]
    base, shots = (read_rows(tmp_path / f"responses-{name}.jsonl") for name in ("base", "few_shot-1"))
    assert len(shots[-1]["prompt"]) < len(base[-1]["prompt"])
    assert max(SIZE(one["messages"]) for one in arm.engine.seen) <= 120


def test_edited_rules_are_judged_anew_and_a_new_arm_is_played_alone(tmp_path):
    rows, base = plays(), Sailor()
    first = measure({"base": base}, rows, RULES, tmp_path, hears, ("own",))
    assert base.calls == 4
    edited = [RULES[0], RULES[1].model_copy(update={"check": Check(kind="max_words", params={"n": 9})})]
    base, again = Sailor(), Sailor()
    measure({"base": base, "repeat": make_arm(read_arm("repeat"), again)}, rows, edited, tmp_path, hears, ("own",))
    assert (base.calls, again.calls) == (0, 4)
    kept = Counter((row["arm"], row["rule_id"], row["satisfied"]) for row in read_rows(tmp_path / "verdicts.jsonl"))
    assert kept["base", "p2", True] == 12 and kept["base", "p1", True] == 6 and kept["repeat", "p1", True] == 12
    with pytest.raises(InputError, match="with other temperature"): measure({"base": Sailor()}, rows, RULES, tmp_path, hears, ("own",), settings={"temperature": 1})
    with pytest.raises(InputError, match="with other dialogues"): measure({"base": Sailor()}, rows[1:], RULES, tmp_path, hears, ("own",))
    assert first["settings"] == read_json(tmp_path / "measure.json")["settings"]


def test_a_system_prompt_replaced_under_way_brings_its_own_rules(tmp_path):
    shout = SystemPrompt(id="shout", type="case", text="Shout.")
    rows = [change_system(row, 3, shout) for row in plays(2, 4)]
    rules = [*RULES, Rule(id="s1", type="case", how="check", check=Check(kind="uppercase"), text="Shout.", system_prompt_id="shout")]
    measure({"base": Sailor()}, rows, rules, tmp_path, hears, ("own",))
    due = {(row["turn"], row["rule_id"]) for row in read_rows(tmp_path / "verdicts.jsonl")}
    assert due == {(1, "p1"), (1, "p2"), (2, "p1"), (2, "p2"), (3, "s1"), (4, "s1")}
    assert {row["system_prompt"] for row in read_rows(tmp_path / "responses-base.jsonl") if row["turn"] > 2} == {"Shout."}
    with pytest.raises(InputError, match="shout has no rules"): measure({"base": Sailor()}, rows, RULES, tmp_path / "x", hears, ("own",))


def test_scripts_push_as_often_as_asked_and_differ():
    scripts = compose(user_blocks(), 60, 20, 3, aligned=0.2, conflicting=0.3)
    assert {tuple(Counter(turn["stance"] for turn in row["turns"])[stance] for stance in STANCES) for row in scripts} == {(10, 4, 6)}
    assert len({row["id"] for row in scripts}) == 60 and all(row["turns"][0]["stance"] != "conflicting" for row in scripts)


def test_the_guard_sees_a_model_that_began_to_refuse():
    class Judge:
        name = "judge"
        def score(self, requests, labels, progress=None):
            return [{"id": one["id"], "logprobs": [-0.1, -4.0, -4.0] if "[First reply]\nArr" in one["messages"][1]["content"] else [-4.0, -0.1, -4.0], "outside": 0.0} for one in requests]

    class Refuser(Sailor):
        def generate(self, requests, seed=0, progress=None): return [{"id": one["id"], "text": "I'm sorry, but I can't help with that.", "finish": "stop"} for one in requests]

    found = guard_adapters(Wish("p", "o", adapters=("new=x",)), Study(Sailor(9), 8, None, None), {"new": Refuser()}, [f"Question {i}?" for i in range(12)], Study(Judge(), 8, None, None), "en")
    mine = found["arms"]["new"]
    assert mine["features"]["refuses"]["difference"]["mean"] == 1 and mine["helpfulness"]["mean"] == 0
    assert "share of refusals: 0.00 before, 1.00 after" in found["verdict"]


def s3ft(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two small measurements of the micro base."
    folder = tmp_path_factory.mktemp("measure")
    (folder / "sea.txt").write_text("From now on you are a pirate. Please do not forget it later.")
    said = [s3ft("measure", "--system-prompt", folder / "sea.txt", "--out", folder / f"run{seed}", "--dialogues", 3, "--turns", 3, "--arms", "base,remind:2", "--seed", 0, "--temperature", heat) for seed, heat in ((1, 0.7), (2, 1.0))]
    return folder, said


def test_measure_from_end_to_end(runs):
    folder, said = runs
    assert said[0].exit_code == 0, said[0].stderr
    assert "base keeps all of its rules in" in said[0].stdout and "--apply_chat_template" in said[0].stdout
    names = {path.name for path in (folder / "run1").iterdir()}
    assert names >= {"measure.json", "rules.jsonl", "dialogues.jsonl", "responses-base.jsonl", "responses-remind-2.jsonl", "verdicts.jsonl", "metrics.json", "ledger.json", "report"}
    verdicts, replies = read_rows(folder / "run1" / "verdicts.jsonl"), read_rows(folder / "run1" / "responses-base.jsonl")
    assert len(replies) == 3 * 3 * 2 and {row["judge"] for row in verdicts} == {"checks"}
    assert {row["response_id"] for row in verdicts} >= {row["id"] for row in replies}
    assert read_json(folder / "run1" / "measure.json")["complete"]
    assert "<html" in (folder / "run1" / "report" / "index.html").read_text()[:500]


def test_measuring_again_changes_nothing_and_other_settings_are_refused(runs):
    folder, _ = runs
    before = {path.name: path.read_bytes() for path in (folder / "run1").glob("*.json*")}
    words = ["measure", "--system-prompt", folder / "sea.txt", "--out", folder / "run1", "--dialogues", 3, "--turns", 3, "--arms", "base,remind:2"]
    assert s3ft(*words).exit_code == 0
    assert {path.name: path.read_bytes() for path in (folder / "run1").glob("*.json*")} == before
    refused = s3ft(*words, "--temperature", 1.0)
    assert refused.exit_code == 2 and "holds a measurement with other temperature" in refused.stderr and refused.stderr.count("\n") == 1


def test_compare_prints_a_verdict_and_writes_a_page(runs):
    folder, _ = runs
    told = s3ft("compare", folder / "run1", folder / "run2", "--out", folder / "both")
    assert told.exit_code == 0, told.stderr
    assert "run2: base" in told.stdout and "interval" in told.stdout and (folder / "both" / "report" / "index.html").exists()
    assert list((folder / "both" / "report" / "tables").glob("*.csv")) and list((folder / "both" / "report" / "figures").glob("*.pdf"))
    for words, line in ((["compare", folder / "run1"], "nothing to compare with"), (["compare", folder / "run1", folder / "none"], "cannot be read")):
        refused = s3ft(*words)
        assert refused.exit_code == 2 and line in refused.stderr


BAD = [
    ([], "no system prompt"),
    (["--system-prompt", "none.txt"], "none.txt: no such file"),
    (["--system-prompt", "sea.txt", "--arms", "base,base"], "named twice"),
    (["--system-prompt", "sea.txt", "--arms", "remind:0"], "is no arm"),
    (["--system-prompt", "sea.txt", "--histories", "mine"], "no such history 'mine'"),
    (["--system-prompt", "sea.txt", "--user-turns", "weekend"], "no user turns named 'weekend'"),
    (["--system-prompt", "sea.txt", "--conflicting", "1.5"], "are no shares"),
    (["--system-prompt", "sea.txt", "--model", "./none"], "none"),
    (["--system-prompt", "sea.txt", "--engine", "oracle"], "unknown engine 'oracle'"),
    (["--system-prompt", "sea.txt", "--max-new-tokens", "5000"], "do not fit a model of 1024"),
    (["--system-prompt", "empty.txt"], "is empty"),
    (["--system-prompt", "sea.txt", "--user", "grumpy"], "unknown persona 'grumpy'"),
    (["--system-prompt", "sea.txt", "--judge-way", "gut", "--rules", "rules.jsonl"], "unknown way to judge 'gut'"),
    (["--system-prompt", "sea.txt", "--adapter", "a=x", "--adapter", "a=y"], "same name"),
]


@pytest.mark.parametrize("words, line", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sea.txt").write_text("From now on you are a pirate.")
    (tmp_path / "empty.txt").write_text("\n")
    write_rows(tmp_path / "rules.jsonl", [{"text": "Be shy.", "how": "judge"}])
    refused = s3ft("measure", *words, "--dialogues", 2, "--turns", 2)
    assert refused.exit_code == 2 and line in refused.stderr, refused.stderr
    assert refused.stderr.count("\n") == 1 and not list(tmp_path.glob("runs/*/replies*"))


def test_rules_only_writes_a_file_that_is_used(tmp_path):
    (tmp_path / "shy.md").write_text("Be considerate.\n\n- Never use the word \"great\".\n")
    shown = s3ft("measure", "--system-prompt", tmp_path / "shy.md", "--rules-only", "--out", tmp_path / "out")
    assert shown.exit_code == 0 and "check" in shown.stdout and "judge" in shown.stdout
    path = tmp_path / "out" / "rules.jsonl"
    path.write_text(path.read_text().splitlines()[-1] + "\n")
    assert [rule.how for rule in prepare_measure(Wish(str(tmp_path / "shy.md"), str(tmp_path / "out"), turns=2, dialogues=2)).rules] == ["check"]


def test_a_judge_that_is_the_model_itself_is_warned_of_and_compared_with_checks(tmp_path):
    (tmp_path / "sea.txt").write_text("Talk gently to the user. Answer in at most 6 words.")
    about = run_measure(Wish(str(tmp_path / "sea.txt"), str(tmp_path / "out"), dialogues=2, turns=2, arms=("base", "best_of:2"), histories=("own",)))
    assert "same family" in about["facts"]["warnings"][0] and about["judge"].startswith("discriminator")
    assert about["facts"]["agreement"]["kappa"]["n"] + about["facts"]["agreement"]["unknown"] == 4
    assert "best of 2 by judge" in about["arms"]["best_of-2"]


def test_published_ifeval_files_are_scored(tmp_path):
    task = {"key": 1, "prompt": "Say hi.", "instruction_id_list": ["punctuation:no_comma", "new:kind"], "kwargs": [{}, {}]}
    known = {"key": 2, "prompt": "Say ho.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    inputs = write_rows(tmp_path / "in.jsonl", [task, known])
    responses = write_rows(tmp_path / "out.jsonl", [{"prompt": "Say hi.", "response": "Hi"}, {"prompt": "Say ho.", "response": "Ho, ho"}])
    told = s3ft("measure", "--ifeval", inputs, responses, "--out", tmp_path / "scores")
    assert told.exit_code == 0, told.stderr
    assert "prompt, strict: 0.0 %" in told.stdout and "unknown instruction new:kind: 1 times" in told.stdout
    assert read_json(tmp_path / "scores" / "ifeval.json")["prompts_left_out"] == 1
    assert s3ft("measure", "--ifeval", inputs, tmp_path / "none.jsonl").exit_code == 2


@pytest.mark.slow
def test_twelve_turns_take_three_minutes_at_most(tmp_path):
    (tmp_path / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words.")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "measure", "--model", "micro-base", "--system-prompt", str(tmp_path / "sea.txt"), "--turns", "12", "--out", str(tmp_path / "out")])
    assert done.returncode == 0 and time.monotonic() - began <= 180


@pytest.mark.slow
def test_a_killed_measurement_goes_on_with_the_same_bytes(tmp_path):
    (tmp_path / "sea.txt").write_text("From now on you are a pirate.")
    run = lambda name, **more: subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "measure", "--system-prompt", str(tmp_path / "sea.txt"), "--turns", "24",
                                               "--dialogues", "2", "--arms", "base,repeat", "--out", str(tmp_path / name)], capture_output=True, **more)
    whole = run("whole")
    assert whole.returncode == 0
    for seconds in (12, 18):
        try: run("killed", timeout=seconds)  # ends with SIGKILL
        except subprocess.TimeoutExpired: pass
    assert run("killed").returncode == 0
    for name in ("measure.json", "ledger.json", "dialogues.jsonl", "responses-base.jsonl", "responses-repeat.jsonl", "verdicts.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.fixture
def server(tmp_path):
    "A real OpenAI-compatible server with the micro base."
    if not importlib.util.find_spec("fastapi"): pytest.skip("transformers serve needs fastapi and uvicorn")
    from s3ft_nb.run.setup import model_path

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = [sys.executable, "-m", "transformers.cli.transformers", "serve", model_path("micro-base"), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
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
    from s3ft_nb.run.setup import model_path

    (tmp_path / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words.")
    told = s3ft("measure", "--engine", "http", "--base-url", server, "--model", model_path("micro-base"), "--tokenizer", "micro-base", "--system-prompt", tmp_path / "sea.txt",
                "--dialogues", 3, "--turns", 4, "--arms", "base,repeat", "--out", tmp_path / "out")
    assert told.exit_code == 0, told.stderr
    replies = read_rows(tmp_path / "out" / "responses-base.jsonl")
    assert len(replies) == 3 * 4 * 2 and sum("Arr" in row["response"] or "Ahoy" in row["response"] for row in replies) > 0
    assert json.loads((tmp_path / "out" / "measure.json").read_text())["arms"]["base"].endswith(server.split("/")[2])
