"The annotation view in a real browser, in each of its hosts: by keyboard, closed and reopened, under hostile content, in all its looks."
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the dev extra")
from browser import chromium, playing, press, profile, tab_to, watched

from s3ft_nb.annotation.page import page_part, write_page
from s3ft_nb.judging.rubric import LETTERS, RUBRIC, label_of
from s3ft_nb.annotation.task import make_task, read_annotations, task_payload
from s3ft_nb.core.records import Message, Pair, Preference, Sample

chromium()  # skips the file where there is none
WALK = {"A": "yyy", "B": "yny", "C": "yyn", "D": "ynn", "E": "n"}  # keys of the three decisions


def sample(i, **fields):
    talk = [Message(role="user", content=f"Question {i}?"), Message(role="assistant", content="A first answer."), Message(role="user", content=f"And number {i}?")]
    given = {"id": f"s{i:04}", "group": "g", "conversation_id": f"c{i}", "turn": 2, "system_prompt_id": "p", "type": "secret-type", "system_prompt": "Speak like a sailor.",
             "prompt": talk, "original": f"The number is {i}.", "response": f"Aye, the number be {i}, matey."}
    return Sample(**(given | fields))


def pair(i, **fields):
    given = {"id": f"p{i:04}", "dialogue_id": f"d{i}", "turn": 2, "system_prompt": "Speak like a sailor.", "prompt": sample(i).prompt,
             "first": f"Aye, {i}.", "second": f"It is {i}.", "arms": ("arm-one", "arm-two")}
    return Pair(**(given | fields))


@pytest.fixture(scope="module")
def playwright():
    with playing() as one: yield one


@pytest.fixture
def browser(playwright, tmp_path):
    "A fresh profile; `browser(\"again\")` is the same one after the browser was closed."
    open_ones = []

    def launch(name="profile", **options):
        for one in open_ones: one.close()
        open_ones[:] = [profile(playwright, tmp_path / name, **options)]
        return watched(open_ones[0])
    yield launch
    for one in open_ones: one.close()


def open_page(page, path):
    page.goto(path.as_uri() if isinstance(path, Path) else path)
    page.wait_for_selector("article", state="attached")
    return page


def item(page):
    return page.locator("article").get_attribute("aria-label")


def download(page, start):
    with page.expect_download() as coming: start()
    return coming.value.path()


# ---------------------------------------------------------------- one file


def test_thirty_items_by_keyboard_closed_reopened_exported(browser, tmp_path):
    path = write_page(tmp_path / "annotate.html", make_task([sample(i) for i in range(30)], "Sailors"))
    page = open_first(browser(), path, "Ann Ä.")
    letters = [("ABCDE" * 6)[i] for i in range(30)]
    for i, letter in enumerate(letters[:14]): press(page, *(WALK[letter] if i % 2 else letter.lower()))
    assert item(page) == "Item 15 of 30" and not page.wrong
    asked = page.asked

    page = open_page(browser(), path)  # the browser was closed; no name is asked again
    assert item(page) == "Item 15 of 30"
    for letter in letters[14:]: press(page, *WALK[letter])
    assert page.get_by_role("heading", name="All done (30)").is_visible()
    tab_to(page, "Export")
    file = download(page, lambda: page.keyboard.press("Enter"))
    rows = read_annotations(file)
    assert [row.sample_id for row in rows] == [f"s{i:04}" for i in range(30)]
    assert [LETTERS[row.label] for row in rows] == letters
    assert [row.position for row in rows] == list(range(1, 31))
    assert all(row.annotator == "Ann Ä." and 0 <= row.seconds < 60 for row in rows)
    assert {url.split(":")[0] for url in asked + page.asked} <= {"file", "blob"} and not page.wrong


def open_first(page, path, name):
    page.goto(path.as_uri())
    page.get_by_role("textbox").wait_for()
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("article", state="attached")
    return page


