"The worked examples of CONTRIBUTING.md are run as they stand."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", TEXT, re.S)) | {"recipe": re.search(r"```toml\n(.*?)```", TEXT, re.S)[1]}


@pytest.mark.parametrize("name", ["check", "arm", "metric"])
def test_small_examples(name):
    done = subprocess.run([sys.executable, "-c", BLOCKS[name]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def notebook(cells: list[str], tags: list = ()) -> str:
    rows = [{"cell_type": "code", "execution_count": None, "id": f"cell{i}", "metadata": {"tags": list(tags)} if i == 0 and tags else {}, "outputs": [],
             "source": text.strip("\n").splitlines(keepends=True)} for i, text in enumerate(cells)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": rows, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


def test_a_method_is_one_room_one_notebook_and_one_recipe(tmp_path):
    "Add the example to a copy of the repository, export it, and run its recipe to the report."
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, tracked):
        if name.startswith("tests/") or not (ROOT / name).is_file(): continue
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    directive, export = BLOCKS["chapter"].split("\n", 1)
    added = {"nbs/methods/00_noop.ipynb": notebook([directive, export]),
             "nbs/chain/noop/01_keep.ipynb": notebook(BLOCKS["notebook"].split("# %%\n"), ["parameters"]),
             "recipes/noop-smoke.toml": BLOCKS["recipe"]}
    for name, text in added.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for link, target in (("notebooks", "nbs/chain"), ("recipes", "recipes"), ("data", "data")): (tmp_path / "s3ft_nb" / link).symlink_to(tmp_path / target)
    environ = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environ.pop("IN_TEST", None)
    here = {"cwd": tmp_path, "env": environ, "capture_output": True, "text": True}
    done = subprocess.run([Path(sys.executable).with_name("nbdev_export")], **here)
    assert done.returncode == 0 and (tmp_path / "s3ft_nb/methods/noop.py").is_file(), done.stderr
    changed = [path for path in before if path.suffix == ".py" and path.name != "_modidx.py" and (ROOT / path.relative_to(tmp_path)).read_bytes() != path.read_bytes()]
    assert not changed
    done = subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "run", "noop-smoke", "--out", "run"], **here)
    assert done.returncode == 0, done.stderr
    numbers = [json.loads(line) for line in (tmp_path / "run/report/numbers.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in numbers if row["metric"] == "adherence"} == {"base", "noop"}
    assert (tmp_path / "run/report/index.html").is_file()
