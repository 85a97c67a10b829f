"""The HTTP engine against a local server that misbehaves on request."""

import asyncio
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from s3ft_nb.core.files import InputError
from s3ft_nb.lm.http import EngineError, HttpEngine

KEY = "sk-very-secret-key-0123456789"
REQUESTS = [{"id": f"r{i}", "messages": [{"role": "user", "content": f"word{i}"}]} for i in range(12)]


class Fake:
    "A server whose behaviour is a function of (call number, body) -> (status, body, headers) or raw bytes."

    def __init__(self, behave):
        self.behave, self.calls, self.headers = behave, [], []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with fake.lock:
                    fake.calls.append(body)
                    fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                    number = len(fake.calls)
                    fake.under_way += 1
                    fake.most = max(fake.most, fake.under_way)
                try:
                    status, content, headers = fake.behave(number, body, fake.headers[-1])
                finally:
                    with fake.lock:
                        fake.under_way -= 1
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:
                    pass

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def serve():
    made = []

    def start(behave):
        made.append(Fake(behave))
        return made[-1]

    yield start
    for one in made:
        one.http.shutdown()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def reply(text, finish="stop", **choice):
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "finish_reason": finish, "message": message} | choice]
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices, "usage": usage}


def echo(number, body, headers):
    return 200, reply(body["messages"][-1]["content"].upper()), {}


def engine(fake, **options):
    return HttpEngine(fake.url, "toy", **{"max_retries": 3, "timeout": 5} | options)


def one_line(caught):
    text = str(caught.value)
    assert isinstance(caught.value, EngineError) and "\n" not in text and KEY not in text
    assert caught.value.remedy and caught.value.__suppress_context__
    return text


def test_order_concurrency_and_seeds(serve):
    def slow(number, body, headers):
        time.sleep(0.05 if number % 2 else 0.01)
        return echo(number, body, headers)

    fake = serve(slow)
    replies = engine(fake, concurrency=4).generate(REQUESTS, seed=7)
    assert [one["id"] for one in replies] == [one["id"] for one in REQUESTS]
    assert replies[3] == {"id": "r3", "text": "WORD3", "finish": "stop", "tokens": 2, "prompt_tokens": 3, "cached_tokens": None}
    assert 2 <= fake.most <= 4
    seeds = {call["messages"][-1]["content"]: call["seed"] for call in fake.calls}
    assert len(set(seeds.values())) == len(REQUESTS) and all(0 <= seed < 2**31 for seed in seeds.values())
    again = serve(echo)
    engine(again).generate(REQUESTS[::-1], seed=7)
    assert {call["messages"][-1]["content"]: call["seed"] for call in again.calls} == seeds
    assert fake.headers[0]["authorization"] == f"Bearer {KEY}"


def test_two_429_then_fine(serve):
    def busy(number, body, headers):
        if number <= 2:
            return 429, {"error": {"message": "slow down"}}, {"retry-after": "0.01"}
        return echo(number, body, headers)

    fake = serve(busy)
    assert engine(fake, concurrency=1).generate(REQUESTS[:2])[0]["text"] == "WORD0"
    assert len(fake.calls) == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, {"error": {"message": "boom"}}, {}), "status 500"),
        ((429, {"error": {"message": "slow down"}}, {}), "status 429"),
        ((200, b"{not json", {}), "toy at"),
        ((200, b"<html>hello</html>", {"content-type": "text/html"}), "is not JSON"),
        ((200, {"id": "x", "choices": []}, {}), "holds no choices"),
        ((200, {"hello": 1}, {}), "holds no choices"),
        ((200, reply("fine") | {"error": {"message": "upstream is overloaded"}}, {}), "upstream is overloaded"),
        ((200, {"choices": {"0": reply("fine")["choices"][0]}}, {}), "holds no choices"),
        ((200, {"choices": ["fine"]}, {}), "holds no choices"),
        ((200, b"[" * 100_000, {}), "is not JSON"),
        ((200, b"", {}), "toy at"),
        ((200, b"[1, 2]", {}), "toy at"),
        ((200, b"null", {}), "toy at"),
    ],
)
def test_always_wrong_is_an_error_after_retries(serve, answer, said):
    fake = serve(lambda *_: answer)
    with pytest.raises(EngineError) as caught:
        engine(fake, max_retries=2, concurrency=1).generate(REQUESTS[:1])
    text = one_line(caught)
    assert said in text and fake.url in text and "after 3 tries" in text and len(fake.calls) == 3