def test_two_people_on_one_computer(browser, tmp_path):
    path = write_page(tmp_path / "annotate.html", make_task([sample(i) for i in range(3)]))
    page = open_first(browser(), path, "ann")
    press(page, "a")
    page.get_by_text("Menu").click()
    page.get_by_role("button", name="Not ann?").click()
    page.get_by_role("textbox").wait_for()
    page.keyboard.type("bob")
    page.keyboard.press("Enter")
    page.wait_for_selector("article", state="attached")
    assert item(page) == "Item 1 of 3"
    press(page, "b")
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert [(row.annotator, row.label) for row in rows] == [("bob", "bad_context")] and not page.wrong


def test_two_thousand_items_within_a_tenth_of_a_second(browser, tmp_path):
    most = 250 if os.environ.get("PYTEST_XDIST_WORKER") else 100  # ms; beside another worker a key waits for its core
    long = "A sentence of ordinary length that says little. " * 40
    path = write_page(tmp_path / "annotate.html", make_task([sample(i, response=long + str(i)) for i in range(2000)]), "ann")
    page = open_page(browser(), path)
    page.evaluate("""() => { window.slow = []; new PerformanceObserver((list) => list.getEntries().forEach((e) => e.name === "keydown" && slow.push(e.duration))).observe({ type: "event", durationThreshold: 16, buffered: true }); }""")
    for attempt in range(1, 4):  # a busy machine may spoil a round, a slow page spoils them all
        took = sorted(page.evaluate("""() => { const took = []; slow.length = 0; for (let i = 0; i < 560; i++) {
            const start = performance.now(); document.dispatchEvent(new KeyboardEvent("keydown", { key: "a", code: "KeyA" }));
            document.querySelector("article").getBoundingClientRect(); took.push(performance.now() - start); } return took; }"""))
        for _ in range(60): press(page, "a")
        page.wait_for_timeout(300)
        painted = max(page.evaluate("slow"), default=0)  # key to next paint; what took less than 16 ms is not listed
        assert item(page) == f"Item {attempt * 620 + 1} of 2000"
        print(f"key to next item: laid out, 560 items, median {took[280]:.1f} ms, longest {took[-1]:.1f} ms; painted, 60 keys, longest {painted:.0f} ms")
        if took[-1] <= most and painted <= most: break
    assert took[-1] <= most and painted <= most
    assert {url.split(":")[0] for url in page.asked} <= {"file"} and not page.wrong


def test_decisions_can_be_taken_back_and_direct_letters_work(browser, tmp_path):
    page = open_page(browser(), write_page(tmp_path / "a.html", make_task([sample(i) for i in range(4)]), "ann"))
    current = page.locator("[aria-current=step]")
    press(page, "y", "n", "Backspace")
    assert RUBRIC["en"]["order"][1] in current.inner_text()
    press(page, "y", "n")  # applicable, fits, does not follow
    assert item(page) == "Item 2 of 4"
    press(page, "s", "d", "u")  # skip the second, label the third, take it back
    assert item(page) == "Item 3 of 4"
    press(page, "e", "a")
    assert item(page) == "Item 2 of 4" and "skipped" in page.locator(".s3ft-panel").inner_text()  # skipped ones come last
    press(page, "b", "[", "[")  # all done; back twice, to the third
    assert page.get_by_role("button", name="E, setting not applicable").get_attribute("aria-pressed") == "true"
    press(page, "c")
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert {row.sample_id[-1]: row.label for row in rows} == {"0": label_of(True, True, False), "1": "bad_context", "2": "bad_system", "3": "good"}
    assert sorted(row.position for row in rows) == [1, 2, 3, 4] and not page.wrong


