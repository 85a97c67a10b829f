"The widget in a real JupyterLab: thirty items by keyboard, the notebook closed and opened again."
import importlib.util
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

pytestmark = pytest.mark.slow
for name in ("playwright", "anywidget", "jupyterlab"):
    if importlib.util.find_spec(name) is None: pytest.skip(f"{name} is not installed", allow_module_level=True)
from playwright.sync_api import TimeoutError

from browser import chromium, playing, press, profile, watched
from test_annotation_page import WALK, hostile_task, item, sample

from s3ft_nb.annotation.task import read_annotations
from s3ft_nb.judging.rubric import LETTERS
from s3ft_nb.core.files import write_rows

chromium()
CODE = """from s3ft_nb.annotation.task import read_task
from s3ft_nb.annotation.page import annotate
widget = annotate(read_task("items.jsonl"), "labels.jsonl", "ann")
widget"""


@pytest.fixture
def lab(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    token = secrets.token_hex(16)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE), nbformat.v4.new_code_cell("len(widget.rows)")],
                   metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}), tmp_path / "label.ipynb")
    options = [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}", "--ServerApp.open_browser=False", "--allow-root",
               "--LabApp.news_url=None"]
    process = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try: urllib.request.urlopen(f"{address}/api?token={token}", timeout=2); break
        except OSError: time.sleep(0.2)
    yield f"{address}/lab/tree/label.ipynb?token={token}"
    process.terminate()
    process.wait(20)


def run_first_cell(page, link):
    page.goto(link)
    cell = page.locator(".jp-CodeCell .cm-content").first
    cell.wait_for(timeout=30_000)
    view = page.locator(".s3ft article")
    for _ in range(10):  # until the kernel is there to hear it
        cell.click()
        page.keyboard.press("Control+Enter")
        try: view.wait_for(state="attached", timeout=8000)
        except TimeoutError: continue
        break
    view.focus()


def saved(page):
    page.locator(".s3ft .s3ft-status", has_text=re.compile("^Saved$")).wait_for(state="attached", timeout=20_000)


def test_thirty_items_in_jupyterlab(lab, tmp_path):
    write_rows(tmp_path / "items.jsonl", [sample(i) for i in range(30)])
    letters = "abcde" * 6
    with playing() as playwright:
        context = profile(playwright, tmp_path / "profile", viewport={"width": 1400, "height": 1000})
        page = watched(context)
        run_first_cell(page, lab)
        for letter in letters[:16]: press(page, letter)  # a, b, c and d are commands of JupyterLab elsewhere
        saved(page)
        page.screenshot(path=tmp_path / "lab.png")
        assert len(read_annotations(tmp_path / "labels.jsonl")) == 16 and page.locator(".jp-Cell").count() == 2
        context.close()
        context = profile(playwright, tmp_path / "profile", viewport={"width": 1400, "height": 1000})
        page = watched(context)
        run_first_cell(page, lab)
        assert item(page.locator(".s3ft").first) == "Item 17 of 30"
        for letter in letters[16:]: press(page, *WALK[letter.upper()])
        saved(page)
        context.close()
    rows = read_annotations(tmp_path / "labels.jsonl")
    assert [LETTERS[row.label].lower() for row in rows] == list(letters) and [row.position for row in rows] == list(range(1, 31))


def test_hostile_content_in_jupyterlab(lab, tmp_path):
    rows = [sample(0, **{name: one[name] for name in ("id", "system_prompt", "prompt", "original", "response")}) for one in hostile_task().items]
    write_rows(tmp_path / "items.jsonl", rows)
    with playing() as playwright:
        context = profile(playwright, tmp_path / "profile", viewport={"width": 1400, "height": 1000})
        page = watched(context)
        run_first_cell(page, lab)
        for _ in range(6):
            check_inert_inside(page)
            press(page, "o", "a")
        saved(page)
        check_inert_inside(page)
        context.close()
    assert len(read_annotations(tmp_path / "labels.jsonl")) == 6


def check_inert_inside(page):
    assert page.evaluate("window.pwned") is None
    inside = page.evaluate("""() => [...document.querySelectorAll(".s3ft *")].map((n) => n.localName).filter((n) => ["script", "img", "svg", "iframe", "a", "style", "object", "embed"].includes(n)).join()""")
    assert inside == ""
