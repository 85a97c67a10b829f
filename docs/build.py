"""Assemble the documentation in build/: hand-written pages, and what is generated from code, notebooks and numbers.

usage: python docs/build.py [GLOB of notebooks]; mkdocs build --strict -f build/mkdocs.yml   (`make docs` does both)"""
import json, os, re, shutil, sys, tomllib
from hashlib import sha256
from inspect import getdoc, signature
from pathlib import Path

import yaml
ROOT = Path(__file__).resolve().parents[1]
BUILD, PAGES = ROOT / "build", ROOT / "build" / "pages"
CODE = re.search(r"git_url = (\S+)", (ROOT / "settings.ini").read_text())[1] + "/blob/main/"
PROJECT = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
MOVED = {name: name.lower() for name in PROJECT} | {"README.md": "index.md", "RESULTS.md": "results.md"}


def place(text: str, home: str, page: str, ending: str = "") -> str:
    "Turn a file's links into links of its page: to other pages where there is one, else to the code host."
    def link(found: re.Match) -> str:
        path, hash, anchor = found[2].partition("#")
        if "://" in path: return found[0]
        path = os.path.normpath(os.path.join(os.path.dirname(home), path or os.path.basename(home)))
        there = path if path.endswith(".ipynb") else MOVED.get(path, "")
        if path.endswith(".png"): shutil.copyfile(ROOT / path, PAGES / (there := f"assets/{Path(path).name}"))
        if ending: there = re.sub(r"\.(md|ipynb)$", ending, there)
        return f"{found[1]}({os.path.relpath(there, os.path.dirname(page) or '.') if there else CODE + path}{hash}{anchor})"
    text = re.sub(r"!\[([^\]]*)\]\(https?:[^)]*\)", r"\1", text)  # no picture from elsewhere
    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, text)


