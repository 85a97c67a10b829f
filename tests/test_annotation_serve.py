"The annotation server: several people at once, kill -9, hostile requests, and a browser in front of it."
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

pytest.importorskip("uvicorn", reason="uvicorn is not installed; it comes with the annotation extra")

from s3ft_nb.annotation.task import read_annotations
from s3ft_nb.judging.rubric import LABELS, LETTERS
from s3ft_nb.annotation.page import HEADERS, MAX_BODY, Store
from s3ft_nb.core.records import Message, Preference, Sample
from s3ft_nb.core.files import read_rows, write_json, write_rows

COMMAND = [sys.executable, "-c", "from s3ft_nb.cli import app; app()", "annotate"]


def sample(i, **fields):
    given = {"id": f"s{i:04}", "group": "g", "conversation_id": f"c{i}", "turn": 1, "system_prompt_id": "p", "type": "secret-type", "system_prompt": "Speak like a sailor.",
             "prompt": [Message(role="user", content=f"Question {i}?")], "original": f"It is {i}.", "response": f"Aye, {i}."}
    return Sample(**(given | fields))


class Server:
    "A server in a process of its own, that may be killed and started again at the same address."

    def __init__(self, folder, *words):
        self.folder, self.words, self.port, self.process = folder, [str(word) for word in words], 0, None
        self.start()

    def start(self):
        command = [*COMMAND, "serve", str(self.folder / "annotations.sqlite"), *self.words, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        links = {}
        for line in self.process.stdout:
            name, link = line.strip().split(": ")
            links[name] = link
            if len(links) == self.expected(): break
        assert links, self.process.stderr.read()
        self.links, self.port = links, int(re.search(r":(\d+)/#", link)[1])
        while True:
            try: return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError: time.sleep(0.02)

    def expected(self):
        shares = self.words[self.words.index("--assignments") + 1] if "--assignments" in self.words else None
        return len(json.load(open(shares))) if shares else len(self.words[self.words.index("--annotators") + 1].split(","))

    def token(self, name):
        return self.links[name].partition("#")[2]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()

    def ask(self, method, path, body=None, token=None, **headers):
        "(status, headers, text) of one request on a connection of its own."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        given = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}) | {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()
        finally: connection.close()


def stored(path):
    store = Store(path)
    try: return store.rows()
    finally: store.db.close()


def change(name, item, label, submission, **fields):
    row = {"sample_id": item, "annotator": name, "label": label, "seconds": 1.5} | fields
    return json.dumps({"submission": submission, "item": item, "row": row, "skipped": False})


@pytest.fixture
def serving(tmp_path):
    "`serving(samples, *words)` starts a server over them."
    started = []

    def start(rows, *words):
        started.append(Server(tmp_path, write_rows(tmp_path / "items.jsonl", rows), *words))
        return started[-1]
    yield start
    for one in started:
        if one.process.poll() is None: one.kill()


# ---------------------------------------------------------------- at once, and killed


def annotator(server, name, plan, errors):
    "Send a person's answers in order, each until it is confirmed, some of them twice, over connections that break."
    rng = random.Random(name)
    for n, (one, label) in enumerate(plan):
        body, confirmed = change(name, one, label, f"submission-{name}-{n:05}"), 0
        wanted = 1 + (rng.random() < 0.2)  # now and then the page is not sure and sends again
        while confirmed < wanted:
            try: status, _, text = server.ask("POST", "/api/change", body, server.token(name))
            except (OSError, http.client.HTTPException): time.sleep(0.05)
            else:
                if status != 200: return errors.append((name, n, status, text))
                confirmed += 1


def test_five_at_once_and_the_server_killed_twice(serving, tmp_path):
    names, items = list("vwxyz"), [f"s{i:04}" for i in range(80)]
    server = serving([sample(i) for i in range(80)], "--annotators", ",".join(names))
    links, plans, errors = dict(server.links), {}, []
    for name in names:
        rng, order = random.Random(name), items.copy()
        rng.shuffle(order)
        plans[name] = [(item, rng.choice(LABELS)) for item in order]
        for at in sorted(rng.sample(range(10, 80), 10)): plans[name].append((plans[name][at][0], rng.choice(LABELS)))  # ten are changed afterwards
    began = time.monotonic()
    threads = [threading.Thread(target=annotator, args=(server, name, plans[name], errors)) for name in names]
    for thread in threads: thread.start()
    study = tmp_path / "annotations.sqlite"
    for share in (0.3, 0.7):
        while counted(study) < share * 450 and any(thread.is_alive() for thread in threads): time.sleep(0.02)
        assert not errors, errors
        server.kill()
        time.sleep(0.2)
        server.start()
        assert server.links == links  # the same links go on working
    for thread in threads: thread.join()
    print(f"450 changes by five people, two kills: {time.monotonic() - began:.1f} s")
    assert not errors
    rows = stored(study)
    assert {(row.annotator, row.sample_id): row.label for row in rows} == {(name, item): label for name in names for item, label in plans[name]}
    assert len(rows) == 400 and counted(study) == 450  # nothing lost, nothing doubled
    for name in names:
        mine = [row for row in rows if row.annotator == name]
        assert [row.sample_id for row in mine] == [item for item, _ in plans[name][:80]] and [row.position for row in mine] == list(range(1, 81))
    done = subprocess.run([*COMMAND, "export", str(study), str(tmp_path / "labels.jsonl")], capture_output=True, text=True)
    assert done.returncode == 0 and "v: 80 of 80" in done.stdout
    assert read_annotations(tmp_path / "labels.jsonl") == rows


def counted(path):
    import sqlite3
    db = sqlite3.connect(path, timeout=30)
    try: return db.execute("SELECT count(*) FROM change").fetchone()[0]
    finally: db.close()


# ---------------------------------------------------------------- hostile requests


def test_tokens_isolation_and_headers(serving, tmp_path):
    shares = write_json(tmp_path / "shares.json", {"ann": ["s0000", "s0001"], "bob": ["s0001", "s0002"]})
    server = serving([sample(i) for i in range(3)], "--assignments", shares)
    ann, bob = server.token("ann"), server.token("bob")
    assert len(ann) >= 32 and ann != bob
    for method, path in (("GET", "/api/task"), ("POST", "/api/change")):
        for token in (None, "", "x", ann[:-1], ann + "x", "ünïcode".encode("utf-8").decode("latin-1")):
            assert server.ask(method, path, "{}" if method == "POST" else None, token)[0] == 401
    assert server.ask("GET", f"/api/task?token={ann}")[0] == 401  # tokens do not count in addresses

    assert server.ask("POST", "/api/change", change("ann", "s0001", "good", "submission-1"), ann)[0] == 200
    before = server.ask("GET", "/api/task", token=ann)[2]
    for body in (change("ann", "s0001", "all_bad", "submission-2"), change("bob", "s0000", "all_bad", "submission-3"), change("bob", "s0001", "all_bad", "submission-4", sample_id="s0002")):
        assert server.ask("POST", "/api/change", body, bob)[0] == 400  # in ann's name, on ann's item, of another item
    assert server.ask("POST", "/api/change", change("bob", "s0001", "all_bad", "submission-1"), bob)[0] == 200  # the same submission id is another person's own
    assert server.ask("GET", "/api/task", token=ann)[2] == before
    theirs = json.loads(server.ask("GET", "/api/task", token=bob)[2])
    assert [item["id"] for item in theirs["task"]["items"]] == ["s0001", "s0002"] and set(theirs["records"]) == {"s0001"} and theirs["records"]["s0001"]["row"]["label"] == "all_bad"
    assert "ann" not in theirs["records"] and '"annotator": "ann"' not in json.dumps(theirs) and "secret-type" not in json.dumps(theirs)

    for path in ("/", "/app.js", "/view.css", "/api/task", "/none", "/../../etc/passwd", "/%2e%2e/annotations.sqlite", "/annotations.sqlite"):
        status, headers, text = server.ask("GET", path)
        lower = {name.lower(): value for name, value in headers.items()}
        assert all(lower[name.lower()] == value for name, value in HEADERS.items()) and "server" not in lower and "access-control-allow-origin" not in lower
        assert status in (200, 401, 404) and "s0001" not in text and ann not in text
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy and "*" not in policy
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"): assert server.ask(method, "/api/change", token=ann)[0] == 405
    assert server.ask("GET", "/api/change", token=ann)[0] == 405


@pytest.mark.parametrize("host, status", [("127.0.0.1", 200), ("localhost:8765", 200), ("LOCALHOST", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("evil.example#127.0.0.1", 421), ("", 421), ("[", 421), ("user@localhost", 200)])
def test_foreign_names_are_refused(rebound, host, status):
    assert rebound.ask("GET", "/", Host=host)[0] == status


@pytest.fixture(scope="module")
def rebound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rebound")
    server = Server(folder, write_rows(folder / "items.jsonl", [sample(0)]), "--annotators", "ann")
    yield server
    server.kill()


def test_bodies_are_limited_and_checked(rebound, tmp_path):
    token = rebound.token("ann")
    big = change("ann", "s0000", "good", "submission-1", note="x" * MAX_BODY)
    assert rebound.ask("POST", "/api/change", big, token)[0] == 413
    assert rebound.ask("POST", "/api/change", (piece for piece in [big[:70_000].encode()] * 4), token)[0] == 413  # in chunks, of no stated length
    assert rebound.ask("POST", "/api/change", big, "x")[0] == 401  # nobody's body is read
    for body in ("", "{", "[]", "null", '"x"', "[" * 50_000, '{"a": NaN}', json.dumps({"submission": "s" * 8, "item": "s0000", "row": {"label": "good"}}),
                 change("ann", "s0000", "fine", "submission-2"), change("ann", "s0000", "good", "x"), change("ann", "s0000", "good", "submission-2", note="x" * 5000),
                 change("ann", "s0000", "good", "submission-2", spans=[[0, 99]]), change("ann", "s0000", "good", "submission-2", seconds=-1),
                 change("ann", "s0000", "good", "submission-2", admin=True), '{"submission": "submission-2", "item": {"$ne": ""}}', b"\xff\xfe".decode("latin-1"),
                 '{"submission": "submission-2", "item": "s0000", "row": null, "skipped": "\\ud800"}'):
        status, _, text = rebound.ask("POST", "/api/change", body, token)
        assert status == 400 and json.loads(text)["error"] and "Traceback" not in text, body[:60]
    assert rebound.ask("POST", "/api/change", change("ann", "s0000", "good", "submission-2"), token, Content_Type="text/plain")[0] == 415
    try: assert rebound.ask("GET", "/" + "a" * 200_000)[0] in (400, 414, 431)
    except ConnectionError: pass  # refused before it was read to its end
    assert stored(rebound.folder / "annotations.sqlite") == []
    assert rebound.ask("POST", "/api/change", change("ann", "s0000", "good", "'; DROP TABLE annotation; --"), token)[0] == 200
    assert [row.label for row in stored(rebound.folder / "annotations.sqlite")] == ["good"]


def test_only_this_machine_unless_told_otherwise(rebound, tmp_path):
    import psutil
    listening = [one.laddr.ip for one in psutil.Process(rebound.process.pid).net_connections() if one.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    items = write_rows(tmp_path / "items.jsonl", [sample(0)])
    words = [*COMMAND, "serve", str(tmp_path / "s.sqlite"), str(items), "--annotators", "ann", "--port", "0"]
    done = subprocess.run([*words, "--host", "0.0.0.0"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--address" in done.stderr and "Traceback" not in done.stderr
    taken = subprocess.run([*words[:-1], str(rebound.port)], capture_output=True, text=True, timeout=60)
    assert taken.returncode == 2 and "cannot listen" in taken.stderr
    assert (tmp_path / "s.sqlite").stat().st_mode & 0o077 == 0  # nobody else reads the tokens


def test_many_slow_clients_do_not_hold_others_up(rebound):
    slow = [socket.create_connection(("127.0.0.1", rebound.port)) for _ in range(60)]
    for one in slow: one.sendall(b"POST /api/change HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n")
    began = time.monotonic()
    assert rebound.ask("GET", "/")[0] == 200 and time.monotonic() - began < 2
    for one in slow: one.close()


# ---------------------------------------------------------------- a browser in front of it

pytest.importorskip("playwright", reason="playwright is not installed; it comes with the dev extra")
from browser import playing, press, profile, watched  # noqa: E402
from test_annotation_page import HOSTILE, WALK, hostile_task, item, pair, walk_hostile  # noqa: E402


@pytest.fixture(scope="module")
def playwright():
    with playing() as one: yield one


@pytest.fixture
def browser(playwright, tmp_path):
    open_ones = []

    def launch(name="profile"):
        for one in open_ones: one.close()
        open_ones[:] = [profile(playwright, tmp_path / name)]
        return watched(open_ones[0])
    yield launch
    for one in open_ones: one.close()


def visit(page, link):
    page.goto(link)
    page.wait_for_selector("article", state="attached")
    return page


def settled(page):
    page.locator(".s3ft-status", has_text=re.compile("^Saved$")).wait_for(state="attached", timeout=20_000)


def test_thirty_items_by_keyboard_over_the_network_with_a_kill(serving, browser, tmp_path):
    server = serving([sample(i) for i in range(30)], "--annotators", "ann,bob", "--title", "Sailors")
    letters = ("ABCDE" * 6)[:30]
    page = visit(browser(), server.links["ann"])
    for letter in letters[:9]: press(page, letter.lower())
    settled(page)
    server.kill()
    for letter in letters[9:14]: press(page, *WALK[letter])  # the page goes on without a server
    page.get_by_text("Not connected. 5 annotations wait here").wait_for()
    assert item(page) == "Item 15 of 30"
    server.start()
    settled(page)
    assert len(stored(tmp_path / "annotations.sqlite")) == 14

    press(page, "a")
    settled(page)
    server.kill()
    press(page, "b", "c")
    page.wait_for_timeout(200)
    page = browser()  # server and browser are both gone; two answers exist only in the browser's profile
    server.start()
    visit(page, server.links["ann"])
    assert item(page) == "Item 18 of 30"
    settled(page)
    press(page, "u", *WALK["C"])
    for letter in letters[17:]: press(page, *WALK[letter])
    settled(page)
    rows = stored(tmp_path / "annotations.sqlite")
    assert [LETTERS[row.label] for row in rows] == [*letters[:14], "A", "B", "C", *letters[17:]]
    assert [row.position for row in rows] == list(range(1, 31)) and {row.annotator for row in rows} == {"ann"}
    assert {request.split("/")[2] for request in page.asked if request.startswith("http")} == {f"127.0.0.1:{server.port}"}
    assert all("#" not in request and server.token("ann") not in request for request in page.asked if "/api/" in request)
    assert not [text for text in page.wrong if "ERR_CONNECTION" not in text]


def test_a_wrong_link_says_so(serving, browser):
    server = serving([sample(0)], "--annotators", "ann")
    for link in (server.links["ann"][:-1], server.links["ann"].split("#")[0]):
        page = browser()
        page.goto(link)
        page.get_by_text("This link is not valid").wait_for()


def test_hostile_content_is_inert_over_the_network(serving, browser, tmp_path):
    items = hostile_task().items
    rows = [sample(0, **{name: one[name] for name in ("id", "system_prompt", "prompt", "original", "response")}) for one in items]
    server = serving(rows, "--annotators", "<b>ann</b>", "--title", HOSTILE[1])
    page = visit(browser(), server.links["<b>ann</b>"])
    walk_hostile(page)
    settled(page)
    assert [row.sample_id for row in stored(tmp_path / "annotations.sqlite")] == [one["id"] for one in items] and not page.wrong
    assert page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; return 'written'; } catch { return 'refused'; } }") == "refused"
    frame = page.evaluate("""(url) => new Promise((done) => { const f = document.createElement("iframe"); f.src = url; f.onload = () => { let inside = null; try { inside = f.contentDocument?.getElementById("app"); } catch {} done(!!inside); }; document.body.append(f); setTimeout(() => done(false), 1500); })""", f"http://127.0.0.1:{server.port}/")
    assert frame is False  # not even we may put it into a frame


def test_a_refused_answer_is_told_and_open_again(serving, browser, tmp_path):
    server = serving([sample(i) for i in range(3)], "--annotators", "ann")
    page = visit(browser(), server.links["ann"])
    page.route("**/api/change", lambda route: route.fulfill(status=400, content_type="application/json", body='{"error": "a made-up reason"}'), times=1)
    press(page, "a")
    page.get_by_role("alert").get_by_text("Not saved: a made-up reason").wait_for()
    press(page, "b", "c")
    settled(page)
    assert item(page) == "Item 1 of 3"  # it is asked again
    press(page, "d")
    settled(page)
    assert sorted(row.label for row in stored(tmp_path / "annotations.sqlite")) == ["all_bad", "bad_context", "bad_system"]


def test_pairs_over_the_network(serving, browser, tmp_path):
    server = serving([pair(i) for i in range(4)], "--annotators", "ann")
    page = visit(browser(), server.links["ann"])
    assert "arm-one" not in server.ask("GET", "/api/task", token=server.token("ann"))[2]
    press(page, "a", "b", "t", "x")
    settled(page)
    assert [row.choice for row in stored(tmp_path / "annotations.sqlite")] == ["first", "second", "tie", "both_bad"]
    subprocess.run([*COMMAND, "export", str(tmp_path / "annotations.sqlite"), str(tmp_path / "out.jsonl")], check=True, capture_output=True)
    assert len(read_rows(tmp_path / "out.jsonl", Preference)) == 4


# ---------------------------------------------------------------- connections that never say what they want


@pytest.mark.slow
def test_half_open_connections_keep_nobody_out(serving):
    server = serving([sample(0)], "--annotators", "ann")
    silent = []
    for i in range(130):  # more than one address may hold; some say nothing, some half a head, some half a body
        one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with suppress(OSError): one.sendall((b"", b"GET / HTTP/1.1\r\nHost: 127.0", b"POST /api/change HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{")[i % 3])
        silent.append(one)
    other = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20, source_address=("127.0.0.2", 0))
    other.request("GET", "/")
    assert other.getresponse().status == 200  # at once, for another address
    other.close()
    time.sleep(16)  # the deadline
    assert server.ask("GET", "/api/task", token=server.token("ann"))[0] == 200
    closed = 0
    for one in silent:
        one.settimeout(2)
        with suppress(ConnectionError):
            while one.recv(4096): pass  # an answer may come first
        closed += 1
        one.close()
    assert closed == 130


def test_a_client_that_leaves_in_the_body_writes_no_traceback(serving, tmp_path):
    server = serving([sample(0)], "--annotators", "ann")
    for part in (b"", b"{", b'{"submission": "submission-1'):
        one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        one.sendall(f"POST /api/change HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 999\r\nAuthorization: Bearer {server.token('ann')}\r\n\r\n".encode() + part)
        time.sleep(0.2)
        one.close()
    assert server.ask("GET", "/api/task", token=server.token("ann"))[0] == 200
    server.process.send_signal(signal.SIGINT)
    assert "Traceback" not in server.process.communicate(timeout=20)[1]
