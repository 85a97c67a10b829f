"Statistics of annotation against published figures, reference libraries, independent definitions and simulations."
import csv
import json
import random
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import minimize
from scipy.sparse import csr_array

from s3ft_nb.annotation.consensus import adjudication, consensus_labels, dawid_skene, error_rates_of, fit_votes, gold_report, label_noise
from s3ft_nb.annotation.agreement import alpha, alpha_interval, alpha_of_sums, fleiss, kappa, kappa_interval, kappa_of_tables, pair_terms, per_label
from s3ft_nb.annotation.task import majority, simulate
from s3ft_nb.annotation.argilla import from_argilla, to_argilla
from s3ft_nb.annotation.effort import annotator_drift, learning_curve
from s3ft_nb.annotation.exchange import answer_rows, write_csv
from s3ft_nb.annotation.exchange import STUDIO_PAIRS, character_offset, from_label_studio, label_studio_config, to_label_studio, utf16_offset
from s3ft_nb.annotation.paper import from_paper, to_paper
from s3ft_nb.annotation.preference import Outcome, abilities, bradley_terry, position_bias, win_tie_loss
from s3ft_nb.judging.rubric import LABELS
from s3ft_nb.annotation.sampling import annotation_design, design_facts, mix_gold, next_most_useful, overlap
from s3ft_nb.core.stage import Ledger
from s3ft_nb.core.records import Annotation, Message, Sample, Score
from s3ft_nb.core.files import InputError

# Krippendorff 2011, section C: four observers, twelve units, gaps
RELIABILITY = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
# Fleiss 1971, table 1: six psychiatrists, thirty patients; depression, personality disorder, schizophrenia, neurosis, other
DIAGNOSES = """00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031
00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"""
# Dawid and Skene 1979, table 1: five anaesthetists, 45 patients; the first read each case three times
READINGS = """111 1 1 1 1|333 4 3 3 4|112 2 1 2 2|222 3 1 2 1|222 3 2 2 2|222 3 3 2 2|122 2 1 1 1|333 3 4 3 3|222 2 2 2 3|232 2 2 2 3
444 4 4 4 4|222 3 3 4 3|111 1 1 1 1|222 3 2 1 2|121 1 1 1 1|111 2 1 1 1|111 1 1 1 1|111 1 1 1 1|222 2 2 2 1|222 1 3 2 2
222 2 2 2 2|222 2 2 2 1|222 3 2 2 2|221 2 2 2 2|111 1 1 1 1|111 1 1 1 1|232 2 2 2 2|111 1 1 1 1|111 1 1 1 1|112 1 1 2 1
111 1 1 1 1|333 3 2 3 3|111 1 1 1 1|222 2 2 2 2|222 3 2 3 2|433 4 3 4 3|221 2 2 3 2|232 3 2 3 3|333 3 4 3 2|111 1 1 1 1
111 1 1 1 1|121 2 1 1 1|232 2 2 2 2|121 1 1 1 1|222 2 2 2 2""".replace("\n", "|").split("|")
VOTES = [(i, j, int(grade) - 1) for i, patient in enumerate(READINGS) for j, grades in enumerate(patient.split()) for grade in grades]
# Stigler 1994, as in Turner and Firth's BradleyTerry2: citations among Biometrika, Comm. Statist., JASA, JRSS-B
CITED = np.array([[0, 730, 498, 221], [33, 0, 68, 17], [320, 813, 0, 142], [284, 276, 325, 0.0]])


def rows_of(matrix):
    return [Annotation(sample_id=f"u{u:02}", annotator="ABCD"[a], label=LABELS[int(value) - 1]) for a, row in enumerate(matrix) for u, value in enumerate(row) if value != "."]


def anaesthesia():
    return csr_array((np.ones(len(VOTES)), ([i for i, _, _ in VOTES], [4 * j + k for _, j, k in VOTES])), shape=(45, 20))


# ------------------------------------------------------------------ published figures and references, to 1e-6

