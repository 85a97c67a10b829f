"Do the intervals cover, do equal arms look equal, and do the statistics agree with other packages?"

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from s3ft_nb.core.files import resource
from s3ft_nb.core.stats import RATE, classification, cluster_sums, cohen_kappa, difference, estimate_sums, fleiss_kappa, holm, over_seeds
from s3ft_nb.core.stats import krippendorff_alpha, paired_difference, rate, wilson

ROOT = Path(__file__).parent
spec = importlib.util.spec_from_file_location("bench_coverage", ROOT / "benchmarks/bench_coverage.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)

KNOWN = {("recovery", "0.95", "15")}  # few turns follow a violation there: covers more than it says


def test_the_shown_table_covers_as_it_says():
    rows = list(csv.DictReader(resource("data", "coverage.csv").open()))
    assert len(rows) > 100
    off = [row for row in rows if not 93 <= float(row["coverage"]) <= 97 and (row["quantity"], row["level"], row["conversations"]) not in KNOWN]
    assert len(off) <= 0.1 * len(rows), off
    for row in off: assert 91.5 <= float(row["coverage"]) <= 98.5, row  # 1,000 draws tell 95 from 93.5 at best


@pytest.mark.parametrize("only", ["adherence", "one turn", "difference of adherence"])
def test_a_quick_part_of_the_table(only):
    low, high = binom.ppf([0.0005, 0.9995], 400, 0.95) / 4
    for row in bench.coverage(400, only, seed=3): assert low - 1 <= row["coverage"] <= high + 1.5, row


def test_a_quick_part_of_the_table_over_seeds():
    low, high = binom.ppf([0.0005, 0.9995], 200, 0.95) / 2
    for row in bench.coverage_over_seeds(200, seed=5, n=30): assert low <= row["coverage"] <= high + 1, row
    three, five = ([row["width"] for row in bench.coverage_over_seeds(40, seeds=(k,))] for k in (3, 5))
    assert np.mean(three) > 1.4 * np.mean(five)


def test_conversations_shared_by_seeds_do_not_average_out():
    "Over ever more seeds the interval shrinks to that of the conversations, not to nothing; that of a paired difference does shrink."
    rng = np.random.default_rng(0)
    table = bench.seeded(rng, 60, 40, 0.8, True, arms=2, between=0.1)
    whole = lambda of, k: (lambda found: found["high"] - found["low"])(over_seeds(of, table[:k]))
    one = lambda sums: sums[..., 0] / sums[..., 1]
    own = [bench.apart(bench.seeded(rng, 60, 40, 0.8, False, between=0.1))]
    assert whole(one, 60) > 0.8 * whole(one, 20) and whole(one, 60) > 2.5 * (lambda f: f["high"] - f["low"])(over_seeds(one, own[0]))
    assert whole(lambda sums: one(sums) - one(sums[..., 2:]), 60) < 0.75 * whole(lambda sums: one(sums) - one(sums[..., 2:]), 20)


@pytest.mark.slow
def test_the_whole_table():
    rows = bench.coverage(1000, seed=7)
    assert np.mean([93 <= row["coverage"] <= 97 for row in rows]) > 0.85
    wrong = [row for row in rows if not 91.5 <= row["coverage"] <= 99.5]  # above: rare events in 15 conversations
    assert not wrong, wrong


def test_intervals_that_ignore_clusters_would_not_cover():
    states, = bench.played(np.random.default_rng(0), 400, 40, 0.5)
    kept, n = (states == 1).sum((1, 2)), (states >= 0).sum((1, 2))
    truth = (bench.played(np.random.default_rng(1), 1, 50_000, 0.5)[0] == 1).sum() / (bench.played(np.random.default_rng(1), 1, 50_000, 0.5)[0] >= 0).sum()
    assert np.mean([low <= truth <= high for low, high in map(wilson, kept, n)]) < 0.88


def test_equal_arms_are_rarely_called_different():
    called = 0
    for draw in range(150):
        a, b = (bench.m.turn_columns(x[0]) for x in bench.played(np.random.default_rng(draw), 1, 15, 0.5, 0.5))
        ps = []
        for of in (lambda s: s[..., :10].sum(-1) / s[..., 10:].sum(-1), bench.m.area, lambda s: bench.contrast(bench.m.slope(s))):
            ps.append(bench.exchange_p(of, a, b, draws=400, seed=draw))
        called += min(holm(ps)) < 0.05
    assert called / 150 <= binom.ppf(0.995, 150, 0.05) / 150


def test_permutation_p_is_uniform_without_difference():
    rng, ps = np.random.default_rng(2), []
    for seed in range(300):
        names = np.repeat(np.arange(20), 4)
        a, b = rng.random((2, 80)) < rng.beta(2, 2, 20)[names]
        ps.append(paired_difference(a, b, names, seed=seed)["p"])
    assert 0.01 <= np.mean(np.array(ps) <= 0.05) <= 0.08 and 0.45 < np.mean(ps) < 0.62


def test_exact_copies_and_constant_arms():
    names, ones = list("aabbccdd"), [1] * 8
    same = paired_difference(ones, ones, names)
    assert (same["mean"], same["low"], same["p"]) == (0, None, 1)
    both = difference(RATE, (ones, names), (ones, names))
    assert both["low"] < -0.05 and both["high"] > 0.05 and both["p"] == 1  # two perfect arms are not proved equal
    assert rate(ones, names)["low"] < 0.7 and rate([0] * 8, names)["high"] > 0.3
    assert paired_difference([3.0] * 8, [0.0] * 8, names)["low"] is None


@pytest.mark.parametrize("n", [1, 2, 20_000])
def test_any_number_of_clusters(n):
    values = np.random.default_rng(3).integers(0, 2, n)
    found = rate(values, np.arange(n))
    if n == 1: assert found["low"] is None
    else: assert found["low"] <= found["mean"] <= found["high"]
    if n == 20_000: assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5 / n**0.5, rel=0.01)