def test_spans_notes_and_offsets_in_characters(browser, tmp_path):
    text = "Aye 👍🏽 – the 数字 is naïve, matey.\nGood day!"
    path = write_page(tmp_path / "a.html", make_task([sample(i, response=text) for i in range(3)]), "ann")
    page = open_page(browser(), path)
    press(page, "m", *["ArrowRight"] * 3, "Shift+ArrowRight", " ", "Escape")
    box = page.locator(".s3ft-response .s3ft-text")
    assert page.locator(".s3ft-response mark").count() >= 1
    press(page, "w")
    page.keyboard.type("a note with y and n in it")
    press(page, "Escape", "b")
    assert item(page) == "Item 2 of 3"
    box.locator("xpath=..").scroll_into_view_if_needed()
    spot = page.evaluate("""() => { const box = document.querySelector(".s3ft-response .s3ft-text"), node = box.firstChild, at = node.data.indexOf("matey"), range = document.createRange();
        range.setStart(node, at); range.setEnd(node, at + 5); const r = range.getBoundingClientRect(); return [r.left + 1, r.top + r.height / 2, r.right - 1]; }""")
    page.mouse.move(spot[0], spot[1])
    page.mouse.down()
    page.mouse.move(spot[2], spot[1], steps=4)
    page.mouse.up()
    assert page.locator(".s3ft-response mark").inner_text().startswith("mate")
    press(page, "c")
    press(page, "m", "End", " ", " ", "Escape", "a")  # marked and cleared again
    first, second, third = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert [text[a:b] for a, b in first.spans] == ["数字 is"]
    assert first.note == "a note with y and n in it" and first.label == "bad_context"
    assert text[second.spans[0][0]:second.spans[0][1]].strip(",.") == "matey"
    assert third.spans == [] and not page.wrong
    page.keyboard.press("[")
    page.keyboard.press("[")
    assert page.locator(".s3ft-response mark").count() == 1  # marks come back with the answer
    page.locator(".s3ft-response mark").click()
    assert page.locator(".s3ft-response mark").count() == 0  # a click takes a mark away, and the answer is updated
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert rows[1].spans == [] and rows[1].label == "bad_system" and rows[1].position == 2


def test_an_export_comes_back_in(browser, tmp_path):
    path = write_page(tmp_path / "a.html", make_task([sample(i) for i in range(6)]), "ann")
    page = open_page(browser(), path)
    press(page, "a", "b", "c")
    file = download(page, lambda: page.get_by_role("button", name="Export").first.click())
    kept = tmp_path / "kept.jsonl"
    kept.write_bytes(Path(file).read_bytes() + b'broken\n{"sample_id": "other", "annotator": "ann", "label": "good"}\n')

    page = open_page(browser("another"), path)
    press(page, "e")
    page.locator("input[type=file]").set_input_files(kept)
    page.get_by_text("2 annotations imported, 1 already here, 2 about other items or unreadable").first.wait_for()
    assert item(page) == "Item 4 of 6"
    press(page, "d", "d", "d")
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert {row.sample_id[-1]: LETTERS[row.label] for row in rows} == {"0": "E", "1": "B", "2": "C", "3": "D", "4": "D", "5": "D"}
    other = tmp_path / "bob.jsonl"
    other.write_text('{"sample_id": "s0001", "annotator": "bob", "label": "good"}\n')
    page.locator("input[type=file]").set_input_files(other)
    page.get_by_text("by bob, not by ann").first.wait_for()
    assert not page.wrong


def test_blind_pairs(browser, tmp_path):
    path = write_page(tmp_path / "p.html", make_task([pair(i) for i in range(30)], "Blind"), "ann")
    assert "arm-one" not in path.read_text() and "dialogue_id" not in path.read_text()
    page = open_page(browser(), path)
    keys = ["a", "b", "t", "x", "1", "4"] * 5
    for key in keys[:20]: press(page, key)
    page = open_page(browser(), path)
    assert item(page) == "Item 21 of 30"
    press(page, "w")
    page.keyboard.type("shorter")
    press(page, "Escape")
    for key in keys[20:]: press(page, key)
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()), Preference)
    said = {"a": "first", "b": "second", "t": "tie", "x": "both_bad", "1": "first", "4": "both_bad"}
    assert [row.choice for row in rows] == [said[key] for key in keys]
    assert [row.reason for row in rows] == [""] * 20 + ["shorter"] + [""] * 9 and not page.wrong


