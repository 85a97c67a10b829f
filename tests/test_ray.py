"""Ray: the rows and losses of one process, whatever is killed. Skips without the extra `ray`."""
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_chain import kernels, launch, made, twins, until
from tiny import tiny_dialogues, tiny_model

ray = pytest.importorskip("ray")

from s3ft_nb.core.files import InputError, read_json
from s3ft_nb.core.stage import Progress, Stage
from s3ft_nb.lm import cluster
from s3ft_nb.lm.dpo import dpo
from s3ft_nb.lm.engine import make_engine
from s3ft_nb.lm.http import ask
from s3ft_nb.lm.train import sft
from s3ft_nb.run import runner
from s3ft_nb.run.execute import StepFailed
from s3ft_nb.run.folder import finished
from s3ft_nb.run.runner import run_recipe

OPTIONS = {"quantization": "none", "dtype": "float32", "device": "cpu", "batch_size": 4, "max_new_tokens": 24}
DRIVER = """
import sys
from s3ft_nb.core.stage import Progress, Stage
from s3ft_nb.lm import cluster
from s3ft_nb.lm.engine import make_engine
from s3ft_nb.lm.http import ask
sys.path.insert(0, sys.argv[1])
import ray, test_ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
slow, update = __import__("time").sleep, Progress.update
Progress.update = lambda *some, **more: (slow(0.3), update(*some, **more))  # so that it is killed at work
ask(test_ray.requests(), make_engine("ray", sys.argv[2], workers=2, **test_ray.OPTIONS), Stage(sys.argv[3], "step", shard_size=8))
"""


def requests(n=80):
    return [{"id": f"r{i}", "messages": messages} for i, messages in enumerate(tiny_dialogues(n))]


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.json*")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("model") / "llama"))


@pytest.fixture(scope="module")
def one(model):
    return make_engine("transformers", model, **OPTIONS)


@pytest.fixture(scope="module")
def whole(one, tmp_path_factory):
    "Rows, and the files of a step, by one process."
    stage = Stage(tmp_path_factory.mktemp("whole") / "step", "step", shard_size=8)
    return ask(requests(), one, stage), files(stage.folder)


@pytest.fixture(scope="module")
def engine(model):
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield make_engine("ray", model, workers=2, **OPTIONS)
    ray.shutdown()


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def test_rows_are_those_of_one_process(model, engine, one, whole, tmp_path):
    assert engine.name == one.name
    stage = Stage(tmp_path / "step", "step", shard_size=8)
    assert ask(requests(), engine, stage) == whole[0] and files(stage.folder) == whole[1]
    few = [row | {"response": "Aye, it rains."} for row in requests(10)]
    assert engine.score(few, ["A", "B"]) == one.score(few, ["A", "B"]) and engine.likelihood(few) == one.likelihood(few)
    anew, turns = make_engine("transformers", model, keep_gib=0, **OPTIONS), [row | {"thread": row["id"]} for row in requests(10)]
    for seed in (0, 1): assert engine.generate(turns, seed) == anew.generate(turns, seed)  # whichever worker has the next turn
    used = [Stage(tmp_path / name, shard_size=8) for name in ("a", "b")]
    for stage, engine in zip(used, (engine, one)): ask(few, engine, stage, labels=["A", "B"])
    assert used[0].usage == used[1].usage and used[0].usage["scored"] > 0


def test_what_a_worker_refuses_is_said_here(engine, tmp_path):
    long = [{"id": "long", "messages": [{"role": "user", "content": "Talk like a sailor. " * 900}]}]
    with pytest.raises(InputError, match="request long has"): engine.generate(long)
    with pytest.raises(InputError, match="no such model folder"): make_engine("ray", str(tmp_path / "none"), workers=2)
    with pytest.raises(InputError, match="unknown option 'beams'"): make_engine("ray", "x", workers=2, beams=4)
    with pytest.raises(InputError, match="9 workers are asked for"): make_engine("ray", "x", workers=9)


def test_a_worker_that_is_killed_costs_its_batch(engine, whole, tmp_path):
    class Killer(Progress):
        "Kills the worker that is at work when the other has finished a batch."
        killed, pids = [], [pid_of(actor) for actor in cluster.start_workers(2)]
        def update(self, n=1, **more):
            super().update(n, **more)
            if self.killed: return
            busy = max(self.pids, key=lambda pid: psutil.Process(pid).cpu_percent(0.05))
            os.kill(busy, signal.SIGKILL)
            self.killed.append(busy)

    calls = {n: (requests()[at : at + 8], [7]) for n, at in enumerate(range(0, 80, 8))}
    plain = {n: get() for n, get in engine.ahead("generate", calls)}
    with Killer(80, "requests") as progress: found = {n: get() for n, get in engine.ahead("generate", calls, progress)}
    assert found == plain and progress.done == 80 and progress.killed
    assert {pid_of(actor) for actor in cluster.start_workers(2)} - {*Killer.pids}  # another process took its place


