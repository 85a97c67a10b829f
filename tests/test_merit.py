"Do the intervals cover the truth, do equal arms look equal, and do the figures agree with slow readings of their definitions?"

import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import CensoredData, binom, ecdf

from s3ft_nb.core.files import InputError
from s3ft_nb.measure.verdicts import csr, isr, ssr
from s3ft_nb.measure.compare import arm_differences, compare_runs, figure_difference, outcome
from s3ft_nb.measure.metrics import MERIT, merit
from s3ft_nb.measure.metrics import half_life, merits
from s3ft_nb.measure.verdicts import Numbering, Ruled, tally
from s3ft_nb.measure.metrics import survival

TURNS, PER = 12, 2  # turns of a dialogue, dialogues of a conversation
ARM = dict(start=0.04, growth=0.005, back=0.5)  # hazard of breaking at turn 1, growth per turn, chance to come back
BETTER = dict(start=0.02, growth=0.002, back=0.6)


def played(rng, n, luck, start, growth, back):
    "Whether each turn of each dialogue was kept: hazards grow with the turn and differ between conversations."
    kept, ok = np.zeros((n * PER, TURNS), dtype=bool), np.ones(n * PER, dtype=bool)
    for turn in range(TURNS):
        hazard = np.clip((start + growth * turn) * np.repeat(luck, PER), 0, 1)
        ok = np.where(ok, rng.random(n * PER) > hazard, rng.random(n * PER) < back)
        kept[:, turn] = ok
    return kept