def test_alpha_of_krippendorffs_example():
    n_c, agreed, n = np.array([9, 13, 10, 5, 3]), 7 + 10 + 8 + 4 + 3, 40  # his coincidence matrix: margins, diagonal, total
    exact = ((n - 1) * agreed - (n_c * (n_c - 1)).sum()) / (n * (n - 1) - (n_c * (n_c - 1)).sum())  # his formula for nominal data
    assert alpha(rows_of(RELIABILITY)) == pytest.approx(exact, abs=1e-9) == pytest.approx(0.743, abs=5e-4)


def test_alpha_is_that_of_the_krippendorff_package():
    library = pytest.importorskip("krippendorff", reason="pip install krippendorff for this comparison")
    rng = np.random.default_rng(0)
    for _ in range(10):
        table = rng.integers(0, 5, (4, 60)).astype(float)
        table[1:] = np.where(rng.random((3, 60)) < 0.7, table[0], table[1:])
        table[rng.random(table.shape) < 0.2] = np.nan
        rows = [Annotation(sample_id=f"{u}", annotator=f"{a}", label=LABELS[int(v)]) for (a, u), v in np.ndenumerate(table) if np.isfinite(v)]
        assert alpha(rows) == pytest.approx(library.alpha(table, level_of_measurement="nominal"), abs=1e-6)


def test_fleiss_own_table():
    ratings = np.array([[int(n) for n in patient] for patient in DIAGNOSES.split()])
    p, agreed = np.array([26, 26, 30, 55, 43]) / 180, ((ratings**2).sum() - 180) / (30 * 6 * 5)  # his equations 3 and 7, from his column totals
    assert fleiss(ratings) == pytest.approx((agreed - (p**2).sum()) / (1 - (p**2).sum()), abs=1e-9) == pytest.approx(0.430, abs=5e-4)


def test_kappa_is_that_of_scikit_learn():
    library = pytest.importorskip("sklearn.metrics", reason="pip install scikit-learn for this comparison")
    rng = np.random.default_rng(0)
    for _ in range(10):
        a = rng.integers(0, 5, 80)
        b = np.where(rng.random(80) < 0.6, a, rng.integers(0, 5, 80))
        assert kappa(list(a), list(b)) == pytest.approx(library.cohen_kappa_score(a, b), abs=1e-6)


def test_kappa_of_a_published_table():
    table = np.array([[88, 14, 18], [10, 40, 10], [2, 6, 12.0]])  # Cohen 1960, table 1 (of 200): agreement 0.70, chance 0.41
    a, b = [list(side) for side in zip(*[(i, j) for (i, j), n in np.ndenumerate(table) for _ in range(int(n))])]
    assert kappa(a, b) == pytest.approx((0.70 - 0.41) / (1 - 0.41), abs=1e-6) == pytest.approx(float(kappa_of_tables(table)), abs=1e-12)


def slow_dawid_skene(votes, n_items, n_people, n_labels, steps):
    "The equations of 1979, loop by loop."
    T = np.zeros((n_items, n_labels))
    for i, _, k in votes: T[i, k] += 1
    T /= T.sum(1, keepdims=True)
    for _ in range(steps):
        p, pi = T.mean(0), np.zeros((n_people, n_labels, n_labels))
        for i, j, k in votes: pi[j, :, k] += T[i]
        for j in range(n_people):
            for q in range(n_labels): pi[j, q] /= max(pi[j, q].sum(), 1e-300)
        T = np.tile(p, (n_items, 1))
        for i, j, k in votes: T[i] *= pi[j, :, k]
        T /= T.sum(1, keepdims=True)
    return T, p, pi