def write(page: str, text: str) -> None:
    (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
    (PAGES / page).write_text(text, encoding="utf-8")


def table(heads: list[str], rows: list[list[str]], indent: str = "") -> str:
    safe = lambda cell: str(cell).replace("\n", " ").replace("|", "\\|").replace("<", "&lt;")
    return "\n".join(f"{indent}| {' | '.join(map(safe, row))} |" for row in [heads, ["---"] * len(heads), *rows])


def readme() -> None:
    head, *parts = re.split(r"^(?=## )", (ROOT / "README.md").read_text(), flags=re.M)
    parts = {part.splitlines()[0][3:]: part for part in parts}
    numbers = re.search(r"<!-- results.*?-->(.*)<!-- end of", parts.pop("Results"), re.S)[1].strip()
    write("index.md", place(head, "README.md", "index.md") + (ROOT / "docs" / "guide.md").read_text())
    write("quick-start.md", place("# Quick start\n\n" + "".join(parts.values()), "README.md", "quick-start.md"))
    text = (ROOT / "RESULTS.md").read_text().replace("The table is in the [README](README.md#results).", f"{numbers}\n\n")
    write("results.md", place(re.sub(r"\n<!--.*?-->\n", "\n", text), "RESULTS.md", "results.md"))
    for name in PROJECT: write(MOVED[name], place((ROOT / name).read_text(), name, MOVED[name]))


def recipes() -> None:
    from s3ft_nb.run.recipe import load_recipe
    text = (ROOT / "docs" / "recipes.md").read_text()
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        due = tomllib.loads(path.read_text()).get("required", [])
        recipe, need = load_recipe(path, [f"{key}={ROOT / 'README.md'}" for key in due]), "".join(f" --set {key}=…" for key in due)
        text += f"\n## {recipe.name}\n\n{recipe.description}.\n\n    s3ft run {recipe.name}{need}\n"
        for step in recipe.steps:
            where, shown = step.notebook.relative_to(ROOT / "nbs").as_posix(), lambda value: json.dumps(value, ensure_ascii=False)
            rows = [[f"`{key}`", "yours" if key in due else f"`{shown(value)}`"] for key, value in step.values.items()]
            text += f'\n??? note "{step.id}"\n\n    [{where}](nbs/{where})\n\n{table(["parameter", "value"], rows, "    ")}\n'
    write("recipes.md", text)


def python() -> None:
    import s3ft_nb
    text = (ROOT / "docs" / "python.md").read_text()
    for name in s3ft_nb.__all__:
        stated, result = str(signature(function := getattr(s3ft_nb, name)))[1:].rsplit(") -> ", 1)
        stated = re.sub(r", (?=\w+:|\*)", ",\n    ", stated)
        text += f"\n## {name}\n\n```text\n{name}(\n    {stated}\n) -> {result}\n\n{getdoc(function)}\n```\n"
    write("python.md", text.replace("pathlib.Path", "Path").replace("s3ft_nb.api.", ""))


def models() -> None:
    from s3ft_nb.run.plan import duration, make_plan
    found, first = json.loads((ROOT / "tests/fixtures/verdicts.json").read_text()), lambda texts: "; ".join(one.partition(": ")[0] for one in texts) or "–"
    rows = [[name, one["system_role"], "yes" if one["trainable"] else "no", first(one["decisions"]), first(one["notes"])] for name, one in sorted(found.items())]
    families = table(["template", "system prompt", "can be trained", "decide", "worth knowing"], rows)
    talk = lambda i: json.dumps({"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]})
    (BUILD / "talks.jsonl").write_text("\n".join(map(talk, range(460))))
    plans = {size: make_plan("s3ft-qlora", [f"model=some/model-{size}", f"conversations={BUILD / 'talks.jsonl'}"], BUILD / "run") for size in ("0.6B", "1.7B", "4B", "8B", "14B")}
    rows = [[size, *(duration(one["total_seconds"][machine]) for machine in ("T4", "H100")), f"{one['peak_memory_gib']:.0f} GiB"] for size, one in plans.items()]
    home = ROOT / "docs" / "models.md"  # it carries its tables, for those who read it on the code host
    text, hardware = home.read_text(), table(["model", "one T4 (16 GB)", "one H100", "memory"], rows)
    for name, made in (("families", families), ("hardware", hardware)):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{made}\n{found[2]}", text, flags=re.S)
    home.write_text(text)
    write("models.md", re.sub(r"<!-- \w+ -->\n", "\n", text))


def chapters(glob: str) -> dict:  # {folder: pages}; hidden cells and directives are left out
    nav = {}
    for path in (path for path in sorted((ROOT / "nbs").rglob(glob)) if not {".ipynb_checkpoints", "runs"} & {*path.parts}):
        home, book = path.relative_to(ROOT).as_posix(), json.loads(path.read_text())
        book["cells"] = [cell for cell in book["cells"] if not re.match(r"#\|\s*(hide|default_exp)", "".join(cell["source"]))]
        for cell in book["cells"]:
            plain = re.sub(r"^#\|.*\n", "", "".join(cell["source"]), flags=re.M)
            cell["source"] = place(plain, home, home, ".html") if cell["cell_type"] == "markdown" else plain
        write(home, json.dumps(book | {"metadata": {"language_info": {"name": "python"}}}))
        nav.setdefault(" / ".join(path.relative_to(ROOT / "nbs").parts[:-1]) or "top", []).append(
            {book["cells"][0]["source"].splitlines()[0].lstrip("# "): home})
    return nav


def main(glob: str = "*.ipynb") -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.py", "__pycache__", "guide.md"))
    floors = chapters(glob)
    for part in (readme, recipes, python, models): part()
    pick = lambda title, chain: {title: [{name: pages} for name, pages in floors.items() if name.startswith("chain") == chain]}
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] + [pick("Chapters", False), pick("Chain notebooks", True)]
    (BUILD / "mkdocs.yml").write_text(json.dumps({"INHERIT": "../mkdocs.yml", "docs_dir": "pages", "site_dir": "../_docs", "nav": nav, "hooks": [__file__]}))


def on_post_page(output: str, page, config) -> str:  # called by mkdocs
    "A style that every notebook repeats, half a megabyte, becomes a file that pages share."
    if not (style := re.search(r"<style[^>]*>([^<]{10000,})</style>", output)): return output
    name = f"assets/{sha256(style[1].encode()).hexdigest()[:12]}.css"
    Path(config["site_dir"], name).write_text(style[1], encoding="utf-8")
    return output.replace(style[0], f'<link rel="stylesheet" href="{os.path.relpath(name, os.path.dirname(page.file.dest_path))}">')


if __name__ == "__main__": main(*sys.argv[1:])
