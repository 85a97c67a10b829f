"Results over seeds: ordinary runs side by side, kept and resumed; means, intervals and differences over them; the README's table."
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t as student
from tiny import small_notebook
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import read_json, read_rows, write_bytes, write_json, write_rows

ROOT = Path(__file__).resolve().parents[1]
MEASURE = ('out = ""  # Folder\nseed = 0  # Seed\ntrouble = ""  # Folder that holds the name of a seed in trouble\nn = 8  # Conversations\nmain = "ours"  # Arm', """
import random
from pathlib import Path
from s3ft_nb.core.files import InputError, write_rows
class NeedsPeople(Exception): pass
if trouble and Path(trouble, f"fail-{seed}").exists(): raise InputError("no luck", remedy="try again")
if trouble and Path(trouble, f"wait-{seed}").exists(): raise NeedsPeople("annotate first")
rng = random.Random(seed)
write_rows(Path(out, "verdicts.jsonl"), [
    {"arm": arm, "history": "own", "conversation_id": f"{seed}-{c}", "turn": turn, "rule_id": "r", "satisfied": rng.random() < rate}
    for arm, rate in (("base", 0.5), ("other", 0.8), ("ours", 0.9)) for c in range(n) for turn in (1, 2, 3)])
""")
RECIPE = 'name = "tiny"\ndescription = "One step."\n[steps.world]\nnotebook = "measure.ipynb"\ncost = { rows = "3 * n" }\n'


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "measure.ipynb", small_notebook(*MEASURE))
    return write_bytes(tmp_path / "tiny.toml", RECIPE.encode())


