"""Do the intervals of `core.stats` cover? 1,000 simulated draws a cell; writes the table that the chapter shows.

    python tests/benchmarks/bench_coverage.py            # data/coverage.csv, a minute on one core

Conversations have effects of their own (beta-binomial, intra-cluster correlation .1, .25 or .4), 6 to 10 turns, and rates that fall from turn to turn. Truth is the same quantity of 150,000 conversations.
"""

import csv
import sys
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import beta, norm

from s3ft_nb.core.stats import alpha_of, alpha_terms, contrast, exchange_p, interval, kappa_of, mover, over_seeds, ratio
from s3ft_nb.measure import metrics as m
from s3ft_nb.measure.verdicts import ABSENT

TURNS, SHORTEST, ICCS, RATES, SIZES = 10, 6, (0.1, 0.25, 0.4), (0.05, 0.5, 0.95), (15, 40)
GRID = np.linspace(0, 1, 1001)[1:-1]


@cache
def effects(size, mean):
    "Quantiles of the conversations' own rates."
    return beta.ppf(GRID, size * mean, size * (1 - mean))


@cache
def turn_rates(rate, drift=1.0):
    "Rates of the turns: the logit falls by `drift`; the mean over turns is `rate`."
    line, low, high = np.linspace(drift / 2, -drift / 2, TURNS), -15.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-middle - line))).mean() > rate: high = middle
        else: low = middle
    return 1 / (1 + np.exp(-low - line))


def played(rng, draws, n, *rates, shared=0.7, lengths=True):
    "Turn states (draws, conversations, turns) of one arm per rate; arms share conversations, lengths and part of the effects."
    effect, icc = rng.standard_normal((draws, n)), rng.integers(0, len(ICCS), (draws, n))
    until = rng.integers(SHORTEST, TURNS + 1, (draws, n)) if lengths else np.full((draws, n), TURNS)
    arms = []
    for rate in rates:
        u = norm.cdf(np.sqrt(shared) * effect + np.sqrt(1 - shared) * rng.standard_normal((draws, n)))
        states = np.full((draws, n, TURNS), ABSENT, dtype=np.int8)
        for turn, mean in enumerate(turn_rates(rate)):
            p = np.empty((draws, n))
            for i, rho in enumerate(ICCS):
                size = (1 - rho) / rho
                p[icc == i] = np.interp(u[icc == i], GRID, effects(size, float(mean)))
            states[..., turn] = np.where(turn < until, rng.random((draws, n)) < p, ABSENT)
        arms.append(states)
    return arms


@cache
def rate_giving(columns, of, target):
    "Adherence at which a metric of it has a wanted value."
    low, high = 1e-3, 1 - 1e-4
    for _ in range(14):
        rate = (low + high) / 2
        value = of(columns(played(np.random.default_rng(0), 1, 60_000, rate)[0]).sum(axis=-2))[0]
        low, high = (low, rate) if value > target else (rate, high)
    return rate


def labelled(rng, draws, n, error, raters=2, samples=5, labels=4):
    "Labels (draws, conversations, samples, raters): hard conversations have three times the errors of easy ones."
    truth = rng.choice(labels, (draws, n, samples), p=[0.5, 0.25, 0.15, 0.1])
    wrong = rng.random((draws, n, samples, raters)) < np.where(rng.random((draws, n)) < 0.3, 2.0, 0.6)[..., None, None] * error
    return truth, np.where(wrong, (truth[..., None] + rng.integers(1, labels, (draws, n, samples, raters))) % labels, truth[..., None])


def cells(a, b, labels=4):
    "(draws, conversations, labels²) confusion counts of labels (draws, conversations, samples)."
    return np.eye(labels**2)[a * labels + b].sum(axis=-2)


def alpha_table(said, labels=4):
    "(draws, conversations, 1 + labels) terms of alpha."
    counts = np.eye(labels)[said].sum(axis=-2)
    return alpha_terms(counts.reshape(-1, labels)).reshape(*counts.shape[:-1], 1 + labels).sum(axis=-2)


def macro_f1(sums, labels=4):
    "As in `classification`."
    table = sums.reshape(*sums.shape[:-1], labels, labels)
    both = table.sum(-1) + table.sum(-2)
    return (2 * np.diagonal(table, axis1=-2, axis2=-1) / np.maximum(both, 1)).sum(-1) / (both > 0).sum(-1)


