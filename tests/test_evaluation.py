"Hostile replies, coverage of intervals, and rollouts that were stopped."

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from s3ft_nb.judging.rubric import RUBRIC, judge_messages
from s3ft_nb.judging.checks import split_words
from s3ft_nb.core.convert import read_conversations
from s3ft_nb.core.stage import Ledger
from s3ft_nb.core.records import Check, Conversation, Response, SystemPrompt, message
from s3ft_nb.core.files import InputError, write_rows
from s3ft_nb.measure.verdicts import by_checks, compare, drift, judge, summarise
from s3ft_nb.measure.rollout import dialogues, n_used, rollout
from s3ft_nb.core.stats import bootstrap_mean, paired_difference, rate, wilson


def simulated(rng, clusters, per_cluster, spread):
    rates = rng.beta(spread * 0.6, spread * 0.4, clusters)
    sizes = rng.integers(1, 2 * per_cluster, clusters)
    names = np.repeat(np.arange(clusters), sizes)
    return (rng.random(len(names)) < rates[names]).astype(float), names


@pytest.mark.parametrize("clusters", [15, 60])
def test_clustered_interval_covers(clusters):
    rng, hits, naive = np.random.default_rng(1), 0, 0
    for i in range(300):
        values, names = simulated(rng, clusters, 6, spread=2.0)
        _, low, high = bootstrap_mean(values, names, draws=300, seed=i)
        hits += low <= 0.6 <= high
        low, high = wilson(int(values.sum()), len(values))
        naive += low <= 0.6 <= high
    assert 0.90 <= hits / 300 <= 0.985  # stated: 0.95
    assert naive < hits - 30  # as if rows were independent


def test_wilson_covers_small_rates():
    rng = np.random.default_rng(0)
    covered = [low <= 0.05 <= high for low, high in (wilson(int(k), 40) for k in rng.binomial(40, 0.05, 2000))]
    assert np.mean(covered) > 0.93


def test_permutation_p_is_uniform_without_difference():
    rng, ps = np.random.default_rng(2), []
    for i in range(400):
        values, names = simulated(rng, 30, 4, spread=2.0)
        other = (rng.random(len(values)) < 0.5).astype(float)
        swap = rng.random(30)[names] < 0.5
        a, b = np.where(swap, values, other), np.where(swap, other, values)
        ps.append(paired_difference(a, b, names, draws=200, seed=i)["p"])
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.07 and 0.45 < np.mean(ps) < 0.65  # ties of whole numbers make it careful


def test_many_clusters_fit():
    found = rate(np.random.default_rng(3).integers(0, 2, 20_000), np.arange(20_000), draws=500)
    assert found["low"] < 0.5 < found["high"] and found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5 / 20_000**0.5, rel=0.15)


def talk(id, n_turns):
    return Conversation(id=id, messages=[message(role, f"{id} {role} {i}") for i in range(1, n_turns + 1) for role in ("user", "assistant")])


def a_world(n=9, n_turns=4):
    prompts = [SystemPrompt(id=f"{kind}-{i}", type=kind, text=f"Say arr, {kind} {i}.", checks=[Check(kind="contains_any", params={"words": ["arr"]})])
               for kind in ("persona", "tone") for i in range(3)]
    return dialogues([talk(f"c{i}", n_turns) for i in range(6)], prompts, n, n_turns, seed=0), prompts


class Noisy:
    "An engine whose answers depend on its whole input and seed."
    name = "noisy"

    def __init__(self, stop_after=10**9): self.calls, self.stop_after = 0, stop_after

    def generate(self, requests, seed):
        self.calls += 1
        if self.calls > self.stop_after: raise KeyboardInterrupt
        rng = random.Random(f"{seed}{requests}")
        rows = [{"id": r["id"], "text": rng.choice(["arr", "yes", "", f"{rng.random()}"]), "tokens": 3, "finish": rng.choice(["stop", "length"])} for r in requests]
        rng.shuffle(rows)
        return rows


@pytest.mark.parametrize("history", ["own", "original"])
def test_a_stopped_rollout_goes_on_with_the_same_bytes(tmp_path, history):
    rows, _ = a_world()
    run = lambda engine, name: rollout(engine, rows, "base", history, 5, tmp_path / name, 2, ledger=Ledger("rollout", tmp_path / f"{name}.json"))
    whole = run(Noisy(), "whole")
    for stop in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt): run(Noisy(stop), "stopped")
    assert run(Noisy(), "stopped") == whole
    for path in (tmp_path / "whole").iterdir(): assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
    again = Noisy(0)
    assert run(again, "stopped") == whole and again.calls == 0


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_evaluation import Noisy, a_world
from s3ft_nb.core.files import write_rows
from s3ft_nb.measure.rollout import rollout
class Killed(Noisy):
    def generate(self, requests, seed):
        if self.calls == {calls}: os.kill(os.getpid(), 9)
        return super().generate(requests, seed)
