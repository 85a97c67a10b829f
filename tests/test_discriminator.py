"Discriminator and selection: statistics against plain loops, hostile scores, and the whole way on a tiny model."

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from tiny import tiny_model

from s3ft_nb.judging.rubric import LABELS
from s3ft_nb.core.stage import Ledger, Stage
from s3ft_nb.core.stats import cohen_kappa
from s3ft_nb.core.files import InputError, read_rows, write_rows
from s3ft_nb.core.records import Sample, Score
from s3ft_nb.methods.s3ft import discriminator

TYPES = ("tone", "rule", "persona")


def make_sample(i, response="Aye, it rains."):
    return Sample(
        id=f"s{i:03}",
        group=f"g{i // 4}",
        conversation_id=f"c{i // 8}",
        turn=1,
        system_prompt_id=f"p{i % 3}",
        type=TYPES[i % 3],
        system_prompt="Talk like a sailor.",
        prompt=[{"role": "user", "content": f"Question {i}: will it rain?"}],
        original="Yes.",
        response=response,
    )


def make_scores(n, seed=0, sharp=3.0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([1 / sharp] * len(LABELS), size=n)
    return [
        Score(sample_id=f"s{i:03}", probabilities=dict(zip(LABELS, row.tolist())), outside=float(rng.uniform(0, 0.1)))
        for i, row in enumerate(p)
    ]


def make_labels(scores, seed=0):
    "What people would say if the scores were calibrated."
    rng = random.Random(seed)
    return {one.sample_id: rng.choices(LABELS, [one.probabilities[label] for label in LABELS])[0] for one in scores}


pairs = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]), st.booleans()), min_size=1, max_size=60)


@given(pairs, st.sampled_from([0.3, 0.6, 0.8]))
@settings(deadline=None, max_examples=80)
def test_thresholds_are_tested_in_a_fixed_sequence(rows, precision):
    "No annotation decides which thresholds are looked at, and none is taken beyond one that failed."
    p, good = zip(*rows)
    found = discriminator.choose_threshold(p, good, precision, level=0.9)
    curve = discriminator.threshold_curve(p, good, 0.9)
    row = next(row for row in curve if row["threshold"] == found["threshold"])
    assert found["lower"] == row["lower"] and found["reached"] == (found["reached"] and row["lower"] >= precision)
    better = [True] * len(good)  # the same probabilities, all good: never a higher threshold
    assert discriminator.choose_threshold(p, better, precision, level=0.9)["threshold"] <= found["threshold"] or not found["reached"]
    if not found["reached"]: assert found["lower"] == max(row["lower"] for row in curve)


@pytest.mark.parametrize("n", [150, 400])
def test_the_promise_is_rarely_false(n):
    "True precision .88 wherever the threshold lies, .90 promised: said to be reached in at most 5 % of the draws."
    rng = np.random.default_rng(n)
    said = [discriminator.choose_threshold(rng.uniform(size=n), rng.uniform(size=n) < 0.88, 0.9)["reached"] for _ in range(300)]
    assert np.mean(said) < 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


@given(st.integers(1, 200), st.data(), st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None, max_examples=60)
def test_lower_bound_inverts_the_binomial_test(n, data, level):
    k = data.draw(st.integers(1, n))
    low = float(discriminator.lower_bound(k, n, level))
    assert 0 < low <= k / n
    assert binom.sf(k - 1, n, low) == pytest.approx(1 - level, abs=1e-6)


def test_select_ledger_names_every_sample(tmp_path):
    samples, scores = [make_sample(i) for i in range(120)], make_scores(150)
    ledger = Ledger("select", tmp_path)
    kept = discriminator.select_samples(samples, scores, 0.6, keep_not_applicable=True, ledger=ledger)
    by_id = {one.sample_id: one.probabilities for one in scores}
    for sample in kept:
        label = max(by_id[sample.id], key=by_id[sample.id].get)
        assert by_id[sample.id]["good"] >= 0.6 or (label == "not_applicable" and sample.response == "Yes.")
    assert len(kept) + len(ledger.dropped) == 120
    assert sum(ledger.as_dict()["reasons"].values()) == len(ledger.dropped)
    assert all(code.startswith("below_threshold:") for code in ledger.as_dict()["reasons"])
    assert sum(round(row["mean"] * row["n"]) for row in discriminator.yields(samples, kept)[:-1]) == len(kept)
    ledger.save()


