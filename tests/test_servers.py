"A measurement against servers with habits: measured to the end, or refused before the first rollout."
import json
import os

import pytest
from test_http_engine import Fake, refuse, reply, scored

from s3ft_nb.core.files import InputError, write_json
from s3ft_nb.core.stage import Stage
from s3ft_nb.lm.http import EngineError
from s3ft_nb.measure.config import make_config
from s3ft_nb.measure.measure import measure, server_options

FINE = (200, reply("a quiet voice speaks."), {})


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789-abcdef")
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)


def measured(behave, folder, **options):
    "(server, what measure.json holds, responses)"
    fake = Fake(lambda number, body, headers: behave(number, body))
    (prompt := folder.with_name("prompt.txt")).write_text(options.pop("system_prompt", "Use only lowercase letters."))
    try:
        about = measure(make_config(folder, **{
            "system_prompt": str(prompt), "model": "m", "engine": "http", "base_url": fake.url, "turns": 3, "dialogues": 2,
            "arms": "base", "guard": 0, "histories": "own", "max_new_tokens": 8, "engine_options": '{"max_retries": 1}'} | options))
    finally: fake.http.shutdown()
    path = folder / "responses-base.jsonl"
    return fake, about, [json.loads(line) for line in path.read_text().splitlines()]


second = lambda body: len([one for one in body["messages"] if one["role"] == "user"]) == 2
HABITS = {  # {habit: (number of call, body) -> response}
    "reasons in the text": lambda n, b: (200, reply("<think>SHOUT</think>a quiet voice speaks."), {}),
    "nothing but reasoning": lambda n, b: (200, reply(None, "length", message={"content": None, "reasoning_content": "SHOUT"}), {}) if second(b) else FINE,
    "filters a response": lambda n, b: (200, reply("", "content_filter"), {}) if second(b) else FINE,
    "filters a prompt": lambda n, b: refuse("blocked by the content management policy") if second(b) else FINE,
    "parts": lambda n, b: (200, reply([{"type": "text", "text": "a quiet voice speaks."}]), {}),
    "eos": lambda n, b: (200, reply("a quiet voice speaks.", "eos"), {}),
    "no system": lambda n, b: refuse("system role is not supported") if b["messages"][0]["role"] == "system" else FINE,
    "other names": lambda n, b: refuse("use max_completion_tokens, not max_tokens") if "max_tokens" in b else FINE,
    "no seed": lambda n, b: refuse("unknown field", param="seed") if "seed" in b else FINE,
    "an error beside": lambda n, b: (200, reply("x") | {"error": "overloaded"}, {}) if n % 4 == 2 else FINE,
    "an invisible response": lambda n, b: (200, reply("\u200b"), {}),
}


@pytest.mark.parametrize("habit", HABITS)
def test_every_habit_is_measured_to_the_end(habit, tmp_path):
    fake, about, responses = measured(HABITS[habit], tmp_path / "out")
    assert about["complete"] and len(responses) == 6 and "SHOUT" not in json.dumps(responses)
    assert not any("SHOUT" in json.dumps(body) for body in fake.calls)
    warned = {"reasons in the text": "with_reasoning", "nothing but reasoning": "responses_empty", "filters a response": "responses_filtered",
              "filters a prompt": "responses_filtered", "no system": "no system message", "no seed": "no seed", "an invisible response": "responses_empty"}
    assert warned.get(habit, "") in " ".join(about["warnings"])


def test_one_request_that_fails_for_good_ends_its_dialogue_only(tmp_path):
    broken = []

    def behave(number, body):
        if second(body) and not broken: broken.append(json.dumps(body["messages"]))
        return (500, {"error": {"message": "boom"}}, {}) if json.dumps(body["messages"]) in broken else FINE

    _, about, responses = measured(behave, tmp_path / "out", dialogues=3, user_turns="everyday")
    ledger = json.loads((tmp_path / "out/ledger.json").read_text())
    n = ledger["reasons"]["request_failed"]
    assert n >= 2 and len(responses) == 9 - n and "request_failed" in " ".join(about["warnings"])


@pytest.mark.parametrize("behave, words, option", [
    (lambda n, b: refuse("'temperature' must be 1") if b["temperature"] != 1 else FINE, "Use only lowercase letters.", "--temperature 1"),
    (lambda n, b: FINE, "Be kind and warm.", "--judge-way words"),
    (lambda n, b: (401, {"error": {"message": "no"}}, {}), "Use only lowercase letters.", "API key"),
])
def test_what_cannot_be_measured_is_refused_before_the_first_rollout(behave, words, option, tmp_path):
    calls = []
    with pytest.raises(InputError, match=option):
        measured(lambda n, b: calls.append(b) or behave(n, b), tmp_path / "out", system_prompt=words, judge_way="letters")
    assert len(calls) <= 3 and not list((tmp_path / "out/work").glob("base-*"))


def test_a_finished_measurement_asks_nothing_again(tmp_path):
    measured(HABITS["no system"], tmp_path / "out")
    before = (tmp_path / "out/measure.json").read_bytes()
    asked = []
    fake = Fake(lambda number, body, headers: asked.append(body) or FINE)
    options = json.loads(before)["options"]
    fake.http.shutdown()
    about = measure(make_config(tmp_path / "out", **options))
    assert not asked and about["complete"] and (tmp_path / "out/measure.json").read_bytes() == before


def test_fewer_alternatives_for_a_judge(tmp_path):
    def five(n, body):
        if not body.get("logprobs"): return FINE
        return refuse("top_logprobs: at most 5") if body["top_logprobs"] > 5 else (200, scored([("A", 0.9), ("B", 0.05)]), {})

    _, about, _ = measured(five, tmp_path / "out", system_prompt="Be kind and warm.", judge_way="letters")
    assert about["complete"] and "top_logprobs" in " ".join(about["warnings"])


def test_options_of_a_server_travel_with_every_request(tmp_path):
    fake, *_ = measured(HABITS["eos"], tmp_path / "out", engine_options='{"timeout": 9, "top_k": 3, "seed": null}')
    assert all(body["top_k"] == 3 and "seed" not in body and "timeout" not in body for body in fake.calls)
    assert server_options("") == {"extra_body": {}}
    for wrong in ("[1]", "{", '{"timeout": "long"}'):
        with pytest.raises(InputError): server_options(wrong)


def test_the_value_of_a_secret_variable_is_in_nothing_that_is_written(tmp_path):
    secret = os.environ["OPENAI_API_KEY"]
    _, about, responses = measured(lambda n, b: (200, reply(f"your key is {secret}, <think>{secret}"), {}), tmp_path / "out")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) > 5 and not [path for path in written if secret.encode() in path.read_bytes()]
    assert "***OPENAI_API_KEY***" in responses[0]["response"]
    write_json(tmp_path / "a.json.gz", {"key": secret})
    import gzip
    assert secret.encode() not in gzip.decompress((tmp_path / "a.json.gz").read_bytes())