write_rows({out!r} + "/own.jsonl", rollout(Killed(), a_world()[0], "base", "own", 5, {out!r} + "/shards", 2))
"""


def test_a_killed_rollout_goes_on_with_the_same_bytes(tmp_path):
    tests, whole = str(Path(__file__).parent), tmp_path / "whole.jsonl"
    write_rows(whole, rollout(Noisy(), a_world()[0], "base", "own", 5, tmp_path / "whole", 2))
    codes = [subprocess.run([sys.executable, "-c", KILLED.format(tests=tests, calls=calls, out=str(tmp_path))], capture_output=True).returncode for calls in (6, 99)]
    assert codes == [-9, 0]
    assert (tmp_path / "own.jsonl").read_bytes() == whole.read_bytes()


def test_shards_of_another_arm_are_refused(tmp_path):
    rows, _ = a_world()
    rollout(Noisy(), rows, "base", folder=tmp_path)
    for given in ({"arm": "s3ft"}, {"arm": "base", "seed": 1}, {"arm": "base", "history": "original"}, {"arm": "base", "fingerprint": {"adapter": "x"}}):
        with pytest.raises(InputError, match="shards of other rows"): rollout(Noisy(), rows, folder=tmp_path, **given)
    assert rollout(Noisy(), rows, "s3ft", folder=tmp_path, fresh=True)[0].arm == "s3ft"


def test_books_balance_when_a_message_is_too_long(tmp_path):
    rows, _ = a_world()
    rows[3]["turns"][2]["user"] = "long " * 50
    size = lambda messages: sum(len(one["content"].split()) for one in messages)
    ledger = Ledger("rollout")
    replies = rollout(Noisy(), rows, "base", folder=tmp_path, shard_size=4, max_prompt_tokens=14, count_tokens=size, ledger=ledger)
    books = ledger.as_dict()
    assert (books["expected"], len(replies), books["reasons"]) == (36, 32, {"message_too_long": 4})
    assert all(size([{"content": one.system_prompt}, *(m.model_dump() for m in one.prompt)]) <= 14 for one in replies)
    assert books["notes"]["prompts_shortened"] > 0 and books["notes"]["replies_empty"] > 0
    assert all(one.prompt[-1].content == rows_by_id(rows)[one.dialogue_id]["turns"][one.turn - 1]["user"] for one in replies)


def rows_by_id(rows):
    return {row["id"]: row for row in rows}


def test_dialogues_account_for_every_conversation():
    _, prompts = a_world()
    conversations = [talk(f"c{i}", 1 + i % 5) for i in range(30)]
    for n in (1, 5, 40):
        ledger = Ledger("dialogues")
        rows = dialogues(conversations, prompts, n, 3, seed=1, ledger=ledger)
        ledger.reconcile(30, n_used(rows))
        assert len({row["id"] for row in rows}) == len(rows) == min(n, 36)
    with pytest.raises(InputError, match="training half"): dialogues([conversations[4].model_copy(update={"split": "train"})], prompts, 1, 3, seed=1)
    with pytest.raises(InputError, match="nothing to evaluate"): dialogues([], prompts, 1, 3, seed=1)


def test_rollout_to_summary(tmp_path):
    rows, prompts = a_world(12)
    verdicts = {arm: by_checks(rollout(engine, rows, arm, folder=tmp_path / arm), prompts) for arm, engine in (("base", Noisy()), ("s3ft", Obedient()))}
    summary = {arm: summarise(mine) for arm, mine in verdicts.items()}
    assert summary["s3ft"]["mean"] == 1 and 0.6 < summary["s3ft"]["low"] < 1 and summary["base"]["mean"] < 0.6
    assert [row["turn"] for row in summary["base"]["by_turn"]] == [1, 2, 3, 4] and sum(row["n"] for row in summary["base"]["by_type"].values()) == 48
    assert compare(verdicts["s3ft"], verdicts["base"])["low"] > 0
    assert drift(verdicts["s3ft"])["ratio"]["mean"] == 1
    assert summarise(verdicts["base"][::-1]) == summary["base"]


class Obedient(Noisy):
    name = "obedient"

    def generate(self, requests, seed): return [{"id": r["id"], "text": "Arr!", "tokens": 2, "finish": "stop"} for r in requests]


def test_turns_out_of_order_are_refused(tmp_path):
    rows, prompts = a_world()
    replies = rollout(Noisy(), rows, "base", folder=tmp_path)
    with pytest.raises(InputError, match="is due"): judge([replies[1], replies[0], *replies[2:]], prompts)
    with pytest.raises(InputError, match="is due"): judge(replies[:1] + replies[2:], prompts)
    shifted = [Response(**{**one.model_dump(), "turn": one.turn - 1}) for one in replies if one.turn > 1]
    with pytest.raises(InputError, match="user messages"): judge(shifted, prompts)


def real_files():
    folder = Path(os.environ.get("S3FT_TEST_DATA", Path(__file__).parents[1] / "../shared/data")).resolve()
    return {name: next(iter(sorted((folder / name).glob("*.json*"))), None) for name in ("taskmaster", "multiwoz", "kdconv", "openassistant", "sharegpt-format")}


@pytest.mark.parametrize("name, file", real_files().items())
def test_real_dialogues_are_played_to_the_end(tmp_path, name, file):
    if file is None: pytest.skip("no real data here")
    conversations, (_, prompts) = read_conversations(file, on_error="skip", same_role="join")[:60], a_world()
    first, second = Ledger("dialogues"), Ledger("rollout")
    rows = dialogues(conversations, prompts, 50, 4, seed=0, shorter="keep", ledger=first)
    first.reconcile(len(conversations), n_used(rows))
    size = lambda messages: sum(len(split_words(one["content"])) for one in messages)
    replies = rollout(Noisy(), rows, "base", folder=tmp_path, max_prompt_tokens=200, count_tokens=size, ledger=second)
    assert second.rows_out == len(replies) and replies
    assert summarise(by_checks(replies, prompts), draws=50)["n"] == len(replies)
    for one in replies:
        for language in RUBRIC: assert judge_messages(one.system_prompt, one.prompt, one.response, language)[1]["content"].count(RUBRIC[language]["blocks"]["last"] + "\n") == 1
