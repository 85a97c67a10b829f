"What the chapters on the chain cannot show: kills, signals, locks, foreign files, full disks."
import ast
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import papermill
import psutil
import pytest

from tiny import small_notebook

from s3ft_nb.run.execute import DIED, StepFailed
from s3ft_nb.run.runner import places, run_recipe
from s3ft_nb.core import files as core_files
from s3ft_nb.core.files import InputError, read_json, read_rows, resource, write_bytes, write_json, write_rows

WORLD = ('out = ""  # Folder of this step\nn = 6  # rows\npause = 0.0  # seconds per row', """
import os, time
from pathlib import Path
from s3ft_nb.core.files import write_rows
from s3ft_nb.core.stage import Stage

Path(out, "..", f"pid-{os.getpid()}").touch()
def work(rows, seed):
    time.sleep(pause)
    return [row | {"seed": seed} for row in rows]
stage = Stage(out, "world", shard_size=1)
write_rows(Path(out, "rows.jsonl"), stage.map([{"id": i} for i in range(n)], work))
""")
REPORT = ('out = ""  # Folder of this step\nrows = ""  # Rows to count\nword = "kept"  # A word', """
from pathlib import Path
from s3ft_nb.core.files import read_rows, write_json
write_json(Path(out, "metrics.json"), {"n": len(read_rows(rows)), "word": word})
Path(out, "index.html").write_text(word)
""")
RECIPE = """
name = "small"
description = "Two steps."
[steps.report]
notebook = "report.ipynb"
rows = "{step:world}/rows.jsonl"
[steps.world]
notebook = "world.ipynb"
"""


@pytest.fixture
def small(tmp_path):
    write_json(tmp_path / "world.ipynb", small_notebook(*WORLD))
    write_json(tmp_path / "report.ipynb", small_notebook(*REPORT))
    return write_bytes(tmp_path / "small.toml", RECIPE.encode())


def one_step(folder, code, cell='out = ""'):
    write_json(folder / "one.ipynb", small_notebook(cell, code))
    return write_bytes(folder / "one.toml", b'name = "one"\n[steps.one]\nnotebook = "one.ipynb"\n')


def launch(*words, **options):
    command = [sys.executable, "-c", "from s3ft_nb.cli import app; app()", "run", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def kernels(run):
    "Kernels that ever started in a run folder and still live."
    pids = [int(path.name[4:]) for path in run.glob("pid-*")]
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def until(test, seconds=60):
    end = time.monotonic() + seconds
    while not test() and time.monotonic() < end: time.sleep(0.05)
    assert test()


def files(run):
    names = ("world/rows.jsonl", "world/shards/shards.json", "report/metrics.json", "report/index.html")
    return {name: (run / name).read_bytes() for name in names}


def test_killed_at_any_instant_and_resumed(small, tmp_path):
    whole = files(run_recipe(small, out=tmp_path / "whole"))
    run, rng = tmp_path / "run", random.Random(0)
    for _ in range(5):
        process = launch(small, "world.pause=0.4", "--out", run)
        started = len(list(run.glob("pid-*"))) if run.is_dir() else 0
        until(lambda: process.poll() is not None or len(list(run.glob("pid-*"))) > started)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        until(lambda: not kernels(run), 30)
    process = launch(small, "world.pause=0.4", "--out", run)
    assert process.wait(120) == 0, process.stderr.read()
    assert files(run) == whole
    assert not list(run.rglob(".*.part"))


def test_interrupted_step_keeps_its_shards(small, tmp_path):
    run = tmp_path / "run"
    process = launch(small, "world.pause=0.3", "--out", run)
    shard = run / "world" / "shards" / "shard-00001.jsonl"
    until(shard.exists)
    process.kill()
    process.wait()
    before = shard.stat().st_mtime_ns
    until(lambda: not kernels(run), 30)
    run_recipe(small, ["world.pause=0.3"], out=run)
    assert shard.stat().st_mtime_ns == before


def test_ctrl_c_ends_the_kernel_and_says_how_to_resume(small, tmp_path):
    run = tmp_path / "run"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which what starts in the background ignores
    process = launch(small, "world.pause=60", "--out", run, preexec_fn=heed)
    until(lambda: list(run.glob("pid-*")))
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 130  # less than the pause, also on a busy machine
    words = process.stderr.read()
    assert "the same command resumes here" in words and "Traceback" not in words
    until(lambda: not kernels(run), 30)


TWINS = """
name = "twins"
[steps.left]
notebook = "twin.ipynb"
[steps.right]
notebook = "twin.ipynb"
[steps.report]
notebook = "report.ipynb"
rows = "{step:left}/rows.jsonl"
after = "{step:right}"
"""
TWIN = """
import json, os, time
from pathlib import Path
from s3ft_nb.core.files import write_rows

me = Path(out).name
Path(out, "..", f"pid-{os.getpid()}").touch()
other = Path(out, "..", {"left": "right", "right": "left"}[me], "step.json")
end = time.monotonic() + wait
while wait and not other.exists() and time.monotonic() < end: time.sleep(0.05)
if wait and not other.exists(): raise RuntimeError("the other step does not run")
if me == fails: raise RuntimeError("on purpose")
time.sleep(pause)
write_rows(Path(out, "rows.jsonl"), [{"id": me, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", "")}])
"""


@pytest.fixture
def twins(tmp_path):
    "Two steps that wait for each other to begin, for `wait` seconds, and a third that needs both."
    write_json(tmp_path / "twin.ipynb", small_notebook('out = ""  # Folder of this step\nwait = 0.0  # s\npause = 0.0  # s\nfails = ""  # The step that fails', TWIN))
    write_json(tmp_path / "report.ipynb", small_notebook(REPORT[0] + '\nafter = ""  # A folder', REPORT[1]))
    return write_bytes(tmp_path / "twins.toml", TWINS.encode())


def made(run): return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.name in ("rows.jsonl", "metrics.json", "index.html")}


