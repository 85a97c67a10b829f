"The recipes, run as a user runs them. The wheel's own run is in wheel.sh."
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("S3FT_TEST_DATA", ROOT.parent / "shared" / "data"))
COMMAND = [str(Path(sys.executable).with_name("s3ft"))]
TINY = ["batch_size=16", "labels_by=model", "conversations.n_conversations=30", "conversations.n_eval_conversations=10", "conversations.max_chars=200000",
        "pool.per_type=13", "pool.max_new_tokens=24", "restyle.max_new_tokens=24", "restyle.n_types=2", "sample.n_train=12", "sample.n_threshold=8",
        "sample.n_test=4", "select.precision=0.05", "rollout-base.n_dialogues=2", "rollout-unfiltered.n_dialogues=2", "rollout-random.n_dialogues=2",
        "rollout-s3ft.n_dialogues=2", "n_turns=2", "rollout-base.max_new_tokens=24", "rollout-unfiltered.max_new_tokens=24",
        "rollout-random.max_new_tokens=24", "rollout-s3ft.max_new_tokens=24"]


def s3ft(*words, **kwargs):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | kwargs.pop("env", {})
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, env=env, **kwargs)


def ok(done):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    ok(s3ft("run", "s3ft-smoke", "--out", out))
    return out


def test_metrics_hold_what_the_readme_promises(smoke):
    report = smoke / "report"
    m = json.loads((report / "metrics.json").read_text())
    assert set(m["arms"]) == {"base", "unfiltered", "random", "s3ft"}
    for arm in m["arms"].values():
        for part in (arm["adherence"], arm["adherence"]["own_history"], arm["adherence"]["original_history"]):
            assert {"mean", "low", "high", "n", "by_turn", "by_type"} <= set(part)
            assert all({"turn", "mean", "low", "high", "n"} <= set(turn) for turn in part["by_turn"])
    assert {"n_train", "n_test", "accuracy", "macro_f1", "precision_good", "recall_good", "ece", "threshold", "stated_precision", "confusion"} <= set(m["discriminator"])
    assert {"restyled", "annotated", "kept"} <= set(m["rows"])
    assert {"agreement", "seconds", "peak_rss_gib", "seed", "versions"} <= set(m)
    assert "alpha" in m["agreement"] and m["peak_rss_gib"] < 4
    for name in [*m["figures"], *m["tables"]]: assert (report / name).stat().st_size > 0, name


def test_a_second_run_does_nothing(smoke):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*.jsonl")}
    start = time.time()
    ok(s3ft("run", "s3ft-smoke", "--out", smoke))
    assert time.time() - start < 20
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*.jsonl")}


def test_every_ledger_balances(smoke):
    books = [json.loads(p.read_text()) for p in smoke.rglob("*.json") if p.name == "ledger.json"]
    assert books
    for book in books:
        due = book.get("expected", book["rows_in"])
        assert due == book["rows_out"] + len(book["dropped"]), book["stage"]


def test_evaluation_was_never_trained_on(smoke):
    lines = lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    for folder in ("conversations", "pool"):
        train, held_out = [{row["id"] for row in lines(smoke / folder / f"{half}.jsonl")} for half in ("train", "eval")]
        assert train and held_out and not train & held_out
    trained = {row["id"] for row in lines(smoke / "select" / "unfiltered.jsonl")}
    assert not trained & {row["sample_id"] for row in lines(smoke / "annotations" / "labels.jsonl")}


def test_a_secret_is_nowhere(smoke, tmp_path):
    secret = "sk-test-3f9a81c07d5e"
    done = ok(s3ft("run", "s3ft-smoke", "--out", smoke, "--only", "sample", env={"OPENAI_API_KEY": secret}))
    assert secret not in done.stdout + done.stderr
    for path in smoke.rglob("*"):
        if path.is_file(): assert secret.encode() not in path.read_bytes(), path


BAD = {
    "unknown recipe": (["run", "s3ft-mirco"], "s3ft-mirco"),
    "unknown parameter": (["run", "s3ft-smoke", "--set", "sed=1"], "sed"),
    "wrong type": (["run", "s3ft-smoke", "--set", "seed=soon"], "seed"),
    "missing file": (["run", "s3ft-qlora", "--set", "model=./nowhere", "--set", "conversations=./none.jsonl"], "no such"),
    "missing parameter": (["run", "s3ft-qlora"], "model"),
}


@pytest.mark.parametrize("words, said", BAD.values(), ids=BAD)
def test_bad_words_cost_nothing(words, said, tmp_path):
    done = s3ft(*words, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "run").rglob("*.jsonl")) if (tmp_path / "run").exists() else True


BROKEN = {
    "broken JSON": ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n{"messages": [', "2"),
    "empty conversation": ('{"messages": []}\n', "1"),
    "unknown role": ('{"messages": [{"role": "wizard", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n', "wizard"),
    "same role twice": ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Ho"}, {"role": "assistant", "content": "Hello"}]}\n', "user"),
    "very long turn": (json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "Hello"}]}) + "\n", "100000"),
}


@pytest.mark.parametrize("text, said", BROKEN.values(), ids=BROKEN)
def test_bad_rows_are_named(text, said, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(text)
    done = s3ft("convert", path, tmp_path / "out.jsonl")
    assert done.returncode == 2 and "talk.jsonl" in done.stderr and said in done.stderr.replace(",", "").replace("_", "")
    assert not (tmp_path / "out.jsonl").exists()


FILES = ["openassistant/en_100_tree.jsonl.gz", "taskmaster/tm4.sample1000.json.gz", "sharegpt-format/v1_sft_demo.jsonl"]


@pytest.mark.parametrize("name, kind", [(FILES[0], "qwen3"), pytest.param(FILES[1], "gemma", marks=pytest.mark.slow)])
def test_real_dialogues_and_another_architecture(name, kind, tmp_path):
    if not (SHARED / name).exists(): pytest.skip("no shared data")
    model = tiny_model(tmp_path / "model", kind)
    out = tmp_path / "run"
    ok(s3ft("run", "s3ft-qlora", "--out", out, "--set", f"model={model}", "--set", f"conversations={SHARED / name}", *[w for pair in TINY for w in ("--set", pair)]))
    assert (out / "report" / "index.html").exists()


@pytest.mark.slow
def test_notebooks_by_hand(tmp_path):
    "Every chain notebook with its defaults, by plain papermill, as an explorer would go through them."
    for path in sorted((ROOT / "nbs/chain/s3ft").glob("*.ipynb")):
        command = [str(Path(sys.executable).with_name("papermill")), str(path), str(tmp_path / path.name), "-k", "python3", "--language", "python", "--no-progress-bar"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, f"{path.name}: {done.stderr[-2000:]}"
    assert (tmp_path / "runs/dev/report/index.html").exists()


def rows_of(run):
    return {p.relative_to(run): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.rglob("*.jsonl")) if p.name != "events.jsonl"}


@pytest.mark.slow
def test_killed_five_times_and_the_same_bytes(smoke, tmp_path):
    rng, out = random.Random(0), tmp_path / "smoke"
    for _ in range(5):
        process = subprocess.Popen([*COMMAND, "run", "s3ft-smoke", "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"}, start_new_session=True)
        time.sleep(rng.uniform(5, 45))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ok(s3ft("run", "s3ft-smoke", "--out", out))
    assert rows_of(out) == rows_of(smoke)
    timing = ("seconds", "peak_rss_gib", "ledgers")
    a, b = [{k: v for k, v in json.loads((run / "report/metrics.json").read_text()).items() if k not in timing} for run in (out, smoke)]
    assert a == b