def s3ft(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def fake_seed(run, seed, rates, shared=False, n=20, turns=4, settings=(), recipe="s3ft-micro"):
    "A seed's folder by hand: what a run leaves there, without having run."
    rng, home = random.Random(seed), run / f"seed-{seed}"
    luck = {c: random.Random(f"{c}" if shared else f"{seed}{c}").uniform(-0.25, 0.25) for c in range(n)}
    id = lambda c: f"c{c}" if shared else f"s{seed}-c{c}"
    rows = [{"arm": arm, "history": history, "conversation_id": id(c), "turn": t, "rule_id": "r", "type": "tone",
             "satisfied": rng.random() < (first + (last - first) * (t - 1) / (turns - 1)) + luck[c]}
            for arm, (first, last) in rates.items() for history in ("own", "original") for c in range(n) for t in range(1, turns + 1)]
    write_rows(home / "measure" / "verdicts.jsonl", rows)
    write_json(home / "measure" / "done.json", {"files": {}, "fingerprint": "", "seconds": 60.0})
    params = {"measure": {"seed": seed, "dtype": "float32", "main": "s3ft", **dict(settings)}}
    write_json(home / "measure" / "step.json", {"fingerprint": "", "params": params["measure"]})
    write_json(home / "run.json", {"made_by": "s3ft_nb", "recipe": recipe, "seed": seed, "steps": ["measure"], "params": params, "finished": "2026-11-25T00:00:00",
                                   "machines": ["x86_64 avx2, 1 threads"], "versions": {"s3ft_nb": "0.2.0", "torch": "2.13.0"}, "seconds": {"total": 60.0}})
    return rows


RATES = {"base": (0.8, 0.3), "random": (0.7, 0.66), "s3ft": (0.75, 0.7)}


def pooled(run, **where):
    rows = read_rows(run / "numbers.jsonl")
    return [row for row in rows if all(row[key] == value for key, value in ({"metric": "adherence", "history": "own"} | where).items())]


def test_a_run_over_seeds_is_kept_extended_and_pooled(recipe, tmp_path):
    run = tmp_path / "run"
    done = s3ft("run", recipe, "--seeds", "0-1", "--out", run)
    assert done.exit_code == 0, done.output
    assert "ours follows its system prompt in" in done.stdout and "mean of 2 seeds" in done.stdout and "Few seeds" in done.stdout
    assert read_json(run / "seed-1" / "run.json")["seed"] == 1 and read_json(run / "seed-1" / "run.json")["finished"]
    assert "threads" in read_json(run / "seed-1" / "run.json")["machines"][0]
    (whole,) = pooled(run, part="all", arm="ours", against="")
    assert (whole["n"], whole["n_clusters"]) == (2, 16)
    before = {path: path.stat().st_mtime_ns for path in run.glob("seed-*/world/done.json")}
    more = s3ft("run", recipe, "--seeds", "0,2", "--out", run)  # 0 is done, 1 stays in the mean, 2 is new
    assert more.exit_code == 0 and "mean of 3 seeds" in more.stdout and more.stderr.count("is done, skipped") == 1
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    page, numbers = (run / "index.html").read_bytes(), (run / "numbers.jsonl").read_bytes()
    for name in ("index.html", "numbers.jsonl"): (run / name).unlink()
    assert s3ft("seeds", run).exit_code == 0
    assert ((run / "index.html").read_bytes(), (run / "numbers.jsonl").read_bytes()) == (page, numbers)
    alone = s3ft("run", recipe, "seed=1", "--out", run / "seed-1")  # the folder of a seed is an ordinary run
    assert alone.exit_code == 0 and "is done, skipped" in alone.stderr


def test_trouble_in_one_seed_loses_nothing(recipe, tmp_path):
    run, words = tmp_path / "run", ["run", recipe, f"trouble={tmp_path}", "--seeds", "0-2", "--out", tmp_path / "run"]
    (tmp_path / "fail-1").touch()
    failed = s3ft(*words)
    assert failed.exit_code == 2 and failed.stderr.strip().splitlines()[-1] == "s3ft: step world: no luck (try again)"
    assert not (run / "numbers.jsonl").exists() and (run / "seed-0" / "world" / "done.json").exists()
    part = s3ft("seeds", run)
    assert part.exit_code == 0 and "with one seed, 0" in part.stdout and "One seed: intervals hold conversations only" in part.stdout
    assert "Not in these means: seeds 1, 2" in part.stdout
    (tmp_path / "fail-1").rename(tmp_path / "wait-1")
    waits = s3ft(*words)
    assert waits.exit_code == 3 and f"--out {run}/seed-1" in waits.stderr and f"s3ft seeds {run}" in waits.stderr
    assert (run / "seed-2" / "world" / "done.json").exists()  # the others went on
    (tmp_path / "wait-1").unlink()
    whole = s3ft(*words)
    assert whole.exit_code == 0 and "mean of 3 seeds" in whole.stdout and "Not in these means" not in whole.stdout


def test_bad_usage_is_one_line_and_writes_nothing(recipe, tmp_path):
    write_json(tmp_path / "single" / "run.json", {"made_by": "s3ft_nb", "recipe": "tiny"})
    write_json(tmp_path / "several" / "run.json", {"made_by": "s3ft_nb", "seeds": [0]})
    write_bytes(tmp_path / "theirs" / "index.html", b"mine")
    before = sorted(tmp_path.rglob("*"))
    for words, line in [
        (["run", recipe, "--seeds", "4-0"], "--seeds: '4-0' does not name seeds (like 0-4 or 0,2,5)"),
        (["run", recipe, "--seeds", "0;1"], "does not name seeds"),
        (["run", recipe, "seed=3", "--seeds", "0-1"], "cannot be combined with --set seed="),
        (["run", recipe, "--set", "world.seed=3", "--seeds", "0-1"], "cannot be combined"),
        (["run", recipe, "m=3", "--seeds", "0-1"], "unknown parameter 'm'"),
        (["run", recipe, "--seeds", "0-1", "--out", tmp_path / "single"], "holds something else than runs over seeds"),
        (["run", recipe, "--seeds", "0-1", "--out", tmp_path / "theirs"], "holds something else than runs over seeds"),
        (["run", recipe, "--out", tmp_path / "several"], "holds runs over seeds"),
        (["plan", recipe, "--seeds", "x"], "does not name seeds"),
        (["seeds", tmp_path / "single"], "holds no measured seed"),
        (["seeds", tmp_path / "none"], "holds no measured seed"),
    ]:
        refused = s3ft(*words)
        assert refused.exit_code == 2 and line in refused.stderr and len(refused.stderr.strip().splitlines()) == 1, (words, refused.output)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_multiplies(recipe, tmp_path):
    one, five = (json.loads(s3ft("plan", recipe, "--json", *words).stdout) for words in ([], ["--seeds", "0-4"]))
    assert five["steps"][0]["rows"] == 5 * one["steps"][0]["rows"] and five["total_seconds"]["cpu"] == 5 * one["total_seconds"]["cpu"]
    assert "5 seeds together" in s3ft("plan", recipe, "--seeds", "0-4").stdout and not list(tmp_path.glob("runs*"))


def test_means_intervals_and_differences(tmp_path):
    for seed in range(5): fake_seed(tmp_path, seed, RATES)
    done = s3ft("seeds", tmp_path)
    assert done.exit_code == 0, done.output
    (whole,), own = pooled(tmp_path, part="all", arm="s3ft", against=""), pooled(tmp_path, part="seed", arm="s3ft", against="")
    means = np.array([row["mean"] for row in own])
    assert [row["key"] for row in own] == list("01234") and whole["mean"] == pytest.approx(means.mean())
    assert (whole["n"], whole["n_clusters"], whole["version"]) == (5, 100, 1)
    for other in ("base", "random"):
        (apart,), each = pooled(tmp_path, part="all", arm="s3ft", against=other), pooled(tmp_path, part="seed", arm="s3ft", against=other)
        values = np.array([row["mean"] for row in each])
        half = student.ppf(0.975, 4) * values.std(ddof=1) / 5**0.5  # own conversations: Student's interval on the seeds' values
        assert (apart["low"], apart["high"]) == (pytest.approx(values.mean() - half), pytest.approx(values.mean() + half))
    assert {row["key"] for row in pooled(tmp_path, part="turn", arm="base")} == set("1234")
    assert all(0 <= row["low"] <= row["mean"] <= row["high"] <= 1 for row in pooled(tmp_path, part="turn", against="", arm="s3ft"))
    assert "better than base" in done.stdout and "Each seed has conversations of its own" in done.stdout
    page = (tmp_path / "index.html").read_text()
    assert all(f"Seed {seed}" in page for seed in range(5)) and "Excludes 0" in page and "Turn 4" in page and "s3ft minus random" in page


def test_shared_conversations_are_seen_in_their_ids(tmp_path):
    for seed in range(4): fake_seed(tmp_path / "shared", seed, RATES, shared=True), fake_seed(tmp_path / "own", seed, RATES)
    said = {kind: s3ft("seeds", tmp_path / kind).stdout for kind in ("shared", "own")}
    assert "The seeds share conversations" in said["shared"] and "The seeds share" not in said["own"]
    shared, own = (pooled(tmp_path / kind, part="all", arm="s3ft", against="")[0] for kind in ("shared", "own"))
    assert (shared["n_clusters"], own["n_clusters"]) == (20, 80)
    spread = np.std([row["mean"] for row in pooled(tmp_path / "shared", part="seed", arm="s3ft", against="")], ddof=1) / 2
    assert shared["high"] - shared["low"] > 2 * student.ppf(0.975, 3) * spread  # wider than the spread of the seeds alone


def test_seeds_that_cannot_be_pooled(tmp_path):
    fake_seed(tmp_path, 0, RATES), fake_seed(tmp_path, 1, RATES, settings={"turns": 3})
    refused = s3ft("seeds", tmp_path)
    assert refused.exit_code == 2 and "seed-1: was run with other settings than the first seed" in refused.stderr
    fake_seed(tmp_path, 1, {"base": (0.8, 0.3), "s3ft": (0.8, 0.8)})  # an arm that one seed lacks
    assert s3ft("seeds", tmp_path).exit_code == 0
    (lone,) = pooled(tmp_path, part="all", arm="random", against="")
    assert lone["n"] == 1 and pooled(tmp_path, part="all", arm="s3ft", against="base")[0]["n"] == 2


def test_the_readme_table_says_on_what_it_rests(tmp_path):
    script = [sys.executable, ROOT / "tests/results.py"]
    for n, words in ((1, ["with seed 0", "one seed only", "another seed may lie outside"]), (5, ["with seeds 0, 1, 2, 3, 4", "interval that holds seeds and conversations"])):
        for seed in range(n): fake_seed(tmp_path / str(n), seed, RATES)
        assert s3ft("seeds", tmp_path / str(n)).exit_code == 0
        readme = write_bytes(tmp_path / "README.md", b"before\n<!-- results: written by make results -->\nold\n<!-- end of results -->\nafter\n")
        for _ in range(2): subprocess.run([*script, tmp_path / str(n), readme], check=True)
        text = " ".join(readme.read_text().split())
        assert text.startswith("before <!--") and text.endswith("--> after") and " old " not in text
        assert all(word in text for word in [*words, "x86_64 avx2, 1 threads", "float32", "torch 2.13.0", "| **s3ft** |", "minus base"]), text
        (row,) = pooled(tmp_path / str(n), part="all", arm="s3ft", against="base")
        assert f"{row['mean']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]" in text
    refused = subprocess.run([*script, tmp_path / "5", write_bytes(tmp_path / "bare.md", b"text")], capture_output=True, text=True)
    assert refused.returncode == 1 and "needs the lines" in refused.stderr
    readme = (ROOT / "RESULTS.md").read_text()
    assert readme.count("<!-- results: written by make results -->") == readme.count("<!-- end of results -->") == 1


def test_the_readme_table_is_by_number_of_rules_where_types_name_it(tmp_path):
    for seed in range(3):
        rows, home = fake_seed(tmp_path / "run", seed, RATES, recipe="rnr-micro"), tmp_path / f"run/seed-{seed}/measure"
        kinds = {id: f"rules-{1 + i % 2}" for i, id in enumerate(dict.fromkeys(row["conversation_id"] for row in rows))}
        write_rows(home / "dialogues.jsonl", [{"id": id, "type": kind} for id, kind in kinds.items()])
        write_rows(home / "verdicts.jsonl", [row | {"dialogue_id": row["conversation_id"]} | ({"satisfied": False} if kinds[row["conversation_id"]] == "rules-2" else {}) for row in rows])
    assert s3ft("seeds", tmp_path / "run").exit_code == 0
    readme = write_bytes(tmp_path / "README.md", b"before\n<!-- results of rnr-micro -->\nold\n<!-- end of rnr-micro -->\nafter\n")
    subprocess.run([sys.executable, ROOT / "tests/results.py", tmp_path / "run", readme], check=True)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.read_text().splitlines() if line.startswith("|")]
    table = {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}
    assert lines[0] == ["arm", "all rules", "each seed", "K = 1", "K = 2", "turn 1", "turn 4", "single rules", "minus base", "s3ft minus it"]
    (row,) = pooled(tmp_path / "run", part="all", arm="s3ft", against="")
    for line in table.values(): assert line["K = 2"].startswith("0.00") and float(line["K = 1"][:4]) > float(line["all rules"][:4])
    assert table["**s3ft**"]["all rules"].startswith(f"{row['mean']:.2f}") and table["base"]["minus base"] == "–"