def seeded(rng, seeds, n, rate, shared, arms=1, between=0.25, inside=(0.8, 0.6)):
    "Sums (seeds, conversations, 2 * arms) of six turns: effects of seeds, of conversations, and of both together, on the logit."
    conversation = inside[0] * rng.standard_normal((1 if shared else seeds, n, 1))
    line, columns = np.linspace(0.3, -0.3, 6), []
    for arm in range(arms):
        seed, both = between * rng.standard_normal((seeds, 1, 1)), inside[1] * rng.standard_normal((seeds, n, 1))
        middle = np.log(rate / (1 - rate)) + 0.6 * arm
        kept = rng.random((seeds, n, 6)) < 1 / (1 + np.exp(-middle - line - conversation - seed - both))
        columns += [kept.sum(-1), np.full((seeds, n), 6)]
    return np.stack(columns, -1)


def apart(table):
    "Each seed's conversations in rows of their own, (seeds, conversations, k) -> (seeds, seeds * conversations, k)."
    out = np.zeros((*table.shape[:1], *table.shape[:2], table.shape[2]))
    out[range(len(table)), range(len(table))] = table
    return out.reshape(len(table), -1, table.shape[2])


def coverage_over_seeds(draws, seed=0, seeds=(3, 5), n=60):
    "Rows as in `coverage`, for means over seeds."
    rows = []
    for name, arms, of, kind in (("adherence", 1, ratio, "rate"), ("difference", 2, lambda sums: ratio(sums[..., 2:]) - ratio(sums[..., :2]), "real")):
        for rate in (0.5, 0.85, 0.95) if arms == 1 else (0.5, 0.85):
            truth = of(seeded(np.random.default_rng(10**6 + seed), 20_000, 20, rate, False, arms).sum(axis=1)).mean()
            for k in seeds:
                for shared in (False, True):
                    rng, tables = np.random.default_rng([seed, k, shared]), lambda table: table if shared else apart(table)
                    found = [over_seeds(of, tables(seeded(rng, k, n, rate, shared, arms)), kind) for _ in range(draws)]
                    low, high = (np.array([row[end] for row in found], float) for end in ("low", "high"))
                    known = ~np.isnan(low)
                    part = lambda hit: round(100 * hit[known].mean(), 1)
                    rows.append({"quantity": f"{name}, {k} seeds, {'shared' if shared else 'own'} conversations", "level": rate,
                                 "truth": round(float(truth), 3), "conversations": n, "coverage": part((low <= truth) & (truth <= high)),
                                 "all too high": part(low > truth), "all too low": part(high < truth),
                                 "no interval": round(100 * (~known).mean(), 1), "width": round(float((high - low)[known].mean()), 3)})
    return rows