def test_dawid_skene_is_its_equations_and_its_paper():
    posterior, prior, confusion, likelihood, _, settled = fit_votes(anaesthesia(), 4, tol=1e-13)
    T, p, pi = slow_dawid_skene(VOTES, 45, 5, 4, 300)
    assert settled and np.abs(posterior - T).max() < 1e-6 and np.abs(prior - p).max() < 1e-6 and np.abs(confusion.transpose(1, 0, 2) - pi).max() < 1e-6
    assert np.round(prior, 2).tolist() == [0.40, 0.42, 0.11, 0.07]  # the paper's class shares
    assert np.round(confusion[:3, 0], 2).tolist() == [[0.89, 0.11, 0, 0], [0.07, 0.88, 0.05, 0], [0, 0.34, 0.66, 0]]  # and its first observer
    # crowd-kit 1.4.2, DawidSkene(n_iter=500, tol=-inf)
    assert prior == pytest.approx([0.39955475, 0.42198339, 0.11179519, 0.06666667], abs=1e-6)
    assert posterior[29, 1] == pytest.approx(8.54124633e-04, abs=1e-6)


def test_dawid_skene_is_that_of_crowd_kit():
    library = pytest.importorskip("crowdkit.aggregation", reason="pip install crowd-kit for this comparison")
    import pandas
    frame = pandas.DataFrame(VOTES, columns=["task", "worker", "label"])
    for steps in (1, 3, 100):
        theirs = library.DawidSkene(n_iter=steps, tol=-np.inf).fit(frame)
        ours = fit_votes(anaesthesia(), 4, max_steps=steps, tol=-1)[0]
        assert np.abs(theirs.probas_.sort_index()[[0, 1, 2, 3]].to_numpy() - ours).max() < 1e-6


