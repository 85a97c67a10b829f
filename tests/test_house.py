"The house rules that nbdev is silent about."
import ast
import importlib
import json
import re
import subprocess
import tomllib
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and "runs" not in p.parts]
CHAIN = [p for p in NOTEBOOKS if "chain" in p.parts]
CHAPTERS = [p for p in NOTEBOOKS if "chain" not in p.parts]
MODULES = [p for p in sorted((ROOT / "s3ft_nb").rglob("*.py")) if not p.name.startswith("_")]
# Packages of one floor may not import each other; a method knows core, lm and judging only.
MAY_IMPORT = {
    "core": set(), "lm": {"core"}, "judging": {"core", "lm"}, "measure": {"core", "lm", "judging"},
    "annotation": {"core", "lm", "judging"}, "methods": {"core", "lm", "judging"}, "micro": {"core", "lm", "judging", "measure"},
    "deploy": {"core", "lm", "judging", "measure"},
    "report": {"core", "judging"}, "run": {"core", "lm"}, "comparison": {"core", "lm", "measure", "report"},
    "api": {"core", "lm", "measure", "report", "run", "comparison"},
    "cli": {"core", "lm", "judging", "measure", "annotation", "report", "run", "deploy", "api"},
}
DIALECT = re.compile(  # Words that this field does not use, with what it says instead in CONTRIBUTING.md
    r"\b(Wish|Ruled|Merit|figures? of merit|tally|[Tt]old about|reconcile with the books|[Cc]omes? along|has no say|has a say|go_on|goes on from"
    r"|[Uu]nder way|[Bb]y chance|is no share|is none of the|what becomes of|[Ff]ate|squared_ends|Trouble|only_once|pushes|why_forgeable"
    r"|can put right|whole at the last turn|source of chance)\b")
MODULES_MOST, ROOM, WIDTH = 64, 400, 120
LINES = {"house": 11_570, "methods": 13_646, "cluster": 260, "forest": 300, "gpu": 350, "deploy": 1_105, "comparison": 400}  # All rooms but those of `SISTERS`, steps side by side, on a cluster and in a store, and copies of a process among them; with all four methods; beside: deploy, api and probe; comparison; Ray; lm.forest; lm.gpu
SISTERS = {  # What the three sister methods add, the skills of the base among it
    f"{name}.py" for name in ("methods/rnr", "methods/conflicts", "methods/constraints", "methods/selfalign", "methods/engraving",
                              "micro/principles", "micro/skills", "judging/pairs", "lm/dpo", "measure/choices")}


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
    (at,) = [i for i, c in enumerate(cells) if "parameters" in c["metadata"].get("tags", [])]
    assert "".join(cells[at + 1]["source"]).endswith("check_injected(In)  # what papermill put in")
    for source in code(path):
        assert not re.search(r"^#\|", source, re.M)
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(source).body)


def test_only_the_micro_chain_knows_the_truth():
    "What is right in the micro world is asked by simulated annotators and the final scoring alone (see also MAY_IMPORT)."
    knowing = {path.relative_to(ROOT).as_posix() for path in CHAIN if re.search(r"truth|s3ft_nb\.micro", "\n".join(code(path)))}
    assert knowing == {f"nbs/chain/micro/{name}.ipynb" for name in ("00_base", "01_world", "02_annotators", "03_roles", "04_principles", "05_principles_kept", "06_constraints", "07_judger")}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_notebooks_are_whole(path):
    "Chapters show small results, chain notebooks none until they are run."
    text = path.read_text()
    assert "<<<<<<<" not in text and len(text) < 100_000
    cells = json.loads(text)["cells"]
    if path in CHAIN: assert all(not cell.get("outputs") for cell in cells)
    shown = json.dumps([cell.get("outputs") for cell in cells])
    shown = shown.replace("2026-01-01", "")  # the fixed date that templates print
    assert not re.search(r"/(tmp|home|root)/|\b20\d\d-\d\d-\d\d|0x[0-9a-f]{6,}", shown), "a path, a date or an address in an output"


def test_chapters_mirror_the_package():
    for path in CHAPTERS:
        (name,) = exported(path)
        folder, room = (ROOT / "nbs").joinpath(*name.split(".")[:-1]), name.split(".")[-1]
        assert path.parent == folder and re.fullmatch(rf"\d\d_{room}", path.stem), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: ".".join(p.relative_to(ROOT).with_suffix("").parts))
def test_a_room_imports_downwards_and_is_small(path):
    parts, text = path.relative_to(ROOT / "s3ft_nb").with_suffix("").parts, path.read_text()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level: continue
        base = list(parts[:-1])[: len(parts) - node.level]
        target = (base + (node.module or "").split("."))[0]
        assert target in MAY_IMPORT[parts[0]] | {parts[0], ""}, f"{path} imports {target}"
    lines = text.splitlines()
    assert len(lines) <= ROOM
    assert not [line for line in lines if len(line) > WIDTH and "http" not in line and not line.startswith(("__all__", "           '"))]