# ---------------------------------------------------------------- hostile content

HOSTILE = ["<script>window.pwned = 1</script>", "</script><script>window.pwned = 2</script>", "<img src=x onerror='window.pwned = 3'>", "<svg onload=window.pwned=4>",
           "[click](javascript:window.pwned=5)", "<a href='javascript:window.pwned=6'>x</a>", "{{ 7 * 7 }} ${window.pwned=7} <%= 1 %>", "<!--<script>", "]]>", "\u2028\u2029",
           "<iframe srcdoc='<script>parent.pwned=8</script>'></iframe>", "<style>*{display:none}</style>", "\\u003cscript>", "__proto__", "&lt;b&gt;", "'\"><b>bold</b>"]
BIDI = "safe \u202egnp.exe\u202c and \u2066isolated\u2069, \u200bhidden, \x07bell, tag\U000e0041"


def hostile_task():
    text = "\n".join(HOSTILE)
    talk = [Message(role="user", content=text), Message(role="assistant", content=text), Message(role="user", content=BIDI)]
    rows = [sample(0, system_prompt=text, prompt=talk, original=text, response=text), sample(1, response=BIDI), sample(2, response="x" * 100_000),
            sample(3, response="\u202ea" * 50_000), sample(4, response="لا أعرف، ربما غدًا. OK?"), sample(5, response="نص عربي", id="</script>__proto__")]
    return make_task(rows, text)


def check_inert(page):
    assert page.evaluate("window.pwned") is None
    inside = page.evaluate("""() => [...document.querySelectorAll(".s3ft *")].map((n) => n.localName).filter((n) => ["script", "img", "svg", "iframe", "a", "style", "object", "embed", "b"].includes(n)).join()""")
    assert inside.replace("b", "").replace(",", "") == "", inside  # b: the Yes and No of decisions
    handlers = page.evaluate("""() => [...document.querySelectorAll("*")].flatMap((n) => n.getAttributeNames()).filter((n) => n.startsWith("on")).length""")
    assert handlers == 0


def walk_hostile(page):
    "Go through the hostile items by keyboard, in whatever host."
    shown = page.locator(".s3ft-response .s3ft-text").inner_text()
    for text in HOSTILE[:9]: assert text in shown, text
    check_inert(page)
    press(page, "o", "h", "h", "y", "n")
    check_inert(page)
    press(page, "y")  # Item 2
    badges = page.locator(".s3ft-response .s3ft-hidden").all_inner_texts()
    assert badges == ["RLO", "PDF", "LRI", "PDI", "ZWSP", "U+0007", "U+E0041"], badges
    assert not set("\u202e\u202c\u2066\u200b\x07") & set(page.locator(".s3ft-response .s3ft-text").evaluate("n => n.textContent"))
    start = time.monotonic()
    press(page, "a")
    page.get_by_role("button", name="Show all (100,000)").click()
    assert len(page.locator(".s3ft-response .s3ft-text").evaluate("n => n.textContent")) == 100_000
    press(page, "a")
    assert page.locator(".s3ft-response .s3ft-hidden").count() <= 200 and "\u202e" not in page.locator(".s3ft-response .s3ft-text").evaluate("n => n.textContent")
    press(page, "m", "ArrowRight", "Escape", "a")
    assert time.monotonic() - start < 30  # a second on a quiet machine; what freezes takes minutes
    assert page.locator(".s3ft-response .s3ft-text").evaluate("n => getComputedStyle(n).unicodeBidi") == "plaintext"
    press(page, "a")
    check_inert(page)
    press(page, "a")
    check_inert(page)
    assert page.locator("article").get_attribute("aria-label").startswith("All done")


def test_hostile_content_is_inert_in_a_file(browser, tmp_path):
    page = open_page(browser(), write_page(tmp_path / "h.html", hostile_task(), "<b>ann</b>"))
    walk_hostile(page)
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert len(rows) == 6 and rows[0].annotator == "<b>ann</b>" and rows[5].sample_id == "</script>__proto__"
    assert {url.split(":")[0] for url in page.asked} <= {"file", "blob"} and not page.wrong


