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
SHARED = Path(os.environ.get("S3FT_SHARED", ROOT.parent / "shared")) / "data"
COMMAND = [str(Path(sys.executable).with_name("s3ft"))]
TINY = ["batch_size=16", "labels_by=model", "conversations.n_conversations=30", "conversations.n_eval_conversations=10",
        "conversations.max_chars=200000", "pool.per_type=13", "pool.max_new_tokens=24", "restyle.max_new_tokens=24", "restyle.n_types=2",
        "sample.n_train=12", "sample.n_threshold=8", "sample.n_test=4", "select.precision=0.05", "measure.dialogues=2", "measure.turns=2",
        "measure.max_new_tokens=24", "measure.guard=0", "measure.agreement=0"]


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


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_numbers_of_a_run(smoke):
    numbers = rows_in(smoke / "report" / "numbers.jsonl")
    whole = {(row["arm"], row["history"]) for row in numbers if row["metric"] == "adherence" and row["part"] == "all" and not row["against"]}
    assert whole == {(arm, history) for arm in ("base", "unfiltered", "random", "s3ft") for history in ("own", "original")}
    assert {"accuracy", "macro_f1", "ece", "alpha", "rows_restyled", "rows_kept", "csr", "survival"} <= {row["metric"] for row in numbers}
    facts = json.loads((smoke / "run.json").read_text())
    assert {"seconds", "peak_rss_gib", "seed", "versions"} <= set(facts) and facts["peak_rss_gib"] < 4 and facts["finished"]
    assert (smoke / "report" / "index.html").stat().st_size > 10_000


def test_a_second_run_does_nothing(smoke):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*.jsonl")}
    start = time.time()
    ok(s3ft("run", "s3ft-smoke", "--out", smoke))
    assert time.time() - start < 20
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*.jsonl")}


def test_every_ledger_balances(smoke):
    ledgers = [json.loads(path.read_text()) for path in smoke.rglob("ledger.json")]
    assert ledgers
    for one in ledgers:
        if "rows_in" in one: assert one.get("expected", one["rows_in"]) == one["rows_out"] + len(one["dropped"]), one["stage"]


def test_evaluation_was_never_trained_on(smoke):
    for folder in ("conversations", "pool"):
        train, held_out = [{row["id"] for row in rows_in(smoke / folder / f"{half}.jsonl")} for half in ("train", "eval")]
        assert train and held_out and not train & held_out
    trained = {row["id"] for row in rows_in(smoke / "select" / "unfiltered.jsonl")}
    assert not trained & {row["sample_id"] for row in rows_in(smoke / "annotations" / "labels.jsonl")}


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
@pytest.mark.parametrize("path", sorted((ROOT / "nbs/chain").glob("*/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_alone(path, tmp_path):
    "Every chain notebook with its defaults, by plain papermill, alone in an empty folder."
    words = [str(Path(sys.executable).with_name("papermill")), str(path), "out.ipynb", "-k", "python3", "--language", "python", "--no-progress-bar"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


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


POISON = """import sys
def watch(event, args):
    in_a_step = "ipykernel" in sys.modules  # outside of steps files are hashed, whatever is in them
    if event == "import" and args[0].startswith("s3ft_nb.micro") or in_a_step and event == "open" and str(args[0]).endswith("truth.json"):
        raise RuntimeError(f"the truth was asked: {event} {args[0]}")
sys.addaudithook(watch)
"""


@pytest.mark.slow
def test_a_poisoned_truth_changes_no_training_row(smoke, tmp_path):
    "Only the world and its annotators may know what is right: elsewhere importing or reading it raises."
    (tmp_path / "poison").mkdir()
    (tmp_path / "poison" / "sitecustomize.py").write_text(POISON)
    poisoned = {"PYTHONPATH": str(tmp_path / "poison")}
    asked = subprocess.run([sys.executable, "-c", "import s3ft_nb.micro.world"], env=os.environ | poisoned, capture_output=True, text=True)
    assert "the truth was asked" in asked.stderr
    out = tmp_path / "run"
    for steps, env in (("world conversations", {}), ("pool restyle sample", poisoned), ("annotators", {}), ("annotations discriminator select", poisoned)):
        for step in steps.split(): ok(s3ft("run", "s3ft-smoke", "--out", out, "--only", step, env=env))
    made = sorted((out / "select").glob("*.jsonl"))
    assert {"s3ft.jsonl", "unfiltered.jsonl", "random.jsonl"} <= {path.name for path in made}
    for path in made:
        if path.name != "numbers.jsonl": assert path.read_bytes() == (smoke / "select" / path.name).read_bytes(), path.name
