"Hostile input, definitions against brute force, and sizes for the annotation rooms."

import csv
import gzip
import random
from collections import Counter

import numpy as np
import pytest

from s3ft_nb.annotation.agreement import alpha, alpha_interval, fleiss, kappa, label_counts, labels_of_two, per_label
from s3ft_nb.annotation.task import majority, read_annotations, sample_for_annotation, simulate
from s3ft_nb.judging.rubric import LABELS
from s3ft_nb.core.records import Annotation, Message, Sample
from s3ft_nb.core.files import InputError, write_rows


def note(sample_id, annotator, label):
    return Annotation(sample_id=sample_id, annotator=annotator, label=label)


def test_annotation_files(tmp_path):
    rows = [Annotation(sample_id="ä1", annotator="ann", label="good", seconds=2.5, note='two\nlines, "quoted"'), note("s2", "ann", "all_bad")]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle)
        writer.writerow(["note", "label", "annotator", "sample_id", "seconds"])
        for row in rows: writer.writerow([row.note, row.label, row.annotator, row.sample_id, row.seconds])
    assert read_annotations(path) == rows
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_annotations(packed) == rows
    assert read_annotations(write_rows(tmp_path / "rows.jsonl.gz", rows)) == rows


@pytest.mark.parametrize("text, part", [
    (b"sample_id,annotator\ns1,a\n", "columns are"),
    (b"sample_id,annotator,label,colour\ns1,a,good,red\n", "columns are"),
    (b"sample_id,annotator,label,label\ns1,a,good,good\n", "columns are"),
    (b"sample_id,annotator,label\ns1,a,good,b\n", "rows.csv:2: more cells"),
    (b"sample_id,annotator,label\ns1,a,A\n", "rows.csv:2: label"),
    (b"sample_id,annotator,label\ns1,,good\n", "rows.csv:2: annotator: missing"),
    (b"sample_id,annotator,label,seconds\ns1,a,good,long\n", "rows.csv:2: seconds"),
    (b"sample_id,annotator,label,seconds\ns1,a,good,-1\n", "rows.csv:2: seconds"),
    (b'sample_id,annotator,label\n"s1,a,good\n', "broken CSV"),
    (b"sample_id,annotator,label\ns\xff,a,good\n", "not UTF-8"),
    (b"", "columns are []"),
])
def test_bad_csv_is_one_clear_line(tmp_path, text, part):
    path = tmp_path / "rows.csv"
    path.write_bytes(text)
    with pytest.raises(InputError) as error: read_annotations(path)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_missing_annotation_file(tmp_path):
    with pytest.raises(InputError, match="no such file"): read_annotations(tmp_path / "none.csv")


def test_stratified_draw_is_proportional_and_without_repeats():
    samples = [Sample(id=f"s{i}", group="g", conversation_id="c", turn=1 + i % 2, system_prompt_id="p", type="abc"[i % 3 % 2], system_prompt="x",
                      prompt=[Message(role="user", content="y")], original="z") for i in range(300)]
    drawn = sample_for_annotation(samples, 60, seed=3, by=("type", "turn"))
    assert len({row.id for row in drawn}) == 60
    assert Counter((row.type, row.turn) for row in drawn) == {key: n // 5 for key, n in Counter((row.type, row.turn) for row in samples).items()}
    assert drawn != sample_for_annotation(samples, 60, seed=4, by=("type", "turn"))
    with pytest.raises(InputError): sample_for_annotation(samples, 0, seed=3)


def brute_alpha(annotations):
    units = {}
    for row in annotations: units.setdefault(row.sample_id, []).append(row.label)
    pairs = [(a, b, 1 / (len(said) - 1)) for said in units.values() if len(said) > 1 for i, a in enumerate(said) for j, b in enumerate(said) if i != j]
    used, total = Counter(), sum(w for _, _, w in pairs)
    for a, _, w in pairs: used[a] += w
    observed = sum(w for a, b, w in pairs if a != b) / total
    expected = sum(used[a] * used[b] for a in used for b in used if a != b) / (total * (total - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_its_definition(seed):
    rng = random.Random(seed)
    rows = [note(f"u{u}", f"a{a}", rng.choice(LABELS[:2 + seed % 4])) for u in range(40) for a in range(4) if rng.random() < 0.7]
    assert alpha(rows) == pytest.approx(brute_alpha(rows))
    assert alpha(rng.sample(rows, len(rows))) == pytest.approx(alpha(rows))


def test_alpha_kappa_and_fleiss_agree_for_many_samples():
    truth = {f"s{i}": LABELS[i % 5] for i in range(4000)}
    rows = simulate(truth, "a", 0.1, 0) + simulate(truth, "b", 0.2, 0)
    estimate, low, high = alpha_interval(rows, draws=200)
    assert low < estimate < high and high - low < 0.06
    assert kappa(*labels_of_two(rows, "a", "b")) == pytest.approx(estimate, abs=0.01)
    assert fleiss(label_counts(rows)) == pytest.approx(estimate, abs=0.01)
    assert all(row["n"] > 1000 for row in per_label(rows).values())
    chance = simulate(truth, "a", 0, 0) + [note(id, "b", random.Random(id).choice(LABELS)) for id in truth]
    assert abs(alpha(chance)) < 0.03


def test_alpha_of_many_annotations():
    labels = np.random.default_rng(0).integers(0, 5, 60_000)
    rows = [Annotation.model_construct(sample_id=i // 3, annotator=i % 3, label=LABELS[k]) for i, k in enumerate(labels)]
    assert abs(alpha(rows)) < 0.01


def test_majority_of_simulated_annotators_beats_each():
    truth = {f"s{i}": LABELS[i % 5] for i in range(3000)}
    rows = [simulate(truth, name, 0.15, 1) for name in "abc"]
    voted = majority([row for one in rows for row in one])
    right = sum(voted[id] == label for id, label in truth.items())
    assert all(right > sum(row.label == truth[row.sample_id] for row in one) for one in rows)
    errors = [{row.sample_id for row in one if row.label != truth[row.sample_id]} for one in rows]
    assert 0.01 < len(errors[0] & errors[1]) / len(truth) < 0.04  # independent: 0.15 ** 2