def test_bradley_terry_is_its_likelihood_and_the_published_fit():
    def loss(t):
        t = np.r_[0, t]
        return (CITED * np.logaddexp(0, t[None] - t[:, None])).sum()
    assert abilities(CITED)[1:] == pytest.approx([-2.94907, -0.47957, 0.26895], abs=5e-6)
    assert abilities(CITED)[1:] == pytest.approx(minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x, abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(5):
        wins = rng.integers(1, 9, (5, 5)) * (1 - np.eye(5))
        p = 1 / (1 + np.exp(-np.subtract.outer(abilities(wins), abilities(wins))))
        assert ((wins + wins.T) * p).sum(1) == pytest.approx(wins.sum(1), abs=1e-6)  # expected wins are those seen: the equations of 1952


def test_bradley_terry_is_that_of_choix():
    library = pytest.importorskip("choix", reason="pip install choix for this comparison")
    games = [(i, j) for (i, j), n in np.ndenumerate(CITED.astype(int)) for _ in range(n)]
    theirs = library.opt_pairwise(4, games, tol=1e-12)
    assert abilities(CITED) == pytest.approx(theirs - theirs[0], abs=1e-6)


# ------------------------------------------------------------------ intervals that cover

def say(rng, n, prior, errors):
    "Counts of labels by annotators who err at known rates."
    truth, counts = rng.choice(len(prior), n, p=prior), np.zeros((n, len(prior)))
    for rate in errors:
        counts[np.arange(n), np.where(rng.random(n) < rate, (truth + rng.integers(1, len(prior), n)) % len(prior), truth)] += 1
    return counts


def annotations_of(counts):
    return [Annotation.model_construct(sample_id=i, annotator=a, label=LABELS[k]) for i, row in enumerate(counts.astype(int)) for a, k in enumerate(np.repeat(np.arange(5), row))]


@pytest.mark.parametrize("n, prior, errors", [(100, [0.5, 0.1, 0.25, 0.05, 0.1], (0.03, 0.06, 0.1)), (150, [0.7, 0.03, 0.2, 0.02, 0.05], (0.1, 0.2))])
def test_alpha_interval_covers_the_truth(n, prior, errors):
    rng = np.random.default_rng(7)
    true = alpha_of_sums(pair_terms(say(rng, 1_000_000, prior, errors)).sum(0))
    found = [alpha_interval(annotations_of(say(rng, n, prior, errors)), draws=500, seed=s) for s in range(500)]
    assert 0.93 <= np.mean([low <= true <= high for _, low, high in found]) <= 0.97


def test_alpha_interval_covers_clustered_samples():
    rng, hits, naive = np.random.default_rng(3), [], []
    def draw(n):  # five samples of a conversation: all hard, or all easy
        hard = rng.random(n) < 0.3
        return np.concatenate([say(rng, 5, [0.5, 0.1, 0.25, 0.05, 0.1], (0.5, 0.5) if one else (0.02, 0.02)) for one in hard])
    true = alpha_of_sums(pair_terms(draw(30_000)).sum(0))
    for s in range(200):
        rows = annotations_of(draw(60))
        _, low, high = alpha_interval(rows, draws=300, seed=s, clusters={i: i // 5 for i in range(300)})
        hits.append(low <= true <= high)
        _, low, high = alpha_interval(rows, draws=300, seed=s)
        naive.append(low <= true <= high)
    assert np.mean(hits) > 0.9 > np.mean(naive)


def test_kappa_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    def draw(n):
        truth = rng.integers(0, 3, n)
        return [np.where(rng.random(n) < 0.2, rng.integers(0, 3, n), truth) for _ in "ab"]
    true = kappa(*map(list, draw(300_000)))
    found = [kappa_interval(*map(list, draw(80)), draws=400, seed=s) for s in range(300)]
    assert 0.92 <= np.mean([low <= true <= high for _, low, high in found]) <= 0.98


def test_learning_curve_interval_covers_the_gain():
    rng, sizes, hits = np.random.default_rng(0), (50, 100, 200, 400, 800), []
    score = lambda n: 0.9 - 3 * n**-0.5
    for s in range(150):
        found = learning_curve([{"n": n, "score": score(n) + rng.normal(0, 0.02)} for n in sizes for _ in range(3)], 800, draws=300, seed=s)
        hits.append(found["gain"]["low"] <= score(1600) - score(800) <= found["gain"]["high"])
    assert np.mean(hits) >= 0.9


def judged(rng, n_dialogues, lead, spread, turns=4):
    rows = []
    for d in range(n_dialogues):
        own = lead + rng.normal(0, spread)
        for t in range(turns):
            arms = ("a", "b") if rng.random() < 0.5 else ("b", "a")
            winner = "tie" if rng.random() < 0.2 else "a" if rng.random() < 1 / (1 + np.exp(-own)) else "b"
            rows.append(Outcome(f"{d}-{t}", f"d{d}", t + 1, "ann", arms, "tie" if winner == "tie" else "first" if winner == arms[0] else "second"))
    return rows


def test_preference_intervals_cover_and_the_test_keeps_its_level():
    rng, covered, ranked, false_alarms, naive = np.random.default_rng(0), [], [], [], []
    many = judged(rng, 20_000, 0.0, 2.0)
    true = np.mean([0 if one.winner is None else 1 if one.winner == "a" else -1 for one in many])
    for s in range(200):
        rows = judged(rng, 50, 0.0, 2.0)
        found = win_tie_loss(rows, "a", "b", draws=300, seed=s)
        covered.append(found["net"]["low"] <= true <= found["net"]["high"])
        ability = bradley_terry(rows, "a", draws=300, seed=s)["arms"]["b"]
        ranked.append(ability["low"] <= 0 <= ability["high"])
        false_alarms.append(found["sign_test"]["p"] < 0.05)
        sign = np.array([0 if one.winner is None else 1 if one.winner == "a" else -1 for one in rows])
        naive.append(abs(sign.mean()) > 1.96 * sign.std() / np.sqrt(len(sign)))
    assert 0.9 <= np.mean(covered) <= 0.98 and 0.9 <= np.mean(ranked) <= 0.98
    assert np.mean(false_alarms) < 0.09 < np.mean(naive)  # turns counted as independent would cry wolf


# ------------------------------------------------------------------ aggregation

def test_dawid_skene_beats_the_majority_with_a_careless_annotator():
    better = []
    for seed in range(6):
        rng = random.Random(seed)
        truth = {f"s{i}": rng.choice(LABELS[:1] * 5 + LABELS[2:3] * 3 + LABELS[1:2] + LABELS[4:]) for i in range(400)}
        rows = [row for a, rate in zip("abc", (0.05, 0.1, 0.4)) for row in simulate(truth, a, rate, seed)]
        right = lambda labels: np.mean([labels[id] == label for id, label in truth.items()])
        better.append(right(consensus_labels(dawid_skene(rows), 0)) - right(majority(rows)))
    assert min(better) > 0


def test_label_noise_finds_the_simulated_rates():
    hits = []
    for seed in range(8):
        truth = {f"s{i}": LABELS[i * 7 % 5] for i in range(500)}
        rows = [row for a, rate in zip("abc", (0.05, 0.1, 0.2)) for row in simulate(truth, a, rate, seed)]
        found = label_noise(rows, draws=40, seed=seed)["annotators"]
        hits += [found[a]["low"] - 0.01 <= rate <= found[a]["high"] + 0.01 for a, rate in zip("abc", (0.05, 0.1, 0.2))]
    assert np.mean(hits) >= 0.85


def test_votes_in_any_order_give_the_same():
    truth = {f"s{i}": LABELS[i % 5] for i in range(60)}
    rows = simulate(truth, "a", 0.2, 0) + simulate(truth, "b", 0.2, 0) + simulate(truth, "c", 0.2, 0)
    mixed = random.Random(0).sample(rows, len(rows))
    one, two = consensus_labels(dawid_skene(rows)), consensus_labels(dawid_skene(mixed))
    assert one == two
    queues = [adjudication(given, dawid_skene(given)) for given in (rows, mixed)]
    assert queues[0] and [row["sample_id"] for row in queues[0]] == [row["sample_id"] for row in queues[1]]


def test_sixty_thousand_votes_take_seconds():
    rng, start = np.random.default_rng(0), time.time()
    truth = rng.integers(0, 5, 20_000)
    rows = [Annotation.model_construct(sample_id=i, annotator=f"a{(i + j) % 10}", label=LABELS[k if rng.random() < 0.85 else (k + 1) % 5]) for i, k in enumerate(truth) for j in range(3)]
    found = dawid_skene(rows)
    assert found.settled and np.mean(found.posterior.argmax(1) == truth) > 0.9
    assert time.time() - start < 20


def test_one_vote_one_person_one_label():
    alone = [Annotation(sample_id="s", annotator="a", label="good")]
    with pytest.raises(InputError, match="labels by two people"): dawid_skene(alone)
    with pytest.raises(InputError, match="labels by two people"): label_noise([])
    assert consensus_labels(dawid_skene(alone, gold={"s": "good"})) == {"s": "good"}
    assert gold_report(alone, {"s": "good"})["a"]["accuracy"] == 1
    unanimous = [Annotation(sample_id=f"s{i}", annotator=a, label="good") for i in range(9) for a in "abc"]
    found = dawid_skene(unanimous)
    assert error_rates_of(found.prior, found.confusion).max() < 0.1 and not adjudication(unanimous, found)
    assert alpha_interval(unanimous) == (None, None, None)
    assert per_label(unanimous)["good"]["agreement"] == 1


def test_lone_labels_keep_their_word_where_a_share_is_labelled_twice():
    truth = {f"s{i}": LABELS[(0, 0, 0, 2, 1)[i % 5]] for i in range(600)}
    names = ("a", "b", "c")
    dealt = overlap(list(truth), names, 3, seed=0, share=0.25)
    rows = [row for name, rate in zip(names, (0.05, 0.1, 0.15)) for row in simulate({id: truth[id] for id in dealt[name]}, name, rate, 0)]
    labels, said = consensus_labels(dawid_skene(rows), 0), Counter(row.sample_id for row in rows)
    lone = [row for row in rows if said[row.sample_id] == 1]
    assert np.mean([labels[row.sample_id] == row.label for row in lone]) > 0.9
    assert np.mean([labels[row.sample_id] == truth[row.sample_id] for row in lone]) >= np.mean([row.label == truth[row.sample_id] for row in lone]) - 0.01


# ------------------------------------------------------------------ designs

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.data())
def test_overlap_is_even(n, m, data):
    k, share, seed = data.draw(st.integers(1, m)), data.draw(st.floats(0, 1)), data.draw(st.integers(0, 99))
    ids, names = [f"s{i}" for i in range(n)], [f"a{j}" for j in range(m)]
    dealt = overlap(ids, names, k, seed, share)
    loads, times = [len(mine) for mine in dealt.values()], Counter(id for mine in dealt.values() for id in mine)
    assert max(loads) - min(loads) <= 1 and all(len(set(mine)) == len(mine) for mine in dealt.values())
    twice = round(share * n)
    assert Counter(times.values()) == Counter({k: twice}) + Counter({1: n - twice})


def test_pairs_of_annotators_meet_alike():
    design = annotation_design([SimpleNamespace(id=f"s{i}") for i in range(300)], list("abcde"), k=2, seed=0, gold={"g1": "good", "g2": "good"})
    shared = design_facts(design)["shared"]
    assert len(shared) == 10 and max(shared.values()) - min(shared.values()) <= 4
    assert all({"g1", "g2"} <= set(ids) for ids in design.values())
    assert len({tuple(ids) for ids in design.values()}) == 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.data())
def test_gold_is_spread_and_nothing_is_lost(n, data):
    ids, gold = [f"s{i}" for i in range(n)], [f"g{i}" for i in range(data.draw(st.integers(0, n)))]
    mixed = mix_gold(ids, gold, data.draw(st.integers(0, 99)), "ann")
    assert [id for id in mixed if id[0] == "s"] == ids and sorted(id for id in mixed if id[0] == "g") == sorted(gold)
    if len(gold) > 1:
        places, stretch = [i for i, id in enumerate(mixed) if id[0] == "g"], n / len(gold)
        assert all(int(j * stretch) + j <= place <= int((j + 1) * stretch) + j for j, place in enumerate(places))


def samples_of(n, text="word{i} rain"):
    return [Sample(id=f"s{i:05}", group="g", conversation_id=f"c{i // 10}", turn=1, system_prompt_id="p", type="tone", system_prompt=f"Be kind {i % 50}.",
                   prompt=[Message(role="user", content=f"Tell me about {i % 97}.")], original="x", response=text.format(i=i)) for i in range(n)]


def test_twenty_thousand_candidates_take_seconds():
    samples, rng = samples_of(20_000), random.Random(0)
    scores = [Score(sample_id=one.id, probabilities={"good": p, "bad_system": 1 - p}) for one in samples for p in [rng.random()]]
    start = time.time()
    drawn = next_most_useful(samples, 300, 0, scores)
    assert len({one.id for one in drawn}) == 300 and time.time() - start < 30
    p = {one.sample_id: one.probabilities["good"] for one in scores}
    assert np.mean([min(p[one.id], 1 - p[one.id]) for one in drawn]) > 0.28  # 0.25 at random


@pytest.mark.parametrize("text", ["不会下雨，{i}", "{i} \u202egnp\u202c", "", "   ", "<script>{i}</script>", "\U0001f30a" * 3])
def test_any_text_can_be_sampled(text):
    assert len(next_most_useful(samples_of(12, text), 12, 0)) == 12


# ------------------------------------------------------------------ exchange

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT.filter(bool), st.sampled_from(LABELS), st.none() | st.floats(0, 1e6), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=2)), max_size=6))
def test_csv_round_trip_of_anything(tmp_path_factory, drawn):
    rows = [Annotation(sample_id=f"s{i}", annotator=who, label=label, seconds=seconds, note=note, spans=[(a, a + n) for a, n in spans], position=i + 1) for i, (note, who, label, seconds, spans) in enumerate(drawn)]
    path = write_csv(tmp_path_factory.mktemp("csv") / "rows.csv", rows)
    assert answer_rows(path) == rows
    with open(path, newline="", encoding="utf-8") as handle:
        assert all(not cell.startswith(("=", "@", "\t")) for line in csv.reader(handle) for cell in line)