def quantities():
    "name -> (level shown, kind, of, (rng, draws, conversations) -> table, known truth or None)"
    out, turns = {}, lambda columns, rate, **how: lambda rng, draws, n: columns(played(rng, draws, n, rate, **how)[0])
    two = lambda columns, a, b: lambda rng, draws, n: np.concatenate([columns(x) for x in played(rng, draws, n, a, b)], axis=-1)
    at = lambda sums: m.survival(sums, SHORTEST)
    for rate in RATES:
        out["adherence", rate] = "rate", ratio, turns(m.adherence_columns, rate)
        out["one turn", rate] = "rate", ratio, lambda rng, draws, n, rate=rate: np.stack([rng.random((draws, n)) < rate, np.ones((draws, n))], -1)
        out["csr, two rules", rate] = "rate", ratio, lambda rng, draws, n, rate=rate: sum(map(m.adherence_columns, played(rng, draws, n, rate, rate)))
        out["area", rate] = "rate", m.area, turns(m.turn_columns, rate)
        out["slope", rate] = "contrast", m.slope, turns(m.turn_columns, rate)
        out["ssr", rate] = "rate", ratio, lambda rng, draws, n, rate=rate: turns(m.stability_columns, rate_giving(m.stability_columns, ratio, rate))(rng, draws, n)
        out["survival at turn 6", rate] = "rate", at, lambda rng, draws, n, rate=rate: turns(m.risk_columns, rate_giving(m.risk_columns, at, rate))(rng, draws, n)
        out["recovery", rate] = "rate", ratio, turns(m.recovery_columns, min(rate, 0.9))
        stances = np.arange(TURNS) % 2 * 2
        out["conflict", rate] = "real", m.METRICS["conflict"].of, turns(lambda states: m.conflict_columns(states, stances), rate)
        other = {0.05: 0.15, 0.5: 0.65, 0.95: 0.85}[rate]
        for name, columns, of in (("adherence", m.adherence_columns, ratio), ("area", m.turn_columns, m.area), ("slope", m.turn_columns, m.slope)):
            kind = "difference of slopes" if name == "slope" else "difference"
            out[f"difference of {name}, equal arms", rate] = kind, of, two(columns, rate, rate)
            out[f"difference of {name}, unequal arms", rate] = kind, of, two(columns, rate, other)
        out["win rate, ties one half", rate] = "rate", ratio, lambda rng, draws, n, rate=rate: (
            lambda a, b: np.stack([((a == 1) & (b == 1)).sum(-1) + 0.5 * ((a == 1) ^ (b == 1)).sum(-1), (a != ABSENT).sum(-1)], -1))(*played(rng, draws, n, rate, rate))
    for error in (0.25, 0.1, 0.03):
        pair = lambda rng, draws, n, error=error: cells(*np.moveaxis(labelled(rng, draws, n, error)[1], -1, 0))
        gold = lambda rng, draws, n, error=error: (lambda truth, said: cells(truth, said[..., 0]))(*labelled(rng, draws, n, error, raters=1))
        out["Cohen's kappa", error] = "agreement", kappa_of, pair
        out["Krippendorff's alpha", error] = "agreement", alpha_of, lambda rng, draws, n, error=error: alpha_table(labelled(rng, draws, n, error, raters=3)[1])
        out["accuracy", error] = "rate", lambda sums: sums[..., ::5].sum(-1) / sums.sum(-1), gold
        out["macro-F1", error] = "rate", macro_f1, gold
        if error > 0.05: out["precision", error] = "rate", lambda sums: sums[..., 0] / sums[..., ::4].sum(-1), gold
    out["mean of a real number", ""] = "real", ratio, lambda rng, draws, n: np.stack(
        [np.exp(0.3 * rng.standard_normal((draws, n, 1)) + 0.5 * rng.standard_normal((draws, n, TURNS))).sum(-1), np.full((draws, n), TURNS)], -1)
    return out


def sides(kind, of, table):
    "(value, low, high) of a quantity, leading axes draws."
    if not kind.startswith("difference"): return interval(of, table, kind)[:3]
    k = table.shape[-1] // 2
    if kind != "difference": return interval(lambda sums: contrast(of(sums[..., :k])) - contrast(of(sums[..., k:])), table, "real")[:3]
    a, b = (interval(of, part, "rate", 0.95, 0.5) for part in (table[..., :k], table[..., k:]))
    return a[0] - b[0], *mover(a[:3], b[:3], a[3], b[3])


def coverage(draws, only="", seed=0):
    "Rows {quantity, level, conversations, coverage, below, above, none, width} in per cent of draws."
    rows = []
    for (name, level), (kind, of, make) in quantities().items():
        if only and not name.startswith(only): continue
        truth = sides(kind, of, make(np.random.default_rng(10**6 + seed), 1, 150_000).astype(float))[0][0]
        for n in SIZES:
            _, low, high = sides(kind, of, make(np.random.default_rng([seed, n]), draws, n).astype(float))
            known = ~np.isnan(low)
            share = lambda hit: round(100 * hit[known].mean(), 1) if known.any() else None
            rows.append({"quantity": name, "level": level, "truth": round(float(truth), 3), "conversations": n,
                         "coverage": share((low <= truth) & (truth <= high)), "all too high": share(low > truth), "all too low": share(high < truth),
                         "no interval": round(100 * (~known).mean(), 1), "width": round(float((high - low)[known].mean()), 3) if known.any() else None})
    return rows


if __name__ == "__main__":
    draws, only = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, sys.argv[2] if len(sys.argv) > 2 else ""
    rows = [*(coverage(draws, only) if only != "seeds" else ()), *(coverage_over_seeds(draws) if only in ("", "seeds") else ())]
    for row in rows: print(*row.values(), "" if row["coverage"] and 93 <= row["coverage"] <= 97 else " <<", sep="\t", flush=True)
    if len(sys.argv) > 1: sys.exit()
    path = Path(__file__).parents[2] / "data/coverage.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