def test_random_arm_does_not_depend_on_order_or_content():
    samples = [make_sample(i) for i in range(50)]
    length = 20 * discriminator.text_length(samples[10])
    drawn = discriminator.random_same_text(samples, length, seed=4)
    assert abs(sum(map(discriminator.text_length, drawn)) - length) <= discriminator.text_length(samples[10])
    mixed = random.Random(1).sample(samples, 50)
    assert {one.id for one in discriminator.random_same_text(mixed, length, seed=4)} == {one.id for one in drawn}
    assert {one.id for one in discriminator.random_same_text(samples, length, seed=5)} != {one.id for one in drawn}


def numbers_of(scores, labels, threshold, clusters=None):
    rows = discriminator.discriminator_numbers(scores, labels, threshold, clusters or {one.sample_id: one.sample_id for one in scores})
    return {(row["metric"], row["key"]): row["mean"] for row in rows}


def test_numbers_against_plain_loops():
    scores = make_scores(200)
    labels = make_labels(scores) | {"s007": None}
    found = numbers_of(scores, labels, 0.5, {one.sample_id: one.sample_id[:3] for one in scores})
    truth = {key: label for key, label in labels.items() if label is not None}
    best = {one.sample_id: max(LABELS, key=one.probabilities.get) for one in scores}
    ids = list(truth)
    assert found["accuracy", ""] == pytest.approx(np.mean([truth[i] == best[i] for i in ids]))
    assert found["kappa", ""] == pytest.approx(cohen_kappa([truth[i] for i in ids], [best[i] for i in ids])["mean"])
    f1 = []
    for label in LABELS:
        both = sum(truth[i] == label == best[i] for i in ids)
        given_, chosen = sum(truth[i] == label for i in ids), sum(best[i] == label for i in ids)
        f1.append(2 * both / (given_ + chosen))
        assert found["precision", label] == pytest.approx(both / chosen) and found["recall", label] == pytest.approx(both / given_)
    assert found["macro_f1", ""] == pytest.approx(np.mean(f1))
    kept = [one.sample_id for one in scores if one.probabilities["good"] >= 0.5 and one.sample_id in truth]
    assert found["precision_kept", ""] == pytest.approx(np.mean([truth[i] == "good" for i in kept]))
    gap = 0.0
    for i in range(15):
        inside = [one for one in scores if one.sample_id in truth and i / 15 <= max(one.probabilities.values()) < (i + 1) / 15]
        if inside:
            sure = np.mean([max(one.probabilities.values()) for one in inside])
            right = np.mean([truth[one.sample_id] == best[one.sample_id] for one in inside])
            gap += len(inside) * abs(sure - right)
    assert found["ece", ""] == pytest.approx(gap / 199)


def test_temperature_undoes_a_known_distortion():
    scores = make_scores(4000, sharp=1.0)
    labels = make_labels(scores)
    overconfident = discriminator.apply_temperature(scores, 0.4)  # raised to the power of 2.5
    fit = discriminator.calibrate(overconfident, labels)
    assert fit["temperature"] == pytest.approx(2.5, rel=0.1)
    repaired = numbers_of(discriminator.apply_temperature(overconfident, fit["temperature"]), labels, 0.5)
    assert repaired["ece", ""] < 0.03 < numbers_of(overconfident, labels, 0.5)["ece", ""]


def test_certain_and_wrong_scores_stay_finite():
    sure = [Score(sample_id=f"s{i:03}", probabilities={"good": 1.0} | {label: 0.0 for label in LABELS[1:]}) for i in range(20)]
    labels = {f"s{i:03}": "good" if i % 2 else "all_bad" for i in range(20)}
    fit = discriminator.calibrate(sure, labels)
    assert np.isfinite(fit["nll_before"]) and fit["nll_after"] < fit["nll_before"]
    found = numbers_of(discriminator.apply_temperature(sure, fit["temperature"]), labels, 0.5)
    assert found["precision_kept", ""] == 0.5 and found["kappa", ""] == 0.0


@pytest.mark.parametrize(
    "labels, message",
    [({"x": "good"}, "no score or conversation, first x"), ({"s000": "fine"}, "fine"), ({"s000": None}, "no labels to compare")],
)
def test_labels_that_do_not_match_are_refused(labels, message):
    with pytest.raises(InputError, match=message): numbers_of(make_scores(1), labels, 0.5)