@settings(max_examples=80, deadline=None)
@given(TEXT.filter(lambda text: text.strip()), TEXT, st.sampled_from(LABELS), st.data())
def test_tools_round_trip_of_anything(response, note, label, data):
    response = response + "\U0001f30a end"
    sample = samples_of(1)[0].model_copy(update={"response": response})
    start = data.draw(st.integers(0, len(response) - 1))
    row = Annotation(sample_id=sample.id, annotator="ann", label=label, note=note, seconds=2.5, spans=[(start, data.draw(st.integers(start + 1, len(response))))])
    through = lambda value: json.loads(json.dumps(value))
    assert from_label_studio(through(to_label_studio([sample], [row]))) == [row]
    assert from_argilla(through(to_argilla([sample], [row]))) == [row.model_copy(update={"seconds": None})]
    assert [one.response for one in from_paper(through(to_paper([sample])))] == [response]
    assert all(character_offset(response, utf16_offset(response, i)) == i for i in range(len(response)))


def test_label_studio_takes_our_files():
    library = pytest.importorskip("label_studio_sdk.label_interface", reason="pip install label-studio-sdk for this comparison")
    sample = samples_of(1)[0]
    task = to_label_studio([sample], [Annotation(sample_id=sample.id, annotator="ann", label="good", note="x", spans=[(0, 3)])])[0]
    for language in ("en", "zh"):
        interface = library.LabelInterface(label_studio_config(language))
        interface.validate()
        assert interface.validate_task({"data": task["data"]}) and interface.validate_annotation(task["annotations"][0])
        assert all(interface.validate_region(region) for region in task["annotations"][0]["result"])
    library.LabelInterface(STUDIO_PAIRS).validate()