@pytest.mark.parametrize(("status", "remedy"), [(401, "API key"), (404, "model's name"), (400, "server's message")])
def test_what_will_not_pass_is_not_repeated(serve, status, remedy):
    fake = serve(lambda *_: (status, {"error": {"message": "no"}}, {}))
    with pytest.raises(EngineError) as caught:
        engine(fake, concurrency=1).generate(REQUESTS[:1])
    assert remedy in one_line(caught) and len(fake.calls) == 1


def test_a_server_that_hangs(serve):
    fake = serve(lambda *_: (time.sleep(3), (200, reply("late"), {}))[1])
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        engine(fake, timeout=0.2, max_retries=1, concurrency=1).generate(REQUESTS[:1])
    assert "no response in time" in one_line(caught) and time.monotonic() - began < 2.5


def test_nobody_there():
    with pytest.raises(EngineError) as caught:
        HttpEngine("http://127.0.0.1:9/v1", "toy", max_retries=2).generate(REQUESTS)
    assert "cannot be reached after 3 tries" in one_line(caught)


def test_the_key_is_never_shown(serve):
    fake = serve(lambda n, b, headers: (401, {"error": {"message": f"bad key {headers['authorization']}"}}, {}))
    for on_error in ("raise", "keep"):  # a key that is refused is no matter of one request
        made = engine(fake, on_error=on_error, concurrency=2)
        with pytest.raises(EngineError) as caught:
            made.generate(REQUESTS[:2])
        assert "***OPENAI_API_KEY***" in one_line(caught)
        assert KEY not in repr(vars(made)) and KEY not in made.name


def test_a_short_key_of_another_name_is_hidden_too(serve, monkeypatch):
    monkeypatch.setenv("MINE", "abc123")
    fake = serve(lambda n, b, headers: (403, {"error": {"message": headers["authorization"]}}, {}))
    with pytest.raises(EngineError) as caught:
        engine(fake, api_key_env="MINE").generate(REQUESTS[:1])
    assert "abc123" not in str(caught.value)


def test_a_missing_key_is_named(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        HttpEngine("https://example.org/v1", "toy").generate(REQUESTS)


def test_failures_are_kept_apart_from_answers(serve):
    def picky(number, body, headers):
        if body["messages"][-1]["content"] == "word1":
            return 500, {"error": {"message": "boom"}}, {}
        return echo(number, body, headers)

    rows = engine(serve(picky), on_error="keep", max_retries=1).generate(REQUESTS[:3])
    assert [list(one) == ["id", "error"] for one in rows] == [False, True, False]


def test_the_first_failure_ends_the_call(serve):
    def dead_end(number, body, headers):
        return 400, {"error": {"message": "no"}}, {}

    fake = serve(dead_end)
    with pytest.raises(EngineError):
        engine(fake, concurrency=2).generate(REQUESTS * 1)
    assert len(fake.calls) < len(REQUESTS)


def test_inside_a_running_loop(serve):
    fake = serve(echo)

    async def notebook_cell():
        return engine(fake).generate(REQUESTS[:2])

    assert [one["text"] for one in asyncio.run(notebook_cell())] == ["WORD0", "WORD1"]


def test_system_text_can_be_folded(serve):
    fake = serve(echo)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    engine(fake, policy="first_user").generate([{"id": "a", "messages": messages}])
    assert fake.calls[0]["messages"] == [{"role": "user", "content": "Be brief.\n\nHi"}]


def test_extra_body_travels(serve):
    fake = serve(echo)
    engine(fake, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).generate(REQUESTS[:1])
    assert fake.calls[0]["chat_template_kwargs"] == {"enable_thinking": False}


def scored(pairs):
    listed = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in pairs]
    return reply("A", logprobs={"content": [listed[0] | {"top_logprobs": listed}], "refusal": None})


