"Verdict tables, metrics and comparisons against slow readings of their definitions, and on sheets made elsewhere."

import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import CensoredData, ecdf

from s3ft_nb.core.files import InputError, write_rows
from s3ft_nb.core.records import Verdict
from s3ft_nb.measure.metrics import compare_folders, differences, numbers
from s3ft_nb.measure.verdicts import verdict_table
from s3ft_nb.report.tables import outcome


def rows_of(n, n_turns, seed, arm="base", unknown=0.0, rules=3, rate=0.85):
    "Random verdicts of a few rules, two dialogues to a conversation."
    rng = random.Random(seed)
    say = lambda: None if rng.random() < unknown else rng.random() < rate
    return [dict(arm=arm, history="own", dialogue_id=f"d{d}", conversation_id=f"c{d // 2}", turn=t, rule_id=f"r{r}",
                 type=("tone", "length", "tone")[r % 3], satisfied=say()) for d in range(n) for t in range(1, n_turns + 1) for r in range(rules)]


def value(rows, metric, part="all", key=""):
    return next((row for row in rows if (row["metric"], row["part"], row["key"], row["against"]) == (metric, part, key, "")), None)


@pytest.mark.parametrize("seed", range(4))
def test_sysbench_rates_are_their_definitions(seed):
    "CSR, ISR and SSR as SysBench defines them, by type and by round, from rows with four fields."
    rows = [{name: row[name] for name in ("turn", "rule_id", "satisfied")} | {"conversation_id": row["dialogue_id"]} for row in rows_of(11, 5, seed)]
    random.Random(seed).shuffle(rows)
    turns = {}
    for row in rows: turns.setdefault((row["conversation_id"], row["turn"]), []).append(row["satisfied"])
    rounds = {c: [all(turns[c, t]) for t in range(1, 6)] for c, _ in turns}
    found = numbers(rows)
    assert value(found, "csr")["mean"] == pytest.approx(np.mean([row["satisfied"] for row in rows]))
    assert value(found, "adherence")["mean"] == pytest.approx(np.mean([all(said) for said in turns.values()]))
    assert value(found, "ssr")["mean"] == pytest.approx(np.mean([[*done, False].index(False) / 5 for done in rounds.values()]))
    for t in range(1, 6):
        assert value(found, "adherence", "turn", str(t))["mean"] == pytest.approx(np.mean([done[t - 1] for done in rounds.values()]))
        consecutive = value(found, "survival", "turn", str(t))  # sessions that are whole up to and including a round
        assert (consecutive["mean"] if consecutive else 0) == pytest.approx(np.mean([all(done[:t]) for done in rounds.values()]))


def test_verdict_rows_and_dicts_give_the_same_numbers():
    rows = rows_of(6, 3, 0, unknown=0.1)
    objects = [Verdict(response_id="x", system_prompt_id="", judge="checks", **row) for row in rows]
    assert numbers(rows) == numbers(objects)


@pytest.mark.parametrize("seed", range(3))
def test_survival_is_scipys_with_undecided_turns_as_censoring(seed):
    rows = rows_of(40, 9, seed, unknown=0.02)
    dialogues, times, events = {}, [], []
    for row in rows: dialogues.setdefault(row["dialogue_id"], {}).setdefault(row["turn"], []).append(row["satisfied"])
    for turns in dialogues.values():
        first = next((t for t, said in turns.items() if False in said or None in said), None)
        broken = first is not None and False in turns[first]
        times.append(first if broken else (first or 10) - 1), events.append(broken)
    times, events = np.array(times), np.array(events)
    theirs = ecdf(CensoredData(uncensored=times[events], right=times[~events])).sf
    curve = [row for row in numbers(rows) if (row["metric"], row["part"]) == ("survival", "turn")]
    assert curve and all(row["mean"] == pytest.approx(float(theirs.evaluate(int(row["key"])))) for row in curve)


def test_one_conversation_has_values_but_no_intervals():
    found = numbers(rows_of(2, 6, 0))
    assert value(found, "adherence")["mean"] is not None and all(row["low"] is None for row in found)


