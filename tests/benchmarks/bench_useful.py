"""How many labels the discriminator needs when the next most useful ones are labelled, against labels of a random sample.

Takes finished runs of the micro world (their steps `world` and `restyle`), labels by simulated annotators as in the default run, and trains one discriminator per size and way of sampling.
Both ways start from the same random sample. Macro-F1 is measured against the true labels of the whole evaluation half, which nothing else sees.
Six passes over the labels, where the recipe makes two: the embedded base was pretrained to judge, and at two passes 100 labels do as well as 900.
Finished trainings are kept in --out, so a run that was stopped goes on.

    s3ft run s3ft-micro --out runs/seed-0 --set seed=0        (likewise seed-1, seed-2; a few minutes each)
    python tests/benchmarks/bench_useful.py --runs runs/seed-0 runs/seed-1 runs/seed-2
"""
import argparse
from pathlib import Path

import numpy as np

from s3ft_nb.annotation.agreement import settle_labels
from s3ft_nb.annotation.sampling import most_useful, stratified_sample
from s3ft_nb.annotation.task import simulate
from s3ft_nb.core.stage import rows_hash, Stage
from s3ft_nb.core.records import Sample
from s3ft_nb.core.files import read_json, read_rows, write_json
from s3ft_nb.core.files import resource
from s3ft_nb.lm.engine import make_engine
from s3ft_nb.methods.s3ft.discriminator import discriminator_numbers, score_samples, train
from s3ft_nb.micro.world import read_truth, sample_label

RATES = (0.03, 0.06, 0.1)  # of the three annotators of recipes/s3ft-micro.toml
SETTINGS = {"quantization": "nf4", "learning_rate": 0.002, "per_device_train_batch_size": 16}  # of the same
FLAT = 0.03  # A gain in macro-F1 over all sizes below this is lost in the scatter of trainings
BASE = str(resource("data", "micro-base"))


def world_of(run, n_pool, seed):
    "Samples to choose from, test samples, and their true labels."
    rows = {split: read_rows(Path(run) / "restyle" / f"{split}.jsonl", Sample) for split in ("train", "eval")}
    truth = read_truth(Path(run) / "world" / "truth.json")
    pool = stratified_sample(rows["train"], min(n_pool, len(rows["train"])), seed)
    return pool, rows["eval"], {one.id: sample_label(one, truth) for one in pool + rows["eval"]}


def annotate(samples, truth, seed):
    said = {one.id: truth[one.id] for one in samples}
    return [row for i, rate in enumerate(RATES) for row in simulate(said, f"simulated-{i + 1}", rate, seed)]


def fitted(pool, annotations, folder, seed, epochs):
    "A discriminator of these annotations, ready to score."
    labels = {id: label for id, label in settle_labels(annotations).items() if label}
    train(BASE, pool, labels, folder, max_repeats=2, seed=seed, num_train_epochs=epochs, save_steps=10_000, **SETTINGS)
    return make_engine("transformers", BASE, adapter=str(folder / "adapter"), quantization="nf4", batch_size=64)


def scored(samples, engine, folder, name):
    return score_samples(samples, engine, Stage(folder / name), claim=name)


def one_arm(arm, run, seed, sizes, n_pool, epochs, out):
    "Macro-F1 at each size of one way of sampling."
    pool, test, truth = world_of(run, n_pool, seed)
    right, chosen, points, scores = {one.id: truth[one.id] for one in test}, [], [], []
    order = stratified_sample(pool, sizes[-1], seed)
    for n in sizes:
        rest = [row for row in pool if row not in chosen]
        more = order[len(chosen):n] if arm == "random" or not chosen else most_useful(rest, n - len(chosen), seed, scores)
        chosen = chosen + more
        annotations = annotate(chosen, truth, seed)
        folder = out / f"{seed}-{epochs:g}-{rows_hash([row.model_dump() for row in annotations])[:16]}"
        kept = folder / "point.json"
        if not kept.exists():
            engine = fitted(pool, annotations, folder, seed, epochs)
            rows = discriminator_numbers(scored(test, engine, folder, "test"), right, 0.5, {one.id: one.conversation_id for one in test})
            write_json(kept, {"n": n, **{row["metric"]: row["mean"] for row in rows if row["metric"] in ("macro_f1", "accuracy")}})
            if arm == "useful" and n < sizes[-1]: scores = scored(pool, engine, folder, "pool")
        elif arm == "useful" and n < sizes[-1]:
            engine = make_engine("transformers", BASE, adapter=str(folder / "adapter"), quantization="nf4", batch_size=64)
            scores = scored(pool, engine, folder, "pool")
        points.append(read_json(kept))
        print(f"seed {seed} {arm:<7} n={n:<5} macro-F1 {points[-1]['macro_f1']:.3f} accuracy {points[-1]['accuracy']:.3f} labels {count(chosen, truth)}", flush=True)
    return points


def count(samples, truth):
    labels = [truth[one.id] for one in samples]
    return {label: labels.count(label) for label in sorted(set(labels))}


def labels_needed(points, goal):
    "Labels at which a curve first reaches the goal, between two sizes by a straight line; None when it does not."
    sizes, values = [one["n"] for one in points], [one["macro_f1"] for one in points]
    for i, value in enumerate(values):
        if value < goal: continue
        if i == 0: return float(sizes[0])
        return sizes[i - 1] + (goal - values[i - 1]) / (value - values[i - 1]) * (sizes[i] - sizes[i - 1])


def mean_curve(curves):
    return [{"n": same[0]["n"], "macro_f1": float(np.mean([one["macro_f1"] for one in same]))} for same in zip(*curves)]


def tell(name, random, useful):
    goal, gain = random[-1]["macro_f1"], random[-1]["macro_f1"] - random[0]["macro_f1"]
    needed = labels_needed(useful, goal)
    share = None if needed is None else needed / random[-1]["n"]
    text = "not reached" if share is None else f"{needed:.0f} labels, {share:.0%}"
    print(f"{name}: random sampling with {random[-1]['n']} labels gives {goal:.3f}; the most useful labels reach it with: {text}")
    if gain < FLAT: print(f"  but {random[0]['n']} random labels give {random[0]['macro_f1']:.3f} already: labels hardly matter here, and the share says nothing")
    return share


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["runs/s3ft-micro"], help="folders of finished runs; seed i uses run i, in turn")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[150, 300, 450, 600, 900], help="labels, growing")
    parser.add_argument("--pool", type=int, default=2400, help="samples to choose from")
    parser.add_argument("--epochs", type=float, default=6.0, help="passes over the labels")
    parser.add_argument("--out", default="runs/bench-useful")
    given = parser.parse_args()
    curves = {"random": [], "useful": []}
    for i, seed in enumerate(given.seeds):
        run = given.runs[i % len(given.runs)]
        for arm in curves: curves[arm].append(one_arm(arm, run, seed, given.sizes, given.pool, given.epochs, Path(given.out) / Path(run).name))
        tell(f"seed {seed}", curves["random"][-1], curves["useful"][-1])
    means = {arm: mean_curve(found) for arm, found in curves.items()}
    for one, other in zip(means["random"], means["useful"]): print(f"n={one['n']:<5} random {one['macro_f1']:.3f}  useful {other['macro_f1']:.3f}")
    share = tell(f"mean of {len(given.seeds)}", means["random"], means["useful"])
    write_json(Path(given.out) / "result.json", {"version": 1, "sizes": given.sizes, "epochs": given.epochs, "curves": curves, "mean": means, "share": share})