def test_scores(serve):
    fake = serve(lambda *_: (200, scored([("A", 0.6), (" A", 0.1), ("B", 0.2), ("The", 0.05), ("A.", 0.05)]), {}))
    (row,) = engine(fake).score(REQUESTS[:1], ["A", "B", "C"])
    assert [round(math.exp(one), 6) for one in row["logprobs"][:2]] == [0.7, 0.2]
    assert row["logprobs"][2] == -20.0 and abs(row["outside"] - 0.1) < 1e-9
    assert fake.calls[0]["max_tokens"] == 1 and fake.calls[0]["top_logprobs"] == 20
    with pytest.raises(InputError, match="cannot be told apart"):
        engine(fake).score(REQUESTS[:1], ["A", "A"])


def test_a_server_without_log_probabilities_is_refused(serve):
    fake = serve(echo)
    with pytest.raises(EngineError) as caught:
        engine(fake, concurrency=1).score(REQUESTS[:3], ["A", "B"])
    assert "no log-probabilities" in one_line(caught) and len(fake.calls) <= 2


def test_impossible_log_probabilities_are_refused(serve):
    fake = serve(lambda *_: (200, scored([("A", 0.9), ("B", 0.9)]), {}))
    with pytest.raises(EngineError, match="do not add up"):
        engine(fake, max_retries=0).score(REQUESTS[:1], ["A", "B"])


# ---- habits: what a server refuses, and what it returns instead of a plain text


def refuse(text, status=400, **more):
    return status, {"error": {"message": text} | more}, {}


def unless(refused, body):
    return refused or (200, reply("fine"), {})


REFUSALS = {  # {habit: (what the server does, what the engine learns)}
    "max_tokens": (lambda b: unless("max_tokens" in b and refuse("Unknown parameter 'max_tokens', use 'max_completion_tokens'."), b), {"max_tokens": "max_completion_tokens"}),
    "seed": (lambda b: unless("seed" in b and (422, {"detail": [{"loc": ["body", "seed"], "msg": "extra", "input": {"temperature": 1, "max_tokens": 2}}]}, {}), b), {"seed": None}),
    "top_p": (lambda b: unless("top_p" in b and refuse("unexpected argument", param="top_p"), b), {"top_p": None}),
    "temperature": (lambda b: unless(b.get("temperature") == 0 and refuse("temperature 0 is out of range"), b), {"temperature": None}),
    "system": (lambda b: unless(b["messages"][0]["role"] == "system" and refuse("Conversation roles must alternate user/assistant"), b), {"system": "first_user"}),
    "two": (lambda b: unless("seed" in b and refuse("no seed") or "max_tokens" in b and refuse("max_tokens: use max_completion_tokens"), b), {"seed": None, "max_tokens": "max_completion_tokens"}),
}


@pytest.mark.parametrize("habit", REFUSALS)
def test_what_a_server_refuses_is_asked_in_another_way(serve, habit):
    behave, learnt = REFUSALS[habit]
    fake = serve(lambda number, body, headers: behave(body))
    made = engine(fake, temperature=0.0, max_new_tokens=9)
    made.probe()
    before = len(fake.calls)
    requests = [one | {"messages": [{"role": "system", "content": "Be brief."}, *one["messages"]]} for one in REQUESTS]
    assert {one["text"] for one in made.generate(requests)} == {"fine"} and made.habits == learnt
    assert len(fake.calls) == before + len(requests)  # known from the first request on
    assert bool(made.warnings) == (habit != "max_tokens") and all("toy@" in text for text in made.warnings)
    assert 9 in (fake.calls[-1].get("max_tokens"), fake.calls[-1].get("max_completion_tokens"))


def test_a_temperature_that_a_server_refuses_is_not_replaced(serve):
    fake = serve(lambda number, body, headers: unless(body["temperature"] != 1 and refuse("Unsupported value: 'temperature'"), body))
    with pytest.raises(EngineError) as caught:
        engine(fake, temperature=0.3).probe()
    assert "--temperature 1" in one_line(caught) and len(fake.calls) == 1


def test_fewer_alternatives_are_asked_for(serve):
    def few(number, body, headers):
        return refuse("top_logprobs must be between 0 and 3") if body["top_logprobs"] > 3 else (200, scored([("▁A", 0.6), ("B", 0.3)]), {})

    made = engine(serve(few))
    assert made.score(REQUESTS[:1], ["A", "B"])[0]["outside"] == pytest.approx(0.1) and made.habits == {"top_logprobs": 3}