def test_a_driver_that_is_killed_resumes(model, engine, whole, tmp_path):
    "What it had finished is neither lost nor made again, and nothing of it stays behind."
    folder = tmp_path / "step"
    words = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), model, str(folder)]
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 900
    while not len([*folder.glob("shards/*.jsonl")]) > 1 and driver.poll() is None and time.monotonic() < until: time.sleep(0.01)
    assert driver.poll() is None
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill(), driver.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shards/shard-*")}
    assert 1 < len(kept) < 20
    stage = Stage(folder, "step", shard_size=8)
    assert ask(requests(), engine, stage) == whole[0] and files(folder) == whole[1]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    gone, alive = psutil.wait_procs(family, timeout=180)  # two agents of Ray's wait a minute
    assert not alive


@pytest.mark.parametrize("train", [sft, dpo])
def test_two_workers_train_as_one_with_twice_the_batch(engine, model, tmp_path, train):
    more = [{"response": f"Aye, number {i}. " * (1 + i % 3)} if train is sft else {"chosen": f"Aye, number {i}.", "rejected": "No. " * (1 + i % 3)} for i in range(13)]
    rows = [{"id": f"r{i}", "messages": messages} | more[i] for i, messages in enumerate(tiny_dialogues(13))]
    settings = {"quantization": "none", "dtype": "float32", "device": "cpu", "learning_rate": 1e-3}
    one = train(model, rows[:12], tmp_path / "one", per_device_train_batch_size=4, **settings)
    two = train(model, rows[:12], tmp_path / "two", per_device_train_batch_size=2, workers=2, **settings)
    assert one["steps"] == two["steps"] == 3 and one["tokens"] == two["tokens"]
    assert [row["loss"] for row in one["loss"]] == pytest.approx([row["loss"] for row in two["loss"]], abs=1e-5)
    assert (tmp_path / "two/adapter/adapter_model.safetensors").exists() and not (tmp_path / "two/ray").exists()
    with pytest.raises(InputError, match="13 rows, and 16 are a batch for each"): train(model, rows, tmp_path / "few", per_device_train_batch_size=8, workers=2, **settings)


def test_steps_run_on_a_cluster(engine, twins, tmp_path, capfd):
    cluster.stop_workers()  # they hold both processors
    there = run_recipe(twins, ["wait=30"], out=tmp_path / "there", ray="auto")
    log = capfd.readouterr().err
    assert log.index("[2/3] right\n") < log.index("[1/3] left done") and finished(there / "left")["peak_rss_gib"] > 0
    assert made(there) == made(run_recipe(twins, out=tmp_path / "here")) and read_json(there / "run.json")["finished"]
    store = tmp_path / "store"
    assert made(run_recipe(twins, out=tmp_path / "kept", ray="auto", store=str(store))) == made(there)
    with pytest.raises(StepFailed, match="on purpose"): run_recipe(twins, ["wait=30", "left.fails=left"], out=tmp_path / "fails", ray="auto")
    assert (tmp_path / "fails/right/done.json").exists() and not (tmp_path / "fails/report").exists()


def test_a_node_that_shares_no_disk_uses_the_store(engine, twins, tmp_path, monkeypatch, capfd):
    "A node is here the same machine, which sees the run in another folder."
    cluster.stop_workers()
    there = runner.make_there
    elsewhere = lambda step, home, *rest: there(step, tmp_path / "node" / home.name, *rest)
    monkeypatch.setattr(runner, "make_there", elsewhere)
    store = str(tmp_path / "store")
    run = run_recipe(twins, ["wait=0"], out=tmp_path / "run", ray="auto", store=store)
    assert made(run) == made(run_recipe(twins, out=tmp_path / "here")) and finished(tmp_path / "node/report") == finished(run / "report")
    (run / "report/done.json").unlink()
    capfd.readouterr()
    run_recipe(twins, ["wait=0"], out=run, ray="auto", store=store)
    assert "report is done, fetched" in capfd.readouterr().err
    with pytest.raises(InputError, match="does not see .*node/left"): run_recipe(twins, ["pause=0.1"], out=run, ray="auto")


def test_a_node_that_is_killed_costs_a_retry(engine, twins, tmp_path):
    cluster.stop_workers()
    run, killed = tmp_path / "run", []
    def kill():
        until(lambda: [*run.glob("pid-*")])
        killed.append(psutil.Process(int([*run.glob("pid-*")][0].name[4:])).parent())
        killed[0].kill()
    thread = threading.Thread(target=kill)
    thread.start()
    run_recipe(twins, ["pause=3"], out=run, ray="auto")
    thread.join()
    assert killed and made(run) == made(run_recipe(twins, out=tmp_path / "here")) and len([*run.glob("pid-*")]) >= 3


def test_ctrl_c_ends_the_steps_of_a_cluster(twins, tmp_path):
    run = tmp_path / "run"
    process = launch(twins, "pause=60", "--ray", "local", "--jobs", "2", "--out", run, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    until(lambda: len([*run.glob("pid-*")]) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 130
    until(lambda: not kernels(run), 30)
