"""The documentation: its pages are assembled, their links lead somewhere, nothing comes from elsewhere.

The whole site is built and opened in a browser by `pytest -m slow tests/test_docs.py`; both skip without the extra `docs`."""
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import OPTIONS, chromium, playing, watched

ROOT = Path(__file__).resolve().parents[1]
extra = pytest.mark.skipif(not (find_spec("mkdocs_jupyter") and find_spec("material")), reason="needs the extra docs")


def built(folder, glob, *flags):
    "A site with some notebooks, and what mkdocs said."
    python = lambda *words: subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    done = python("docs/build.py", glob)
    assert done.returncode == 0, done.stderr
    done = python("-m", "mkdocs", "build", *flags, "-f", "build/mkdocs.yml", "-d", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def missing(folder):
    "Links of a site that lead nowhere, and what its pages would load from elsewhere. Of equal headings in a notebook the first is found."
    ids = {path: {*re.findall(r'\bid="([^"]+)"', path.read_text())} for path in folder.rglob("*.html") if path.name != "404.html"}
    for page in ids:
        text = page.read_text()
        for kind, target in re.findall(r'\b(href|src)="([^"]*)"', text):
            path, _, anchor = unquote(target).partition("#")
            if re.match(r"(https?:|mailto:|data:|javascript:)", target):
                if kind == "src" and not target.startswith("data:"): yield f"{page.name} loads {target}"
            elif not (there := (page.parent / path.partition("?")[0]).resolve() if path else page).exists(): yield f"{page.name}: {target}"
            elif anchor and there in ids and re.sub(r"_\d+$", "", anchor) not in ids[there] and not anchor.startswith("__"): yield f"{page.name}: {target}"
        yield from (f"{page.name} loads {url}" for url in re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(https?:[^"]+)"', text) if "canonical" not in url)


@extra
def test_pages_are_made_from_code_and_numbers(tmp_path):
    from s3ft_nb import __all__ as functions
    committed = (ROOT / "docs/models.md").read_text()
    said = built(tmp_path / "site", "01_metrics.ipynb")
    assert (ROOT / "docs/models.md").read_text() == committed, "docs/build.py made other tables: commit them"
    assert not [line for line in said.splitlines() if "WARNING" in line and ".ipynb" not in line]  # of notebooks that were left out
    page = {path.relative_to(tmp_path / "site").as_posix(): path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    assert all(f'id="{path.stem}"' in page["recipes.html"] for path in (ROOT / "recipes").glob("*.toml"))
    assert all(f'id="{name}"' in page["python.html"] for name in functions)
    assert all(f"<td>{name}</td>" in page["models.html"] for name in json.loads((ROOT / "tests/fixtures/verdicts.json").read_text()))
    assert page["models.html"].count("GiB</td>") == 5 and "#|" not in page["nbs/measure/01_metrics.html"]
    numbers = re.findall(r"^\| \*?\*?[\w-]+\*?\*? \|.*\d\.\d\d \[.*$", (ROOT / "README.md").read_text() + (ROOT / "RESULTS.md").read_text(), re.M)
    assert numbers and all(cell in page["results.html"] for row in numbers for cell in re.findall(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", row))
    assert not [line for line in missing(tmp_path / "site") if "nbs/" not in line]


@extra
@pytest.mark.slow
def test_the_whole_site_in_a_browser(tmp_path):
    import functools
    import http.server
    import threading
    built(tmp_path / "site", "*.ipynb", "--strict")
    assert not [*missing(tmp_path / "site")]
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}), directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    try:
        with playing() as playwright:
            page = watched(playwright.chromium.launch(executable_path=chromium(), args=OPTIONS["args"]).new_context())
            for path in sorted((tmp_path / "site").rglob("*.html")):
                page.goto(home + path.relative_to(tmp_path / "site").as_posix())
                assert not page.wrong, (path.name, page.wrong)
            assert not [url for url in page.asked if not url.startswith((home, "data:", "blob:"))]
    finally: server.shutdown()