def code_lines(path):
    return [line for line in path.read_text().splitlines() if not line.startswith(("__all__", "           '"))]


def test_the_house_is_small():
    home = ROOT / "s3ft_nb"
    lines = {path.relative_to(home).as_posix(): len(path.read_text().splitlines()) for path in home.rglob("*.py") if path.name != "_modidx.py"}
    deploy = sum(n for name, n in lines.items() if name.startswith("deploy/") or name in ("api.py", "measure/probe.py"))
    compare = sum(n for name, n in lines.items() if name.startswith("comparison/"))
    for name in ("cluster", "forest", "gpu"): assert lines.pop(f"lm/{name}.py") <= LINES[name]
    assert deploy <= LINES["deploy"] and compare <= LINES["comparison"] and len(MODULES) <= MODULES_MOST
    assert sum(lines.values()) - deploy - compare <= LINES["methods"]
    assert sum(n for name, n in lines.items() if name not in SISTERS) - deploy - compare <= LINES["house"]


def definitions():
    "Every function, class and constant at the top of a module."
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)): yield path, node.name
            if isinstance(node, ast.Assign): yield from ((path, target.id) for target in node.targets if isinstance(target, ast.Name) and target.id != "__all__")


def test_every_definition_is_used():
    words = Counter(word for path in MODULES for line in code_lines(path) for word in re.findall(r"\w+", line))
    words.update(word for path in CHAIN for source in code(path) for word in re.findall(r"\w+", source))
    words.update(re.findall(r"\w+", (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()))
    commands = {node.name for node in ast.parse((ROOT / "s3ft_nb/cli.py").read_text()).body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert not sorted(f"{path.stem}.{name}" for path, name in definitions() if words[name] < 2 and name not in commands)


def test_a_name_has_one_meaning():
    homes = {}
    for path, name in definitions(): homes.setdefault(name, set()).add(path.stem)
    twice = {name: sorted(rooms) for name, rooms in homes.items() if len(rooms - {"cli", "commands", "api"}) > 1}
    assert not twice  # a verb of the command line, and its function in Python, may have the name of what they call


def test_words_are_those_of_the_field():
    prose = [*MODULES, ROOT / "README.md", ROOT / "ARCHITECTURE.md", *NOTEBOOKS, *(ROOT / "recipes").glob("*.toml")]
    found = {str(path.relative_to(ROOT)): sorted(set(DIALECT.findall(path.read_text()))) for path in prose}
    assert not {path: words for path, words in found.items() if words}


def test_every_module_imports():
    for path in MODULES:
        importlib.import_module("s3ft_nb." + ".".join(path.relative_to(ROOT / "s3ft_nb").with_suffix("").parts))


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def test_heavy_neighbours_stay_out():
    "Ray is an extra; `ray[llm]` and vLLM, which pin another torch, are none."
    config = settings()
    wanted, extras = config["requirements"].lower(), " ".join(config[name] for name in config if name.endswith("_requirements")).lower()
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for name in ("vllm", "ray", "argilla", "label-studio", "deepspeed"):
        assert not re.search(rf"(^|\s){name}(\[|==|>=|\s|$)", wanted), name
        assert name == "ray" or not re.search(rf"(^|\s){name}(\[|==|>=|\s|$)", extras) and not re.search(rf"^{name}==", pinned, re.M), name
    assert re.search(r"ray\[data,train\]", extras) and "llm]" not in extras


def test_requirements_are_pinned():
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0].lower()) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = re.findall(r"(?:^|\s)([A-Za-z0-9_.-]+)", " ".join(settings()[name] for name in ("requirements", "dev_requirements", "annotation_requirements", "ifeval_requirements", "harness_requirements", "docs_requirements", "ray_requirements")))
    assert not {re.sub(r"[-_.]+", "-", name.lower()) for name in wanted if name[0].isalpha()} - pinned


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes(path):
    from s3ft_nb.run.plan import work_of
    from s3ft_nb.run.recipe import load_recipe
    recipe = load_recipe(path, ["model=x", f"conversations={ROOT / 'README.md'}"] if "required" in path.read_text() else [])
    assert recipe.name == path.stem and recipe.description
    for step in recipe.steps: work_of(step, {})


def test_readme_is_short_and_its_commands_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    head = "\n".join(text.splitlines()[:30])
    assert "make run" in head and "make test" in head
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    assert "RESULTS_TABLE" not in text
    for picture in re.findall(r"!\[[^\]]*\]\(((?!https://colab)[^)]+)\)", text): assert (ROOT / picture).exists(), picture


def test_nothing_tracked_is_pickled_or_secret():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert not [name for name in tracked if re.search(r"\.(bin|pt|pth|pkl|ckpt)$", name)]


def test_micro_base_is_what_its_card_says():
    from s3ft_nb.core.stage import file_hash
    folder = ROOT / "data/micro-base"
    weights = folder / "model.safetensors"
    assert weights.stat().st_size <= 12e6
    assert file_hash(weights) in (folder / "README.md").read_text()