def test_the_policy_stops_what_escaping_might_miss(browser, tmp_path):
    "Markup smuggled into the file behind our back does not run, and no address is contacted."
    bad = '<script>window.pwned=1</script><img src="https://example.org/x.png" onerror="window.pwned=2"><link rel=stylesheet href="https://example.org/x.css">'
    path = tmp_path / "bad.html"
    path.write_text(write_page(path, make_task([sample(0)]), "ann").read_text().replace("<noscript>", bad + "<noscript>"))
    page = browser()
    page.done_asking = []
    page.on("requestfinished", lambda request: page.done_asking.append(request.url) if request.url.startswith("http") else None)
    open_page(page, path)
    sent = page.evaluate("() => fetch('https://example.org/').then(() => 'sent', () => 'stopped')")
    assert sent == "stopped" and page.evaluate("window.pwned") is None
    assert page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; return 'written'; } catch { return 'refused'; } }") == "refused"
    assert not page.done_asking and sum("Content Security Policy" in text for text in page.wrong) >= 3


# ---------------------------------------------------------------- looks and access


def luminance(path):
    from PIL import Image
    return sum(Image.open(path).convert("L").resize((32, 32)).getdata()) / 1024


LOOKS = {"light": {}, "dark": {"color_scheme": "dark"}, "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True},
         "chinese": {"locale": "zh-CN"}, "pairs": {}, "pairs-dark-phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}}


@pytest.mark.parametrize("look", LOOKS)
def test_looks(browser, tmp_path, look):
    folder = Path(os.environ.get("S3FT_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    zh = look == "chinese"
    made = make_task([pair(i) for i in range(9)]) if "pairs" in look else make_task([sample(i, **({"response": "好的，编号是 " + str(i), "system_prompt": "请用船员的口吻说话。"} if zh else {})) for i in range(9)], language="zh" if zh else "en")
    page = open_page(browser(**LOOKS[look]), write_page(tmp_path / "a.html", made, "ann"))
    press(page, *("ab" if "pairs" in look else "abcy"))
    page.wait_for_timeout(300)
    page.screenshot(path=folder / f"{look}.png")
    assert (luminance(folder / f"{look}.png") < 80) == ("dark" in look)
    width, height = page.evaluate("[innerWidth, innerHeight]")
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
    for part in (".s3ft-setting", ".s3ft-panel"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= height + 1, part  # prompt and decision always in sight
    assert page.locator(".s3ft-read").bounding_box()["height"] > 200
    page.mouse.move(200, 400)
    page.locator(".s3ft-read").evaluate("n => n.scrollTo(0, 1e6)")
    assert page.locator(".s3ft-setting .s3ft-text").is_visible()
    if zh:
        press(page, "r")
        assert RUBRIC["zh"]["long"]["good"] in page.get_by_role("dialog").inner_text()
        press(page, "r")
        assert page.get_by_role("dialog").count() == 0
    assert not page.wrong


def test_a_screen_reader_finds_its_way(browser, tmp_path):
    page = open_page(browser(), write_page(tmp_path / "a.html", make_task([sample(i) for i in range(3)], "Sailors"), "ann"))
    for role, name in [("main", None), ("banner", None), ("article", "Item 1 of 3"), ("region", "Setting (system prompt)"), ("region", "Decide in this order"),
                       ("progressbar", "0 of 3"), ("button", "Yes"), ("button", "A, fits and follows"), ("button", "Undo"), ("button", "Skip")]:
        assert page.get_by_role(role, **({"name": name} if name else {})).count() >= 1, (role, name)
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, textarea, input, summary, dialog")].filter((n) => n.type !== "file" && !(n.getAttribute("aria-label") || n.textContent.trim() || n.labels?.length || n.s3ft-hidden || n.closest("[hidden]"))).length""")
    assert unnamed == 0
    assert page.evaluate("document.activeElement.localName") == "article"
    press(page, "y")
    assert page.locator("[role=status]").inner_text() == RUBRIC["en"]["order"][1]  # what comes next is said
    press(page, "y", "n")
    said = page.locator("[role=status]").inner_text()
    assert "C, fits but does not follow" in said and "Item 2 of 3" in said
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Item 2 of 3"
    tab_to(page, "No")
    page.keyboard.press("Enter")  # a button under the focus does what it says
    assert item(page) == "Item 3 of 3"
    press(page, "?")
    page.get_by_label("Single keys on").uncheck()
    press(page, "Escape", "a", "b")
    assert item(page) == "Item 3 of 3"  # single keys are off
    assert not page.wrong


def test_other_layouts_and_input_methods(browser, tmp_path):
    page = open_page(browser(), write_page(tmp_path / "a.html", make_task([sample(i) for i in range(3)]), "ann"))
    send = """([key, code]) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, code, bubbles: true, cancelable: true }))"""
    for key, code in (("ф", "KeyA"), ("Process", "KeyB"), ("ش", "KeyA")): page.evaluate(send, [key, code])
    rows = read_annotations(download(page, lambda: page.get_by_role("button", name="Export").first.click()))
    assert [LETTERS[row.label] for row in rows] == ["A", "B", "A"]


# ---------------------------------------------------------------- the widget


WIDGET = """<!doctype html><meta charset=utf-8><body><div id=el></div><script type=module>
{script}
const heard = [], model = {{ get: (name) => window.given, send: (message) => window.toPython(message).then((answers) => answers.forEach((one) => heard.forEach((f) => f(one)))),
  on: (_, f) => heard.push(f), off: (_, f) => heard.splice(heard.indexOf(f), 1) }};
window.given = await window.task();
window.leave = await widget.render({{ model, el: document.getElementById("el") }});
</script>"""


def widget_page(page, tmp_path, made, file, who="ann"):
    "The widget's own script under a model with anywidget's interface, wired to the Python side of the widget."
    pytest.importorskip("anywidget")
    from s3ft_nb.annotation.page import annotate
    python, out = annotate(made, file, who), []
    python.send = out.append

    def hear(message):
        out.clear()
        python.receive(message)
        return list(out)
    page.expose_function("toPython", hear)
    page.expose_function("task", lambda: task_payload(made, who))
    path = tmp_path / "widget.html"
    path.write_text(WIDGET.format(script=page_part("view.js", "widget.js").replace("export default", "const widget =")) + f"<style>{page_part('view.css')}</style>")
    page.goto(path.as_uri())
    page.wait_for_selector("article", state="attached")
    page.locator("article").focus()
    return python


def test_thirty_items_in_the_widget(browser, tmp_path):
    made, file = make_task([sample(i) for i in range(30)]), tmp_path / "labels.jsonl"
    python = widget_page(page := browser(), tmp_path, made, file)
    for letter in ("abcde" * 6)[:17]: press(page, letter)
    page.wait_for_function("document.querySelector('.s3ft-status').textContent === 'Saved'")
    assert len(python.rows) == len(read_annotations(file)) == 17
    python = widget_page(page := browser(), tmp_path, made, file)  # a new kernel and a new browser
    assert item(page) == "Item 18 of 30"
    for letter in ("abcde" * 6)[17:]: press(page, *WALK[letter.upper()])
    page.wait_for_function("document.querySelector('.s3ft-status').textContent === 'Saved'")
    rows = read_annotations(file)
    assert [LETTERS[row.label].lower() for row in rows] == list("abcde" * 6) and [row.position for row in rows] == list(range(1, 31)) and not page.wrong


def test_hostile_content_is_inert_in_the_widget(browser, tmp_path):
    widget_page(page := browser(), tmp_path, hostile_task(), tmp_path / "labels.jsonl")
    walk_hostile(page)
    page.wait_for_function("document.querySelector('.s3ft-status').textContent === 'Saved'")
    assert len(read_annotations(tmp_path / "labels.jsonl")) == 6 and not page.wrong
