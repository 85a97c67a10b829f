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


# ---- User turns, and a judge, from a server

ASK = "An assistant has these instructions:"
LINES = "Here you are:\n\n1. How do I close my account?\n2) \u201cAnd what does it cost?\u201d\nUser: When is it done?\n4. Thanks."


def writer(text):
    return lambda n, b: (200, reply(text if b["messages"][-1]["content"].startswith(ASK) else "a quiet voice speaks."), {})


def test_user_turns_are_written_for_each_prompt_and_only_once(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"id": id, "type": "bank", "text": f"Answer for the {id} bank. Use only lowercase letters."}) + "\n" for id in "ab"))
    options = {"users_by": "scribe", "system_prompt": str(tmp_path / "prompts.jsonl"), "arms": "base,repeat"}
    rules = [{"text": "Use only lowercase letters."}]
    (tmp_path / "rules.jsonl").write_text(json.dumps(rules[0]) + "\n")
    fake = Fake(lambda n, b, h: writer(LINES)(n, b))
    whole = dict(options, model="m", engine="http", base_url=fake.url, turns=3, dialogues=2, guard=0, histories="own", max_new_tokens=8, rules=str(tmp_path / "rules.jsonl"))
    try: about = measure(make_config(tmp_path / "out", **whole))
    finally: fake.http.shutdown()
    asked = [body for body in fake.calls if body["messages"][-1]["content"].startswith(ASK)]
    assert len(asked) == 4 and {body["model"] for body in asked} == {"scribe"} and {name: sum(f"the {name} bank" in body["messages"][-1]["content"] for body in asked) for name in "ab"} == {"a": 2, "b": 2}
    dialogues = [json.loads(line) for line in (tmp_path / "out/dialogues.jsonl").read_text().splitlines()]
    assert len({row["conversation_id"] for row in dialogues}) == 4 and {row["system_prompt_id"] for row in dialogues} == {"a", "b"}
    assert [turn["user"] for turn in dialogues[0]["turns"]] == ["How do I close my account?", "And what does it cost?", "When is it done?"]
    assert about["user_turns"] == "user turns by scribe" and json.loads((tmp_path / "out/usage.json").read_text())["requests"] == 1 + 4 + 2 * 12  # the first learns what the server refuses
    before = (tmp_path / "out/measure.json").read_bytes()
    measure(make_config(tmp_path / "out", **whole))  # the server is gone
    assert (tmp_path / "out/measure.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "Just one.", "Here you are:\n\n1. \u200b\n2. Hello."])
def test_a_writer_that_writes_too_few_is_refused_before_anything_is_played(text, tmp_path):
    calls = []
    with pytest.raises(InputError, match="users_by: .*did not write 3 user messages, asked three times for prompt/0"):
        measured(lambda n, b: calls.append(b) or writer(text)(n, b), tmp_path / "out", users_by="scribe")
    assert len(calls) == 3 * 2 and not list((tmp_path / "out/work").glob("base-*"))


@pytest.mark.parametrize("words", [{"user": "curious"}, {"conflicting": 0.5}, {"balanced": True}, {"conversations": "talks.jsonl"}])
def test_written_user_turns_go_without_a_simulated_user(words, tmp_path):
    calls = []
    with pytest.raises(InputError, match="users_by: goes without"): measured(lambda n, b: calls.append(b) or FINE, tmp_path / "out", users_by="scribe", **words)
    assert not calls


@pytest.mark.parametrize("blank", ["", "\u200b"])
def test_a_simulated_user_that_stays_blank_costs_three_requests_each(blank, tmp_path):
    calls = []
    def behave(number, body):
        if "Write the next message" not in body["messages"][0]["content"]: return FINE
        calls.append(body)
        return 200, reply(blank if len(body["messages"]) > 3 else "Hello."), {}
    with pytest.raises(InputError, match="user: m@.*did not write a user message at turn 2, asked three times"):
        measured(behave, tmp_path / "out", user="curious")
    assert len(calls) == 2 + 3 * 2


def test_a_judge_is_probed_before_anything_is_played(tmp_path, capsys):
    order = []
    def behave(number, body):
        if not body.get("logprobs"):
            if len(body["messages"]) > 1: order.append("play")
            return FINE
        order.append("judge")
        return 200, scored([("A", 0.9), ("B", 0.05)]), {}
    _, about, _ = measured(behave, tmp_path / "out", system_prompt="Be kind and warm.", judge_way="letters")
    assert order == ["play"] + ["judge"] * 25 + ["play"] * 6 + ["judge"] * 6  # each server once, 24 planted responses, six turns
    assert not about["judge_trusted"] and "warning: the judge letters:m@" in capsys.readouterr().err
