"The house rules that nbdev is silent about."
import ast
import importlib
import json
import re
import subprocess
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and "runs" not in p.parts]
CHAIN = [p for p in NOTEBOOKS if "chain" in p.parts]
CHAPTERS = [p for p in NOTEBOOKS if "chain" not in p.parts]
MODULES = [p for p in sorted((ROOT / "s3ft_nb").rglob("*.py")) if not p.name.startswith("_")]
FLOORS = {"core": 0, "lm": 1, "judging": 2, "measure": 2, "annotation": 2, "methods": 3, "report": 4, "micro": 4, "run": 5, "cli": 6}


def code(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def exported(path):
    return re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join(code(path)), re.M)


def test_every_chapter_exports_a_module_of_its_own():
    names = [name for path in CHAPTERS for name in exported(path)]
    assert len(names) == len(set(names)) == len(CHAPTERS)


def test_every_module_comes_from_a_chapter():
    named = {ROOT / "s3ft_nb" / (name.replace(".", "/") + ".py") for path in CHAPTERS for name in exported(path)}
    assert named == set(MODULES)


@pytest.mark.parametrize("path", CHAIN, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_chain_notebooks_only_run(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1
    for source in code(path):
        assert not re.search(r"^#\|", source, re.M)
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(source).body)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebooks_are_whole_and_without_results(path):
    text = path.read_text()
    assert "<<<<<<<" not in text
    assert all(not c.get("outputs") for c in json.loads(text)["cells"])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts))
def test_imports_run_downwards(path):
    parts = path.relative_to(ROOT / "s3ft_nb").with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        base = list(parts[:-1])[: len(parts) - node.level]
        target = (base + (node.module or "").split("."))[0]
        assert FLOORS.get(target, 0) <= FLOORS[parts[0]], f"{path} imports {target}"


def test_every_module_imports():
    for path in MODULES:
        importlib.import_module("s3ft_nb." + ".".join(path.relative_to(ROOT / "s3ft_nb").with_suffix("").parts))


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def test_heavy_neighbours_stay_out():
    wanted = settings()["requirements"].lower()
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for name in ("vllm", "ray", "argilla", "label-studio", "deepspeed"):
        assert not re.search(rf"(^|\s){name}(\[|==|>=|\s|$)", wanted), name
        assert not re.search(rf"^{name}==", pinned, re.M), name


def test_requirements_are_pinned():
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0].lower()) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = re.findall(r"(?:^|\s)([A-Za-z0-9_.-]+)", " ".join(settings()[name] for name in ("requirements", "dev_requirements", "annotation_requirements", "ifeval_requirements", "harness_requirements")))
    assert not {re.sub(r"[-_.]+", "-", name.lower()) for name in wanted if name[0].isalpha()} - pinned


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes(path):
    from s3ft_nb.run.plan import work_of
    from s3ft_nb.run.recipe import load_recipe
    recipe = load_recipe(path, ["model=x", f"conversations={ROOT / 'README.md'}"] if "required" in path.read_text() else [])
    assert recipe.name == path.stem and recipe.description
    for step in recipe.steps: work_of(step, {}, "")


def test_readme_is_short_and_its_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    head = "\n".join(text.splitlines()[:30])
    assert "make run" in head and "make test" in head
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    assert "RESULTS_TABLE" not in text
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text): assert (ROOT / picture).exists(), picture


def test_nothing_tracked_is_pickled_or_secret():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if re.search(r"\.(bin|pt|pth|pkl|ckpt)$", name)]


def test_micro_base_is_what_its_card_says():
    from s3ft_nb.core.stage import file_hash
    folder = ROOT / "data/micro-base"
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert file_hash(weights) in (folder / "README.md").read_text()
