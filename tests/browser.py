"A real browser for the tests: Debian's Chromium, driven by Playwright. S3FT_CHROMIUM names another one."
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")


def chromium():
    named = os.environ.get("S3FT_CHROMIUM")
    if named:
        assert Path(named).is_file(), f"S3FT_CHROMIUM names no file: {named}"
        return named
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if not found: pytest.skip("no Chromium found: install Debian's chromium, or name one with S3FT_CHROMIUM", allow_module_level=True)
    return found


@contextmanager
def playing():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright: yield playwright


OPTIONS = {"args": ["--no-sandbox", "--disable-dev-shm-usage"], "accept_downloads": True}


def profile(playwright, folder, **options):
    "A browser with a profile on disk: what it keeps outlives it, as with a person's own browser."
    return playwright.chromium.launch_persistent_context(str(folder), executable_path=chromium(), **(OPTIONS | {"viewport": {"width": 1280, "height": 820}} | options))


def watched(context):
    "A page that notes every request, error and dialog."
    page = context.new_page()
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda message: page.wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: (page.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    return page


def press(page, *keys):
    for key in keys: page.keyboard.press(key)


def tab_to(page, name, most=60):
    "Move the focus by Tab alone until it is on what bears this name."
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement?.textContent.trim().endsWith(" + repr(name) + ")"): return
    raise AssertionError(f"{name} cannot be reached by Tab")