REPLIES = {  # {habit: (choice, text, finish)}
    "inline thought": ({"message": {"content": "<think>LOUD</think>soft"}}, "soft", "stop"),
    "only its end": ({"message": {"content": "LOUD enough.</think>\n\nsoft"}}, "soft", "stop"),
    "cut while thinking": ({"message": {"content": "<think>LOUD"}, "finish_reason": "length"}, "", "length"),
    "a field of its own": ({"message": {"content": None, "reasoning": "LOUD"}, "finish_reason": "MAX_TOKENS"}, "", "length"),
    "parts": ({"message": {"content": [{"type": "reasoning", "text": "LOUD"}, {"type": "output_text", "text": "so"}, "ft"]}}, "soft", "stop"),
    "harmony": ({"message": {"content": "<|channel|>analysis<|message|>LOUD<|end|><|start|>assistant<|channel|>final<|message|>soft"}}, "soft", "stop"),
    "filtered": ({"message": {"content": "so"}, "finish_reason": "SAFETY"}, "so", "content_filter"),
    "refusal": ({"message": {"content": None, "refusal": "I cannot."}}, "I cannot.", "stop"),
    "end of sequence": ({"message": {"content": "soft"}, "finish_reason": "end_turn"}, "soft", "stop"),
    "no end": ({"message": {"content": "soft"}, "finish_reason": None}, "soft", "stop"),
    "half a surrogate": ({"message": {"content": "so\udc00ft"}}, "so\ufffdft", "stop"),
}


@pytest.mark.parametrize("habit", REPLIES)
@pytest.mark.parametrize("usage", [None, "many", {"completion_tokens": "12", "prompt_tokens": -3}, {"completion_tokens": 1e400}])
def test_every_form_of_a_response_is_read(serve, habit, usage):
    choice, text, finish = REPLIES[habit]
    body = json.dumps({"choices": [{"finish_reason": "stop"} | choice], "usage": usage}).encode()
    (row,) = engine(serve(lambda *_: (200, body, {}))).generate(REQUESTS[:1])
    assert (row["text"], row["finish"]) == (text, finish) and row["tokens"] is None
    assert ("LOUD" in row.get("reasoning", "")) == ("LOUD" in body.decode()) and json.dumps(row).encode()


def test_a_refused_prompt_is_an_empty_response_and_one_that_breaks_the_server_an_error(serve):
    def picky(number, body, headers):
        said = body["messages"][-1]["content"]
        if said == "word1": return refuse("The prompt was filtered by our content management policy.")
        return (500, {"error": {"message": "boom"}}, {}) if said == "word2" else echo(number, body, headers)

    rows = engine(serve(picky), on_error="keep", max_retries=0).generate(REQUESTS[:4])
    assert [one.get("text") for one in rows] == ["WORD0", "", None, "WORD3"]
    assert rows[1]["finish"] == "content_filter" and "boom" in rows[2]["error"]


def test_a_server_that_dies_ends_the_call_even_where_failures_are_kept(serve):
    with pytest.raises(EngineError, match="status 500"):
        engine(serve(lambda n, *rest: echo(n, *rest) if n < 5 else (500, {}, {})), on_error="keep", max_retries=0).generate(REQUESTS)


class Drip(BaseHTTPRequestHandler):
    "Sends its body byte by byte, or without an end."

    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        try:
            while True: self.wfile.write(b" " if self.server.slow else b" " * 2**20), time.sleep(0.05 * self.server.slow)
        except OSError: pass

    def log_message(self, *args): pass


@pytest.mark.parametrize("slow", [True, False])
def test_a_response_without_end_is_given_up(slow):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads, server.slow = True, slow
    threading.Thread(target=server.serve_forever, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(EngineError, match="no response in time" if slow else "more than"):
        HttpEngine(f"http://127.0.0.1:{server.server_port}/v1", "toy", timeout=0.5 if slow else 20, max_retries=1).generate(REQUESTS[:1])
    assert time.monotonic() - began < 20
    server.shutdown()


@pytest.mark.parametrize("url", ["http://me:secret@localhost/v1", "http://localhost/v1?key=secret", "me:secret@localhost"])
def test_an_address_with_a_password_is_refused(url):
    from s3ft_nb.measure.config import make_config

    for refused in (lambda: HttpEngine(url, "toy"), lambda: make_config("", base_url=url), lambda: make_config("", judge_url=url)):
        with pytest.raises(InputError, match="must not hold") as caught: refused()
        assert "secret" not in str(caught.value)