def arms(rng, n, *kinds):
    "Arms on the same conversations; three in ten dialogues end at half time."
    luck = 0.2 + 1.6 * rng.beta(2, 2, n)
    ends = rng.choice([TURNS // 2, TURNS], n * PER, p=[0.3, 0.7])
    dialogue, turn = (part.ravel() for part in np.indices((n * PER, TURNS)))
    seen = turn < ends[dialogue]
    homes = [f"c{d // PER}" for d in range(n * PER)]
    names = Numbering({f"d{d}": d for d in range(n * PER)}, {f"c{c}": c for c in range(n)}, {"r": 0}, homes, ["tone"], TURNS)
    whole = Ruled(names, dialogue[seen], turn[seen] + 1, *np.zeros((2, seen.sum()), int), np.ones(seen.sum(), bool), np.full(seen.sum(), -1))
    return [replace(whole, satisfied=played(rng, n, luck, **kind).ravel()[seen].astype(int)) for kind in kinds]


@pytest.fixture(scope="module")
def truth():
    "The figures of two arms in a population of conversations, and their difference."
    figures = ("adherence", "slope", "survival", "ssr", "area", "recovery")
    of = lambda ruled: {name: MERIT[name].of(MERIT[name].table(ruled).sum(axis=0)) for name in figures}
    return [of(ruled) for ruled in arms(np.random.default_rng(2**31), 100_000, ARM, BETTER)]


def coverage(draws, n, truth, figures=("adherence", "slope", "survival", "ssr", "area", "recovery")):
    "Shares of draws whose 95 % interval holds the truth: of each figure, and of the paired difference in adherence."
    hits = {name: 0 for name in (*figures, "difference")}
    for draw in range(draws):
        ours, theirs = arms(np.random.default_rng(draw), n, ARM, BETTER)
        for name in figures:
            found = merit(name, ours)
            hits[name] += found["low"] <= truth[0][name] <= found["high"]
        found = figure_difference("adherence", ours, theirs, draws=1)
        hits["difference"] += found["low"] <= truth[0]["adherence"] - truth[1]["adherence"] <= found["high"]
    return {name: n / draws for name, n in hits.items()}


def alarms(draws, n, figures=("adherence", "slope", "survival"), exchanges=399):
    "Shares of draws in which two arms of one kind are called different."
    found = {name: 0 for name in figures}
    for draw in range(draws):
        ours, theirs = arms(np.random.default_rng(10**6 + draw), n, ARM, ARM)
        for name in figures: found[name] += outcome(figure_difference(name, ours, theirs, exchanges, seed=draw)) in ("better", "worse", "different")
    return {name: n / draws for name, n in found.items()}


@pytest.mark.parametrize("n", [15, 40])
def test_intervals_cover_the_truth(n, truth):
    found = coverage(200, n, truth)
    low, high = binom.ppf([0.0005, 0.9995], 200, 0.95) / 200  # what 200 draws can tell of 95 %
    assert all(low - 0.01 <= share <= high + 0.01 for share in found.values()), found


def test_equal_arms_look_equal():
    found = alarms(200, 30)
    assert all(share <= binom.ppf(0.999, 200, 0.05) / 200 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("n", [15, 40, 120])
def test_a_thousand_draws_cover_within_two_points(n, truth):
    found = coverage(1000, n, truth)
    print(n, found)
    assert all(0.93 <= share <= 0.97 for share in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("n", [15, 40])
def test_a_thousand_equal_pairs_are_rarely_called_different(n):
    found = alarms(1000, n)
    print(n, found)
    assert all(share <= 0.06 for share in found.values()), found


def rows_of(n, n_turns, seed, arm="base", unknown=0.0, rules=3):
    "Random verdicts of a few rules."
    rng = random.Random(seed)
    say = lambda: None if rng.random() < unknown else rng.random() < 0.85
    return [dict(arm=arm, history="own", dialogue_id=f"d{d}", conversation_id=f"c{d // 2}", turn=t, rule_id=f"r{r}", constraint_id=f"r{r}", type="tone",
                 satisfied=say(), applicable=True) for d in range(n) for t in range(1, n_turns + 1) for r in range(rules)]


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_of_the_plain_functions(seed):
    rows = rows_of(11, 5, seed)
    random.Random(seed).shuffle(rows)
    found = tally(rows)["base", "own"]
    assert merit("csr", found)["mean"] == pytest.approx(csr(rows))
    assert merit("adherence", found)["mean"] == pytest.approx(isr(rows))
    assert merit("ssr", found)["mean"] == pytest.approx(ssr(rows))


@pytest.mark.parametrize("seed", range(5))
def test_survival_is_scipys_with_unreadable_verdicts_as_censoring(seed):
    rows = rows_of(40, 9, seed, unknown=0.02)
    dialogues, times, events = {}, [], []
    for row in rows: dialogues.setdefault(row["dialogue_id"], {}).setdefault(row["turn"], []).append(row["satisfied"])
    for turns in dialogues.values():
        first = next((t for t, said in turns.items() if False in said or None in said), None)
        broken = first is not None and False in turns[first]
        times.append(first if broken else (first or 10) - 1), events.append(broken)
    times, events = np.array(times), np.array(events)
    theirs = ecdf(CensoredData(uncensored=times[events], right=times[~events])).sf
    for row in survival(tally(rows)["base", "own"]): assert row["mean"] == pytest.approx(float(theirs.evaluate(row["turn"])))


def test_one_conversation_has_figures_but_no_intervals():
    found = merits(tally(rows_of(2, 6, 0))["base", "own"])
    assert found["mean"] is not None and found["low"] is None and found["figures"]["slope"]["low"] is None
    assert all(row["low"] is None for row in found["survival"])


@pytest.mark.parametrize("said, adherence", [(True, 1.0), (False, 0.0)])
def test_all_or_nothing_keeps_an_interval(said, adherence):
    rows = [{**row, "satisfied": said} for row in rows_of(40, 6, 0)]
    found = merit("adherence", tally(rows)["base", "own"])
    assert found["mean"] == adherence and 0 < found["high"] - found["low"] < 0.25
    assert half_life(tally(rows)["base", "own"])["mean"] is None
    assert merit("slope", tally(rows)["base", "own"])["low"] is None


@pytest.mark.parametrize("said", [True, False])
def test_two_perfect_arms_are_not_proved_alike(said):
    rows = [{**row, "satisfied": said, "arm": arm} for arm in ("base", "other") for row in rows_of(12, 4, 0)]
    found = figure_difference("adherence", *tally(rows).values())
    assert found["low"] < -0.05 and found["high"] > 0.05 and outcome(found) == "open"


def test_figures_do_not_depend_on_the_order_of_rows_or_on_other_arms():
    rows = rows_of(12, 6, 1, unknown=0.05)
    shuffled = rows_of(12, 6, 2, arm="other") + random.Random(3).sample(rows, len(rows))
    one, two = (merits(tally(given)["base", "own"])["figures"] for given in (rows, shuffled))
    close = lambda a, b: a == b if a is None or isinstance(a, str) else a == pytest.approx(b)
    for name in set(one) - {"half_life"}: assert all(close(one[name][key], two[name][key]) for key in one[name]), name


def test_an_arm_against_its_twin_and_its_copy():
    rows = rows_of(20, 6, 0) + rows_of(20, 6, 1, arm="twin")
    for row in arm_differences(tally(rows), "base", draws=200):
        assert row["mean"] is None or row["p"] > 0.05, row
    rows = rows_of(20, 6, 0) + [row | {"arm": "copy"} for row in rows_of(20, 6, 0)]
    for row in arm_differences(tally(rows), "base", draws=200):
        assert (row["mean"], row["p"]) == (0, 1) and (row["low"] is None or row["low"] < 0 < row["high"]), row


def test_runs_without_a_common_dialogue_are_refused(tmp_path):
    from s3ft_nb.core.files import write_rows
    write_rows(tmp_path / "a/verdicts.jsonl", rows_of(4, 3, 0))
    write_rows(tmp_path / "b/verdicts.jsonl", [row | {"dialogue_id": "x" + row["dialogue_id"]} for row in rows_of(4, 3, 0)])
    with pytest.raises(InputError, match="share no judged turn"): compare_runs([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="cannot be read"): compare_runs([tmp_path / "a", tmp_path / "c"])
