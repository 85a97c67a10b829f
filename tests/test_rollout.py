"Rollouts: pairing, resuming with the same bytes, ledgers, simulated users, real dialogues."
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from s3ft_nb.core.convert import read_conversations
from s3ft_nb.core.files import InputError, write_rows
from s3ft_nb.core.records import STANCES, Check, Conversation, Rule, SystemPrompt, message
from s3ft_nb.core.stage import Ledger, Stage
from s3ft_nb.judging.checks import split_words
from s3ft_nb.judging.judge import verdicts
from s3ft_nb.judging.rubric import RUBRIC, judge_messages
from s3ft_nb.measure.arms import make_fit, remind, rollout
from s3ft_nb.measure.dialogues import compose, pair_scripts, scripts_of, simulated_user, user_blocks

pair_balanced = partial(pair_scripts, balanced=True)
PIRATE = SystemPrompt(id="pirate", type="persona", text="Talk like a pirate {and} use at most 3 words.")
SIZE = lambda messages: sum(len(one["content"].split()) for one in messages)


def talk(id, n_turns, **more):
    return Conversation(id=id, messages=[message(role, f"{id} {role} {i}") for i in range(1, n_turns + 1) for role in ("user", "assistant")], **more)


def a_world(n=9, n_turns=4):
    prompts = [SystemPrompt(id=f"{kind}-{i}", type=kind, text=f"Say arr, {kind} {i}.") for kind in ("persona", "tone") for i in range(3)]
    return pair_balanced(scripts_of([talk(f"c{i}", n_turns) for i in range(6)]), prompts, n, n_turns), prompts


def plays(n=3, n_turns=4, **more):
    return pair_scripts(compose(user_blocks(), n, n_turns, 0, **more), [PIRATE], n, n_turns)


class Noisy:
    "An engine whose responses depend on its whole input and seed, in any order; `stop` calls, then it is interrupted."
    name = "noisy"

    def __init__(self, stop=10**9): self.calls, self.stop = 0, stop

    def generate(self, requests, seed=0, progress=None):
        if self.calls == self.stop: raise KeyboardInterrupt
        self.calls, rng = self.calls + 1, random.Random(f"{seed}{requests}")
        rows = [{"id": r["id"], "text": rng.choice(["arr", "yes", "", f"{rng.random()}"]), "tokens": 3, "finish": rng.choice(["stop", "length"])} for r in requests]
        rng.shuffle(rows)
        return rows


@pytest.mark.parametrize("history", ["own", "original"])
def test_a_stopped_rollout_resumes_with_the_same_bytes(tmp_path, history):
    rows, _ = a_world()
    run = lambda engine, name: rollout(engine, rows, "base", Stage(tmp_path / name, seed=5, shard_size=2), history)
    whole, count = run(engine := Noisy(), "whole"), engine.calls
    calls = 0
    for stop in (1, 2, 1, 10**9):
        engine = Noisy(stop)
        try: found = run(engine, "stopped")
        except KeyboardInterrupt: pass
        calls += engine.calls
    assert found == whole and calls == count
    files = lambda name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.json*") if path.name != "ledger.json"}
    assert files("whole") == files("stopped")


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_rollout import Noisy, a_world
from s3ft_nb.core.files import write_rows
from s3ft_nb.core.stage import Stage
from s3ft_nb.measure.arms import rollout
class Killed(Noisy):
    def generate(self, requests, seed=0, progress=None):
        if self.calls == {calls}: os.kill(os.getpid(), 9)
        return super().generate(requests, seed)