def test_argilla_gives_our_records_back():
    library = pytest.importorskip("argilla", reason="pip install argilla for this comparison")
    sample = samples_of(1)[0]
    row = Annotation(sample_id=sample.id, annotator="ann", label="good", note="x", spans=[(0, 3)])
    record = to_argilla([sample], [row], [Score(sample_id=sample.id, probabilities={"good": 1.0})])[0]
    assert from_argilla([library.Record.from_dict(record).to_dict()]) == [row]


def test_every_answer_in_an_export_is_kept_or_counted():
    samples = samples_of(6)
    tasks = to_label_studio(samples, [Annotation(sample_id=one.id, annotator=a, label="good") for one in samples for a in "ab"])
    tasks[0]["annotations"][0]["was_cancelled"] = True
    tasks[1]["annotations"][0]["result"] = []
    tasks[2]["annotations"][1]["completed_by"] = {"email": "a"}
    ledger = Ledger("exchange")
    rows = from_label_studio(tasks, ledger=ledger)
    assert len(rows) == 9 and Counter(one["reason"] for one in ledger.dropped) == {"skipped": 1, "no_label": 1, "replaced": 1}
    ledger.reconcile(12, len(rows))


@pytest.mark.parametrize("tasks", [[{"data": {"sample_id": "s"}, "annotations": [{"result": [{"type": "choices", "value": {"choices": ["Gut"]}}]}]}], [{"data": {}}], [{"annotations": []}]])
def test_foreign_exports_are_refused_in_one_line(tasks):
    with pytest.raises(InputError) as error: from_label_studio(tasks)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ effort

def test_drift_is_seldom_seen_where_there_is_none():
    alarms = []
    for seed in range(40):
        truth = {f"s{i}": LABELS[i % 5] for i in range(120)}
        rows = [row.model_copy(update={"position": i + 1}) for a in "abc" for i, row in enumerate(simulate(truth, a, 0.2, seed))]
        alarms += [one["agreement"]["p"] < 0.05 for one in annotator_drift(rows, seed=seed).values()]
    assert np.mean(alarms) < 0.11


def test_position_bias_is_seldom_seen_where_there_is_none():
    rng = np.random.default_rng(0)
    outside = [not found["low"] <= 0.5 <= found["high"] for found in (position_bias(judged(rng, 60, 1.0, 1.0), draws=200, seed=s)["all"] for s in range(100))]
    assert np.mean(outside) < 0.12