@pytest.mark.parametrize("said, adherence", [(True, 1.0), (False, 0.0)])
def test_all_or_nothing_keeps_an_interval(said, adherence):
    found = numbers([{**row, "satisfied": said} for row in rows_of(40, 6, 0)])
    row = value(found, "adherence")
    assert row["mean"] == adherence and 0 < row["high"] - row["low"] < 0.25
    assert value(found, "half_life") is None and abs(value(found, "slope")["mean"]) < 1e-12


@pytest.mark.parametrize("said", [True, False])
def test_two_perfect_arms_are_not_proved_equal(said):
    rows = [{**row, "satisfied": said, "arm": arm} for arm in ("base", "other") for row in rows_of(12, 4, 0)]
    row = next(row for row in differences(verdict_table(rows)) if row["metric"] == "adherence")
    assert row["low"] < -0.05 and row["high"] > 0.05 and outcome(row) == "inconclusive"


def test_numbers_do_not_depend_on_the_order_of_rows_or_on_other_arms():
    rows = rows_of(12, 6, 1, unknown=0.05)
    shuffled = rows_of(12, 6, 2, arm="other") + random.Random(3).sample(rows, len(rows))
    sides = [{(row["part"], row["key"], row["metric"]): row for row in numbers(given) if row["arm"] == "base"} for given in (rows, shuffled)]
    assert sides[0].keys() == sides[1].keys()
    for key, row in sides[0].items():
        for name in ("mean", "low", "high", "n"): assert row[name] == pytest.approx(sides[1][key][name]), key


def test_an_arm_against_its_twin_and_its_copy():
    twin = differences(verdict_table(rows_of(20, 6, 0) + rows_of(20, 6, 1, arm="twin")))
    assert twin and all(outcome(row) in ("inconclusive", "equivalent") for row in twin)
    copy = differences(verdict_table(rows_of(20, 6, 0) + [row | {"arm": "copy"} for row in rows_of(20, 6, 0)]))
    assert {(row["mean"], row["p"]) for row in copy} == {(0, 1)}


def test_identical_arms_over_all_metrics():
    "Adjusted together, all metrics call equal arms different in at most one of twenty."
    called = 0
    for seed in range(40):
        rows = differences(verdict_table(rows_of(20, 5, 2 * seed) + rows_of(20, 5, 2 * seed + 1, arm="twin")), seed=seed)
        called += any(outcome(row) in ("better", "worse", "different") for row in rows if row["part"] == "all")
    assert called <= 5


def test_folders_without_a_common_dialogue_are_refused(tmp_path):
    write_rows(tmp_path / "a/verdicts.jsonl", rows_of(4, 3, 0))
    write_rows(tmp_path / "b/verdicts.jsonl", [row | {"dialogue_id": "x" + row["dialogue_id"]} for row in rows_of(4, 3, 0)])
    with pytest.raises(InputError, match="share no decided turn"): differences(compare_folders([tmp_path / "a", tmp_path / "b"]))
    with pytest.raises(InputError, match="cannot be read"): compare_folders([tmp_path / "a", tmp_path / "c"])


@pytest.mark.slow
def test_many_recorded_conversations_fit(tmp_path):
    "10,000 conversations of ten turns and two rules: numbers in a minute, without holding the file."
    row = '{"arm": "base", "history": "recorded", "conversation_id": "c%d", "turn": %d, "rule_id": "r%d", "type": "tone", "satisfied": %s}\n'
    rng = random.Random(0)
    with (tmp_path / "verdicts.jsonl").open("w") as file:
        for c in range(10_000):
            for t in range(1, 11):
                for r in range(2): file.write(row % (c, t, r, "true" if rng.random() < 0.9 else "false"))
    code = f"from s3ft_nb.measure.metrics import numbers; import resource; n = len(numbers({str(tmp_path / 'verdicts.jsonl')!r})); print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    n, kilobytes = map(int, done.stdout.split())
    assert n > 60 and kilobytes < 600_000