write_rows({out!r} + "/own.jsonl", rollout(Killed(), a_world()[0], "base", Stage({out!r} + "/killed", seed=5, shard_size=2)))
"""


def test_a_killed_rollout_resumes_with_the_same_bytes(tmp_path):
    whole = write_rows(tmp_path / "whole.jsonl", rollout(Noisy(), a_world()[0], "base", Stage(tmp_path / "whole", seed=5, shard_size=2)))
    run = lambda calls: subprocess.run([sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent), calls=calls, out=str(tmp_path))], capture_output=True)
    assert [run(calls).returncode for calls in (6, 99)] == [-9, 0]
    assert (tmp_path / "own.jsonl").read_bytes() == whole.read_bytes()


def test_sixty_turns_survive_being_stopped(tmp_path):
    rows, calls = plays(3, 60), 0
    expected = rollout(Noisy(), rows, "base", Stage(tmp_path / "whole"))
    for stop in (7, 7, 20, 10**9):
        engine = Noisy(stop)
        try: found = rollout(engine, rows, "base", Stage(tmp_path / "stopped"))
        except KeyboardInterrupt: pass
        calls += engine.calls
    assert found == expected and calls == 60 and len(found[59].prompt) == 2 * 60 - 1


def test_shards_of_another_arm_are_refused(tmp_path):
    rows, _ = a_world()
    rollout(Noisy(), rows, "base", Stage(tmp_path))
    for arm, seed, claim in (("s3ft", 0, ()), ("base", 1, ()), ("base", 0, {"adapter": "x"})):
        with pytest.raises(InputError, match="shards of other rows"): rollout(Noisy(), rows, arm, Stage(tmp_path, seed=seed), claim=claim)
    assert rollout(Noisy(), rows, "s3ft", Stage(tmp_path, fresh=True))[0].arm == "s3ft"


def test_the_ledger_balances_when_a_message_is_too_long(tmp_path):
    rows, _ = a_world()
    rows[3] = rows[3] | {"turns": [one | ({"user": "long " * 50} if i == 2 else {}) for i, one in enumerate(rows[3]["turns"])]}
    stage = Stage(tmp_path, shard_size=4)
    found = rollout(Noisy(), rows, "base", stage, fit=make_fit(SIZE, 14))
    ledger, by_id = stage.ledger.as_dict(), {row["id"]: row for row in rows}
    assert (ledger["expected"], len(found), ledger["reasons"]) == (36, 32, {"message_too_long": 4})
    assert all(SIZE([{"content": one.system_prompt}, *(m.model_dump() for m in one.prompt)]) <= 14 for one in found)
    assert ledger["notes"]["prompts_shortened"] > 0 and ledger["notes"]["responses_empty"] > 0
    assert all(one.prompt[-1].content == by_id[one.dialogue_id]["turns"][one.turn - 1]["user"] for one in found)


@pytest.mark.parametrize("history", ["own", "original"])
def test_overflow_is_cut_or_stops_and_is_in_the_ledger(tmp_path, history):
    rows = [row | {"turns": [{"user": f"word {i}", "stance": "neutral", "original": "so it is"} for i in range(8)]} for row in plays(2, 8)]
    cut, stop = Stage(tmp_path / "cut"), Stage(tmp_path / "stop")
    whole, short = (rollout(Noisy(), rows, "base", stage, history, make_fit(SIZE, 30, how)) for stage, how in ((cut, "cut_oldest"), (stop, "stop")))
    assert len(whole) == 16 and cut.ledger.as_dict()["notes"]["prompts_shortened"] > 0 and not cut.ledger.dropped
    assert 0 < len(short) < 16 and stop.ledger.as_dict()["reasons"] == {"context_full": 16 - len(short)}


def test_dialogues_account_for_every_conversation():
    _, prompts = a_world()
    scripts = scripts_of([talk(f"c{i}", 1 + i % 5) for i in range(30)])
    for n in (1, 5, 40):
        ledger = Ledger("dialogues")
        rows = pair_balanced(scripts, prompts, n, 3, seed=1, ledger=ledger)
        ledger.reconcile(30, len({row["conversation_id"] for row in rows}))
        assert len({row["id"] for row in rows}) == len(rows) == min(n, 18 * 2)


def test_user_turns_have_the_wanted_stances_and_differ():
    scripts = compose(user_blocks(), 60, 20, 3, aligned=0.2, conflicting=0.3)
    assert {tuple(Counter(turn["stance"] for turn in row["turns"])[stance] for stance in STANCES) for row in scripts} == {(10, 4, 6)}
    assert len({row["id"] for row in scripts}) == 60 and all(row["turns"][0]["stance"] != "conflicting" for row in scripts)


def test_a_simulated_user_is_told_the_stance_and_is_resumed(tmp_path):
    class Guest(Noisy):
        name, asked = "guest", []
        def generate(self, requests, seed=0, progress=None):
            self.asked.extend(one["messages"][0]["content"] for one in requests)
            return [{"id": one["id"], "text": f"Guest says {len(one['messages'])}."} for one in requests]

    rows, guest = pair_scripts(compose(None, 2, 6, 0, conflicting=0.5), [PIRATE], 2, 6), Guest()
    with pytest.raises(KeyboardInterrupt): rollout(Noisy(stop=4), rows, "base", Stage(tmp_path), write_user=simulated_user(guest))
    found = rollout(Noisy(), rows, "base", Stage(tmp_path), write_user=simulated_user(guest))
    assert [one.prompt[-1].content for one in found[:6]] == [f"Guest says {2 * turn}." for turn in range(1, 7)]
    told = sum("stop that" in text for text in guest.asked)
    assert told == sum(turn["stance"] == "conflicting" for row in rows for turn in row["turns"]) and len(guest.asked) == 12
    assert "{and}" in "".join(guest.asked)  # braces in a system prompt are text
    assert not any("stop that" in one.content for response in found for one in response.prompt)


def test_reminders_stay_where_they_were_given_when_a_history_is_cut():
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(1, 13) for role in ("user", "assistant")][:-1]
    whole = remind([{"role": "system", "content": PIRATE.text}, *turns], 12, n=4)
    for gone in range(1, 12):
        cut = remind([{"role": "system", "content": PIRATE.text}, *turns[2 * gone:]], 12, n=4)
        assert cut[1:] == whole[1 + 2 * gone:]
    assert [one["content"].split("\n")[0] for one in whole if "Keep to" in one["content"]] == ["user 4", "user 8", "user 12"]


def real_files():
    folder = Path(os.environ.get("S3FT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    return {name: next(iter(sorted((folder / name).glob("*.json*"))), None) for name in ("taskmaster", "multiwoz", "kdconv", "openassistant", "sharegpt-format")}


@pytest.mark.parametrize("name, file", real_files().items())
def test_real_dialogues_are_played_to_the_end(tmp_path, name, file):
    if file is None: pytest.skip("no real data here")
    conversations, (_, prompts) = read_conversations(file, on_error="skip", same_role="join")[:60], a_world()
    first, stage = Ledger("dialogues"), Stage(tmp_path)
    rows = pair_balanced(scripts_of(conversations), prompts, 50, 4, shorter="keep", ledger=first)
    first.reconcile(len(conversations), len({row["conversation_id"] for row in rows}))
    size = lambda messages: sum(len(split_words(one["content"])) for one in messages)
    found = rollout(Noisy(), rows, "base", stage, fit=make_fit(size, 200))
    assert stage.ledger.rows_out == len(found) and found
    rule = Rule(id="arr", how="check", text="Say arr.", check=Check(kind="contains_any", params={"words": ["arr"]}))
    assert len(verdicts(found, [rule])) == len(found)
    for one in found[:40]:
        for language in RUBRIC: assert judge_messages(one.system_prompt, one.prompt, one.response, language)[1]["content"].count(RUBRIC[language]["blocks"]["last"] + "\n") == 1