def test_whole_way_on_a_tiny_model(tmp_path):
    "Train, score, calibrate, report, choose, select: every file between is read back as it was."
    from s3ft_nb.lm.engine import TransformersEngine
    from s3ft_nb.lm.model import load

    model = tiny_model(tmp_path / "model")
    samples = [make_sample(i, "Aye aye aye aye." if i % 2 else "No no no no.") for i in range(48)]
    labels = {one.id: "good" if i % 2 else "bad_system" for i, one in enumerate(samples)}
    train, held_out = dict(list(labels.items())[:32]), dict(list(labels.items())[32:])
    fast = {"num_train_epochs": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "device": "cpu"}
    trained = discriminator.train(model, discriminator.training_rows(samples, train), tmp_path / "d", **fast)
    assert trained["n_trained"] == 32
    assert trained["loss"][-1]["loss"] < trained["loss"][0]["loss"]
    engine = TransformersEngine(load(model, adapter=tmp_path / "d" / "adapter", device="cpu"))
    scores = discriminator.score_samples(samples, engine, Stage(tmp_path / "scores", shard_size=16))
    again = discriminator.score_samples(samples, engine, Stage(tmp_path / "scores", shard_size=16))
    assert scores == again == read_rows(write_rows(tmp_path / "scores.jsonl", scores), Score)
    fit = discriminator.calibrate(scores, held_out)
    calibrated = discriminator.apply_temperature(scores, fit["temperature"])
    found = numbers_of(calibrated, held_out, 0.5)
    assert 0 <= found["outside", ""] <= 1 and 0 <= found["accuracy", ""] <= 1
    chosen = discriminator.choose_threshold([one.probabilities["good"] for one in calibrated[32:]], [label == "good" for label in held_out.values()], 0.6)
    kept = discriminator.select_samples(samples, calibrated, chosen["threshold"])
    rows = discriminator.sft_rows(kept)
    assert [row["id"] for row in rows] == [one.id for one in kept]


@pytest.mark.parametrize("ask", [True, False])
def test_a_model_that_knows_nothing_explains_nothing_and_says_so(tmp_path, ask):
    "Random weights write no readable explanation: the letter is all there is, a resumed stage gives the same, tokens are metered."
    from s3ft_nb.judging.explain import fit_labels
    from s3ft_nb.lm.engine import TransformersEngine
    from s3ft_nb.lm.model import load

    engine = TransformersEngine(load(tiny_model(tmp_path / "model"), device="cpu"), max_new_tokens=8, temperature=0)
    samples = [make_sample(i, "Aye aye aye aye." if i % 2 else "No no no no.") for i in range(24)]
    labels = {one.id: "good" if i % 2 else "bad_system" for i, one in enumerate(samples)}
    stage = Stage(tmp_path / "explained", shard_size=8)
    rows = discriminator.explain_samples(samples, set(labels), engine, stage, asked=ask)
    assert all(row["told"] is row["shown"] is None for row in rows) and stage.usage["generated"] > 0 < stage.usage["prompt"]
    again = Stage(tmp_path / "explained", shard_size=8)
    assert discriminator.explain_samples(samples, set(labels), engine, again, asked=ask) == rows and again.usage == stage.usage
    scores = discriminator.explained_scores(rows, fit_labels(rows, labels))
    found = numbers_of(scores, labels, 0.5)
    assert abs(found["kappa", ""]) <= 1 and all(sum(one.probabilities.values()) == pytest.approx(1) for one in scores)


def test_claims_are_scored_as_the_likelihood_says(tmp_path):
    "What generation says about its own tokens is what a forward pass over the whole text says, and claims are its likelihood."
    from s3ft_nb.judging import explain
    from s3ft_nb.lm.engine import TransformersEngine
    from s3ft_nb.lm.model import load

    engine = TransformersEngine(load(tiny_model(tmp_path / "model"), device="cpu"), max_new_tokens=8, temperature=0)
    request = {"id": "a", "messages": [{"role": "user", "content": "Judge."}]}
    text = "A\nAsked: rain. Told: sun. Setting: a sailor. Shown: nothing."
    spans = explain.read_explanation(text)
    claimed, places = explain.as_claimed(text, spans)
    assert claimed == "A\nAsked: rain. Told: rain. Setting: a sailor. Shown: a sailor."
    [whole] = engine.likelihood([request | {"response": claimed, "pieces": True}])
    [shorter] = engine.likelihood([request | {"response": claimed[: places["told"][1]], "pieces": True}])
    [start] = engine.likelihood([request | {"response": claimed[: places["told"][0]], "pieces": True}])
    inside, _ = explain.slot_logprob(whole["pieces"], places["told"])
    assert inside == pytest.approx(explain.slot_logprob(shorter["pieces"], places["told"])[0], abs=1e-3) and start["pieces"]