def test_steps_side_by_side_make_the_same_bytes(twins, tmp_path, capfd):
    beside = run_recipe(twins, ["wait=30"], out=tmp_path / "beside", jobs=2)
    log = capfd.readouterr().err
    alone = run_recipe(twins, out=tmp_path / "alone", jobs=1)
    assert made(beside) == made(alone) and len(made(alone)) == 4
    assert log.index("[2/3] right\n") < log.index("[1/3] left done")  # the second began before the first had ended
    assert [*read_json(beside / "run.json")["seconds"]] == ["left", "right", "report", "total"]
    with pytest.raises(StepFailed, match="the other step does not run"): run_recipe(twins, ["wait=0.5"], out=tmp_path / "waits", jobs=1)


def test_a_step_that_fails_lets_the_one_beside_it_end(twins, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StepFailed, match="on purpose"): run_recipe(twins, ["wait=30", "pause=1", "left.fails=left"], out=run, jobs=2)
    assert (run / "right/done.json").exists() and not (run / "report").exists()
    before = (run / "right/done.json").stat().st_mtime_ns
    run_recipe(twins, ["wait=30", "pause=1"], out=run, jobs=2)
    assert (run / "right/done.json").stat().st_mtime_ns == before and (run / "report/done.json").exists()


def test_ctrl_c_ends_all_kernels(twins, tmp_path):
    run = tmp_path / "run"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = launch(twins, "pause=60", "--jobs", "2", "--out", run, preexec_fn=heed)
    until(lambda: len(list(run.glob("pid-*"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(50) == 130
    assert "the same command resumes here" in process.stderr.read()
    until(lambda: not kernels(run), 30)


def test_every_gpu_holds_one_step(twins, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    run = run_recipe(twins, ["wait=30"], out=tmp_path / "run", jobs=4)
    assert sorted(row["gpu"] for name in ("left", "right") for row in read_rows(run / name / "rows.jsonl")) == ["3", "5"]


def test_steps_at_a_time_are_what_the_machine_holds(monkeypatch):
    holds = lambda gib: monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gib << 30))
    monkeypatch.setenv("OMP_NUM_THREADS", "16"), monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    holds(64)
    assert places() == (4, []) and places(3) == (3, [])
    holds(20)
    assert places() == (2, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert places() == (1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert places() == (1, [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,7")
    assert places() == (2, ["1", "2", "7"]) and places(9) == (3, ["1", "2", "7"])
    with pytest.raises(InputError, match="--jobs: must be at least 1"): places(-1)


def test_a_store_brings_what_is_done_to_another_machine(twins, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logs = lambda *settings, out, **how: (run_recipe(twins, [*settings], out=tmp_path / out, store="a store", **how), capfd.readouterr().err)[1]
    logs(out="first")
    assert logs(out="second").count("is done, fetched") == 3 and made(tmp_path / "first") == made(tmp_path / "second")
    log = logs("left.pause=0.1", out="third")
    assert "[2/3] right is done, fetched" in log and "[1/3] left done in" in log  # what has changed is made
    assert logs(out="third").count("is done, fetched") == 2  # and what was there before is there still
    assert logs(out="third", fresh=True).count(" done in") == 3 and " done in" in logs(out="third", only="left")
    shutil.rmtree(tmp_path / "a store")
    assert logs(out="first").count("is done, skipped") == 3 and logs(out="fourth").count("is done, fetched") == 3  # what is skipped is sent
    with pytest.raises(InputError, match="none://x: --store: cannot be reached"): run_recipe(twins, out=tmp_path / "first", store="none://x", fresh=True)
    assert (tmp_path / "first/left/done.json").exists()


@pytest.mark.parametrize("moment", range(3))
def test_a_fetch_that_is_killed(twins, tmp_path, moment, monkeypatch):
    first = run_recipe(twins, out=tmp_path / "first", store=str(tmp_path / "store"))
    code = ("import os, sys; from fsspec.implementations.local import LocalFileSystem as Files; from s3ft_nb.run.runner import run_recipe\n"
            "get, left = Files.get_file, [*range(int(sys.argv[4]))]\n"
            "def dies(self, there, here, **more):\n    if not left: open(here, 'w').write('torn'), os._exit(1)\n    left.pop(), get(self, there, here)\n"
            "Files.get_file = dies; run_recipe(sys.argv[1], out=sys.argv[2], store=sys.argv[3])")
    done = subprocess.run([sys.executable, "-c", code, twins, tmp_path / "second", tmp_path / "store", str(moment)], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr.count("Error"), done.stderr
    for store in ("", str(tmp_path / "store")): assert made(run_recipe(twins, out=tmp_path / "second", store=store)) == made(first)


def test_two_runs_refuse_each_other(small, tmp_path):
    run = tmp_path / "run"
    process = launch(small, "world.pause=60", "--out", run)
    until(lambda: list(run.glob("pid-*")))
    with pytest.raises(InputError, match="in use by another run"): run_recipe(small, out=run)
    process.kill()
    process.wait()


def test_second_run_skips_everything_and_loads_nothing_heavy(small, tmp_path):
    run_recipe(small, out=tmp_path / "run")
    code = ("import sys; from s3ft_nb.run.runner import run_recipe; run_recipe(sys.argv[1], out=sys.argv[2]);"
            "print([name for name in ('torch', 'transformers', 'papermill', 'matplotlib', 'scipy') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code, small, tmp_path / "run"], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr.splitlines() == ["[1/2] world is done, skipped", "[2/2] report is done, skipped"]


def test_changes_rerun_a_step_and_what_comes_after(small, tmp_path):
    run = run_recipe(small, out=tmp_path / "run")
    done = {step: (run / step / "done.json").stat().st_mtime_ns for step in ("world", "report")}
    write_bytes(run / "report" / "notes.txt", b"mine")
    run_recipe(small, ["word=other"], out=run)
    assert (run / "world" / "done.json").stat().st_mtime_ns == done["world"]
    assert (run / "report" / "index.html").read_text() == "other"
    assert (run / "report" / "notes.txt").read_text() == "mine"
    write_json(tmp_path / "world.ipynb", small_notebook(WORLD[0], WORLD[1] + "\n# changed"))
    run_recipe(small, ["word=other"], out=run)
    assert (run / "world" / "done.json").stat().st_mtime_ns > done["world"]
    facts = read_json(run / "run.json")
    assert facts["params"]["report"]["word"] == "other" and facts["finished"]
    assert facts["seconds"]["total"] == pytest.approx(facts["seconds"]["world"] + facts["seconds"]["report"])
    assert 0 < facts["peak_rss_gib"] < 4


def test_moved_run_folder_is_still_done(small, tmp_path, capsys):
    run_recipe(small, out=tmp_path / "run").rename(tmp_path / "moved")
    capsys.readouterr()
    run_recipe(small, out=tmp_path / "moved")
    assert capsys.readouterr().err.count("is done, skipped") == 2


def test_edited_result_is_not_written_over(small, tmp_path):
    run = run_recipe(small, out=tmp_path / "run")
    write_bytes(run / "world" / "rows.jsonl", b"{}\n")
    with pytest.raises(InputError, match="rows.jsonl: was changed after its step had finished"): run_recipe(small, out=run)
    assert (run / "world" / "rows.jsonl").read_bytes() == b"{}\n"
    (run / "world" / "rows.jsonl").unlink()
    run_recipe(small, out=run)
    assert len(read_rows(run / "world" / "rows.jsonl")) == 6


def test_fresh_takes_ours_and_leaves_theirs(small, tmp_path):
    run = run_recipe(small, out=tmp_path / "run")
    write_bytes(run / "notes.txt", b"mine")
    write_bytes(run / "world" / "mine" / "notes.txt", b"mine")
    run_recipe(small, out=run, fresh=True)
    assert (run / "notes.txt").exists() and (run / "world" / "mine" / "notes.txt").exists()
    home = tmp_path / "home"
    write_bytes(home / "world" / "thesis.txt", b"years")
    with pytest.raises(InputError, match="not a run"): run_recipe(small, out=home, fresh=True)
    assert (home / "world" / "thesis.txt").read_bytes() == b"years"


def test_only_and_from(small, tmp_path):
    with pytest.raises(InputError, match="step world is not done"): run_recipe(small, out=tmp_path / "run", only="report")
    run = run_recipe(small, out=tmp_path / "run", only="world")
    assert not (run / "report").exists() and read_json(run / "run.json")["finished"] is None
    run_recipe(small, ["world.n=3"], out=run, begin="report")  # world is taken as it is
    assert read_json(run / "report" / "metrics.json")["n"] == 6
    assert read_json(run / "run.json")["params"]["world"]["n"] == 6


def test_errors_of_a_notebook(tmp_path, capsys):
    one = one_step(tmp_path, "{}['rows']")
    with pytest.raises(StepFailed, match="KeyError: 'rows'\nexecuted notebook: .*notebook.ipynb"): run_recipe(one, out=tmp_path / "a")
    one = one_step(tmp_path, "from s3ft_nb.core.files import read_rows; read_rows('none.jsonl')")
    with pytest.raises(InputError, match="^step one: none.jsonl: no such file"): run_recipe(one, out=tmp_path / "b")
    one = one_step(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StepFailed, match="ran out of memory") as died: run_recipe(one, out=tmp_path / "c")
    assert died.value.code == DIED
    one = one_step(tmp_path, "import errno; raise OSError(errno.ENOSPC, 'No space left on device')")
    with pytest.raises(InputError, match="the disk is full"): run_recipe(one, out=tmp_path / "d")
    assert "Traceback" not in capsys.readouterr().err


def test_full_disk_in_the_run_itself(small, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(core_files.os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"): run_recipe(small, out=tmp_path / "run")
    monkeypatch.undo()
    assert run_recipe(small, out=tmp_path / "run")


def test_secrets_reach_no_file(tmp_path, monkeypatch, capsys):
    secret = "sk-very\"secret/0123"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    code = "import os; from s3ft_nb.core.stage import Progress\nkey = os.environ['OPENAI_API_KEY']\nprint(key); print({'k': key})\nwith Progress(1, label=key) as p: p.update()\n"
    one = one_step(tmp_path, code + "raise ValueError(key)", 'out = ""\nurl = ""')
    with pytest.raises(StepFailed) as caught: run_recipe(one, out=tmp_path / "run")
    said = str(caught.value) + capsys.readouterr().err
    one_step(tmp_path, code, 'out = ""\nurl = ""')
    run_recipe(one, out=tmp_path / "run2")
    written = [path.read_bytes() for run in ("run", "run2") for path in (tmp_path / run).rglob("*") if path.is_file()]
    for text in (said.encode(), *written):
        assert b"secret/0123" not in text and b"secret%2F0123" not in text
    assert "***OPENAI_API_KEY***" in said
    with pytest.raises(InputError, match="holds the value of a secret"): run_recipe(one, [f"url='http://x/{secret}'"], out=tmp_path / "run3")
    assert not (tmp_path / "run3").exists()


def test_the_kernel_is_this_python_whatever_is_registered(tmp_path, monkeypatch):
    spec = {"argv": ["/bin/false"], "display_name": "python3", "language": "python"}
    write_json(tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json", spec)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    one = one_step(tmp_path, "import sys; from pathlib import Path\nPath(out, 'python.txt').write_text(sys.executable)")
    run = run_recipe(one, out=tmp_path / "a {b} run")
    assert (run / "one" / "python.txt").read_text() == sys.executable


def test_relative_paths_reach_the_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "talks.jsonl", [{"id": 1}])
    one = one_step(tmp_path, "from pathlib import Path\nPath(out, 'n.txt').write_text(Path(conversations).read_text())", 'out = ""\nconversations = ""')
    run = run_recipe("one.toml", ["conversations=talks.jsonl"], out="run")
    write_rows(tmp_path / "talks.jsonl", [{"id": 2}])
    run_recipe(one, ["conversations=talks.jsonl"], out="run")  # other content, other result
    assert json.loads((run / "one" / "n.txt").read_text()) == {"id": 2}
    with pytest.raises(InputError, match="no such file or folder: none.jsonl"): run_recipe(one, ["conversations=none.jsonl"], out="run")


# ---- Plain papermill

@pytest.mark.parametrize("given, line", [
    ({"sede": 1}, "InputError: unknown parameter 'sede' (did you mean seed?)"),
    ({"n_test": "many"}, "InputError: n_test: must be of type int, got 'many' (like 100)"),
    ({"restyle_from": "none"}, "InputError: none: restyle_from: no such folder (run s3ft/02_restyle.ipynb first, or leave it empty)"),
])
def test_plain_papermill_stops_with_one_line(tmp_path, given, line):
    with pytest.raises(papermill.PapermillExecutionError) as stopped:
        papermill.execute_notebook(resource("notebooks", "s3ft/03_sample.ipynb"), tmp_path / "out.ipynb", {"out": str(tmp_path), **given}, kernel_name="python3", progress_bar=False, cwd=tmp_path)
    assert stopped.value.traceback == [line] and (stopped.value.exec_count <= 3 or "restyle_from" in given)


WITHOUT_MODEL = ("micro/01_world", "micro/02_annotators", "micro/03_roles", "micro/05_principles_kept", "micro/06_constraints", "micro/07_judger",
                 "rnr/01_instructions", "s3ft/03_sample", "s3ft/05_annotations", "s3ft/07_select", "shared/conversations", "shared/report")


def test_steps_without_a_model_load_no_torch():
    cells = ["".join(cell["source"]) for name in WITHOUT_MODEL for cell in read_json(resource("notebooks", f"{name}.ipynb"))["cells"] if cell["cell_type"] == "code"]
    lines = [ast.unparse(one) for text in cells for one in ast.parse(text).body if isinstance(one, (ast.Import, ast.ImportFrom))]
    assert len(lines) > 4 * len(WITHOUT_MODEL)
    code = "\n".join([*lines, "import sys", "print([name for name in ('torch', 'transformers', 'peft', 'trl', 'datasets', 'sklearn') if name in sys.modules])"])
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
