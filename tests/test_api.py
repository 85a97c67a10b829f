"The functions for people who import: what they are called, how they read, and the examples of README and docs."
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import s3ft_nb
from s3ft_nb.core.files import InputError, read_json, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("measure", "compare", "doctor", "run", "sft", "dpo")
IMPORTS = ("import s3ft_nb.measure", "from s3ft_nb import measure, run", "from s3ft_nb.measure.metrics import METRICS",
           "import s3ft_nb.run.plan as p; assert p.make_plan")
HOLDS = """
import s3ft_nb, inspect, sys
from s3ft_nb import measure, run
assert inspect.isfunction(measure) and inspect.isfunction(run) and s3ft_nb.measure is measure and s3ft_nb.run is run
from s3ft_nb.measure import metrics
import s3ft_nb.measure.metrics as other
assert metrics is other is s3ft_nb.measure.metrics and metrics.METRICS
assert measure.__name__ == "measure" and measure.__module__ == "s3ft_nb.api" and "torch" not in sys.modules
"""


def python(code, **how):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **how)


def test_a_name_is_the_function_whatever_was_imported_before():
    orders = [*((one,) for one in IMPORTS), IMPORTS, IMPORTS[::-1]]
    ask = "import os\nfor code in {}:\n    if not (pid := os.fork()): exec(code, {{}}); os._exit(0)\n    assert not os.waitpid(pid, 0)[1], code"
    done = python(ask.format(["\n".join(order) + HOLDS for order in orders]))
    assert done.returncode == 0, done.stderr


def test_help_reads_well_and_comes_quickly():
    done = python("from s3ft_nb import measure; help(measure); import sys; assert 'torch' not in sys.modules")
    assert done.returncode == 0 and done.stdout.startswith("Help on function measure in module s3ft_nb.api"), done.stderr
    assert "Parameters:\n" in done.stdout and "Returns:\n" in done.stdout and "turns = 12\n            Turns of each dialogue" in done.stdout


def test_help_states_every_parameter_and_setting():
    from s3ft_nb.lm.dpo import PairSettings
    from s3ft_nb.lm.train import Settings
    from s3ft_nb.measure.config import options
    text = {name: inspect.getdoc(getattr(s3ft_nb, name)) for name in NAMES}
    own = lambda name, names: [one for one in names if not re.search(rf"^    {one}( = .+)?\n        \S", text[name], re.M)]
    for name in NAMES:
        stated = inspect.signature(getattr(s3ft_nb, name)).parameters.values()
        assert not own(name, [one.name for one in stated if one.kind is not one.VAR_KEYWORD]), name
        assert all(one.annotation is not one.empty for one in stated)
    assert not own("measure", options()) and not own("sft", Settings.model_fields)
    assert not own("dpo", PairSettings.__annotations__)


def test_only_what_is_offered_is_there():
    assert {*NAMES} <= {*dir(s3ft_nb)} and {*s3ft_nb.__all__} == {*NAMES}
    with pytest.raises(AttributeError, match="no attribute 'mesure'"): s3ft_nb.mesure


def blocks():
    "The Python of README and docs, each page's together."
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        if code := re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S): yield pytest.param("\n".join(code), id=path.stem)


@pytest.mark.parametrize("code", blocks())
def test_examples_run(code, tmp_path):
    done = python(code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout, done.stderr[-2000:]


def test_the_functions_do_what_the_verbs_do(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from s3ft_nb import compare, doctor, dpo, measure, sft
    from s3ft_nb.cli import app
    monkeypatch.chdir(tmp_path)
    said = lambda text: {"id": text[-1], "messages": [{"role": "system", "content": "Answer in capital letters."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}
    one, other = (measure(recorded=[said(f"{word} {i}") for i in range(4)], out=tmp_path / word) for word in ("YES", "no"))
    write_rows(tmp_path / "rows.jsonl", [said(f"YES {i}") for i in range(4)])
    verb = lambda *words: CliRunner().invoke(app, [*map(str, words)])
    assert verb("measure", "--recorded", tmp_path / "rows.jsonl", "--out", tmp_path / "verb").exit_code == 0
    of = lambda folder: [[row[key] for key in ("metric", "part", "key", "mean", "low", "high")] for row in read_rows(folder / "numbers.jsonl")]
    assert of(tmp_path / "verb") == of(one.folder)
    found = compare([one.folder, other.folder], tmp_path / "compared", history="recorded")
    shown = verb("compare", one.folder, other.folder, "--out", tmp_path / "again", "--history", "recorded").stdout
    assert found.report.is_file() and found.headline in shown
    assert doctor("micro-base", save=tmp_path / "linked", today="2026-01-01")["saved"].is_dir()
    row = {"messages": [{"role": "user", "content": "Hi"}]}
    made = sft("micro-base", [row | {"response": "Hello."}] * 2, tmp_path / "sft", dtype="float32")
    assert made == read_json(tmp_path / "sft" / "training.json") and made["n_rows"] == 2
    write_rows(tmp_path / "pairs.jsonl", [row | {"chosen": "Yes.", "rejected": "No."}] * 2)
    assert dpo("micro-base", tmp_path / "pairs.jsonl", tmp_path / "dpo", start_from=tmp_path / "sft" / "adapter", dtype="float32")["steps"] == 1
    with pytest.raises(InputError, match="learning_rate"): sft("micro-base", [row], tmp_path / "x", learning_rate="fast")


def test_a_recipe_runs_with_settings_and_seeds(tmp_path, monkeypatch):
    from s3ft_nb import run
    from s3ft_nb.run import runner
    asked = {}
    monkeypatch.setattr(runner, "run_recipe", lambda *given: asked.update(given=given) or tmp_path)
    assert run("s3ft-smoke", {"seed": 3, "pool.types": ["a", "b"], "model": Path("m"), "flag": True}, tmp_path, only="pool", jobs=2) == tmp_path
    assert asked["given"] == ("s3ft-smoke", ["seed=3", 'pool.types=["a", "b"]', "model=m", "flag=true"], tmp_path, "pool", None, False, 2, "", "")
    with pytest.raises(InputError, match="does not name seeds"): run("s3ft-smoke", seeds="none")