def test_order_and_names_of_clusters_do_not_matter():
    rng = np.random.default_rng(0)
    values, names = rng.random(60) < 0.7, np.repeat(np.arange(12), 5)
    order = rng.permutation(60)
    one, two = rate(values, names), rate(values[order], [f"c{99 - name}" for name in names[order]])
    assert one == pytest.approx(two)


def test_agreement_of_published_tables():
    # Krippendorff 2011, section C: four observers, twelve units, gaps
    lines = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    counts = np.array([[sum(line[u] == str(v) for line in lines) for v in range(1, 6)] for u in range(12)])
    assert krippendorff_alpha(counts)["mean"] == pytest.approx(0.743, abs=5e-4)
    # Fleiss 1971, table 1: six psychiatrists, thirty patients
    table = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
    00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
    assert fleiss_kappa([[int(n) for n in patient] for patient in table.split()])["mean"] == pytest.approx(0.430, abs=5e-4)


def test_kappa_and_classification_are_those_of_scikit_learn():
    library = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(5):
        a = rng.integers(0, 4, 80)
        b = np.where(rng.random(80) < 0.6, a, rng.integers(0, 5, 80))
        assert cohen_kappa(list(a), list(b))["mean"] == pytest.approx(library.cohen_kappa_score(a, b))
        found = classification(list(a), list(b), labels=list(range(5)))
        assert found["accuracy"]["mean"] == pytest.approx(library.accuracy_score(a, b))
        assert found["macro_f1"]["mean"] == pytest.approx(library.f1_score(a, b, average="macro", zero_division=0))
        assert found["precision_1"]["mean"] == pytest.approx(library.precision_score(a, b, labels=[1], average="macro"))
        assert found["recall_2"]["mean"] == pytest.approx(library.recall_score(a, b, labels=[2], average="macro"))


def test_alpha_is_that_of_the_krippendorff_package():
    library = pytest.importorskip("krippendorff", reason="pip install krippendorff for this comparison")
    rng = np.random.default_rng(0)
    table = rng.integers(0, 5, (4, 60)).astype(float)
    table[1:] = np.where(rng.random((3, 60)) < 0.7, table[0], table[1:])
    table[rng.random(table.shape) < 0.2] = np.nan
    counts = np.array([[(column == v).sum() for v in range(5)] for column in table.T])
    assert krippendorff_alpha(counts)["mean"] == pytest.approx(library.alpha(table, level_of_measurement="nominal"), abs=1e-6)


def test_sums_of_rows_are_all_that_counts():
    table = cluster_sums([[1, 1], [0, 1], [1, 1], [1, 1]], list("abab"))
    assert estimate_sums(lambda s: s[..., 0] / s[..., 1], table, 4) == rate([1, 0, 1, 1], list("abab"))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_few_or_uniform_rows_have_a_wide_interval_or_none(n):
    "Clusters that are alike, agreement without exception, opposite raters, a single label: never an interval of no width."
    names, wide = np.repeat(np.arange(n), 2), lambda found: found["low"] is None or found["high"] - found["low"] > 0.15
    one, two = ["x", "y"] * n, ["x", "y", "y"] * n
    found = [rate([1, 0] * n, names), rate([1] * 2 * n, names), cohen_kappa(one, one, names), cohen_kappa(one, one[::-1], names), cohen_kappa(["x"] * n, ["x"] * n),
             cohen_kappa(two, ["x", "y", "x"] * n, np.repeat(np.arange(n), 3)), difference(RATE, ([1, 0] * n, names), ([0, 1] * n, names)), fleiss_kappa([[1, 1]] * n), krippendorff_alpha([[2, 0], [0, 2]] * n, names),
             *classification(["x", "y"] * n, ["x", "x"] * n, ["x", "y"], names).values()]
    assert all(map(wide, found)), [one for one in found if not wide(one)]
