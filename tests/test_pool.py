"Seed prompts row by row; growth under hostile engines and kills; the task rule on real collections."
import csv
import itertools
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from rapidfuzz.fuzz import ratio

from s3ft_nb.core.records import SystemPrompt
from s3ft_nb.core.split import NEAR, assert_no_leak, normalize, split_prompts
from s3ft_nb.core.stage import Stage
from s3ft_nb.core.files import resource
from s3ft_nb.judging.checks import assert_check, run_check
from s3ft_nb.methods.s3ft import pool

SHARED = Path(os.environ.get("S3FT_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
TYPES = {"persona", "symbolism", "literary_manner", "tone", "audience", "orthography", "format", "narrative_frame", "obligatory_element", "rule_length"}


def prompt(id, text, type="tone", **given_):
    return SystemPrompt(id=id, type=type, text=text, **given_)


def engine(answer, name="stub"):
    def generate(requests, seed, progress=None):
        rng = random.Random(seed)
        return [{"id": one["id"], "tokens": 1, "finish": "stop"} | answer(one, rng) for one in requests]

    return SimpleNamespace(name=name, generate=generate)


def inventive(request, rng):
    words = "baker diver judge nurse piper tailor weaver archer mason bishop carter farmer".split()
    return {"text": f"Speak as a {rng.choice(words)} who loves {rng.choice(words)}s, fears the {rng.choice(words)} and sings of {rng.choice(words)}s."}


# --- seed prompts


@pytest.mark.parametrize("language", pool.LANGUAGES)
def test_seed_rows(language):
    rows = pool.seed_prompts(language)
    assert Counter(row.type for row in rows).keys() == TYPES
    assert min(Counter(row.type for row in rows).values()) >= 12
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(rf"{row.type}-{language}-\d\d", row.id)
        assert (row.language, row.source, row.split, row.family) == (language, "seed", None, "")
        assert row.text == row.text.strip() and "\n" not in row.text
        assert pool.reject_reason(row.text, [other.text for other in rows if other.id != row.id], language=language) is None, row.id
        if language == "zh": assert not re.search("[,:;!?()]", row.text), f"{row.id}: Chinese is typed with its own punctuation"


@pytest.mark.parametrize("language", pool.LANGUAGES)
def test_seed_checks(language):
    rows = pool.seed_prompts(language)
    for row in rows:
        for check in row.checks: assert_check(check)
    assert sum(bool(row.checks) for row in rows) > len(rows) / 2
    assert sum(len({check.kind for check in row.checks}) > 1 for row in rows) >= 10  # some combine rules
    lengths = [len(row.text) for row in rows]
    assert max(lengths) > 4 * min(lengths)


def test_no_two_seeds_nearly_alike():
    rows = [row for language in pool.LANGUAGES for row in pool.seed_prompts(language)]
    for a, b in itertools.combinations(rows, 2): assert ratio(normalize(a.text), normalize(b.text)) < NEAR, (a.id, b.id)


def test_seed_files_are_plain():
    for language in pool.LANGUAGES:
        data = resource("data", "seed-prompts", f"{language}.jsonl").read_bytes()
        assert data.endswith(b"\n") and b"\r" not in data
        assert all(len(json.loads(line)) == 8 for line in data.splitlines())


GOOD = {  # responses that keep to a seed's checks
    "persona-en-06": "All aboard! Next stop, the answer.",
    "orthography-en-06": "I own twelve ducks.",
    "orthography-en-07": "*Calm seas today.*",
    "orthography-en-09": "u r right, see u soon",
    "format-en-04": '{"answer": "Blue."}',
    "format-en-10": '"It is blue."',
    "format-en-11": "(1) It is blue. (2) It is deep.",
    "tone-en-03": "What a sea!",
    "obligatory_element-en-03": "It is blue. Have you seen it?",
    "rule_length-en-04": "The sea is blue. It is deep.",
    "rule_length-en-05": "The sea is blue, and that is enough.",
    "rule_length-en-12": "The sea is blue. That is all.",
    "persona-zh-09": "海是蓝的，喵。",
    "orthography-zh-02": "海很蓝 也很深",
    "orthography-zh-05": "「海是蓝的。」",
    "orthography-zh-08": "海好蓝呀~",
    "format-zh-01": "【海】海是蓝的。",
    "format-zh-11": '{"回答": "海是蓝的。"}',
    "literary_manner-zh-01": "海是蓝的。欲知后事如何，且听下回分解。",
    "tone-zh-03": "海真蓝！",
    "audience-zh-02": "海是蓝的。",
    "rule_length-zh-04": "海是蓝的。海也很深。",
    "rule_length-zh-10": "海是蓝的。完毕。",
    "rule_length-zh-11": "海是蓝的。不过夜里是黑的。",
}


@pytest.mark.parametrize("id", GOOD)
def test_seed_checks_can_be_kept_and_broken(id):
    row = next(row for row in pool.seed_prompts(id.rsplit("-", 2)[1]) if row.id == id)
    broken = "It's 1 of the seas, I’d say; THE sea. Blue! It is deep…\n\nAsk me, 我 的 是，。！？ again" + " and again" * 40
    assert all(run_check(check, GOOD[id]) for check in row.checks)
    assert not all(run_check(check, broken) for check in row.checks)


# --- growth


def test_growth_survives_a_kill(tmp_path):
    whole = pool.grow(pool.seed_prompts(), engine(inventive), 20, Stage(tmp_path / "whole", seed=3, shard_size=16))
    calls = itertools.count()

    def dies(request, rng):
        if next(calls) == 90: raise KeyboardInterrupt
        return inventive(request, rng)

    with pytest.raises(KeyboardInterrupt): pool.grow(pool.seed_prompts(), engine(dies), 20, Stage(tmp_path / "cut", seed=3, shard_size=16))
    assert pool.grow(pool.seed_prompts(), engine(inventive), 20, Stage(tmp_path / "cut", seed=3, shard_size=16)) == whole
    files = lambda name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.jsonl")}
    assert files("cut") == files("whole")


def test_hostile_engines_are_accounted_for(tmp_path):
    rows = [prompt(f"s{i}", text) for i, text in enumerate(["Speak with the calm of a lake.", "Sound like thunder over hills.", "Be soft as rain on moss.", "Be dry as dust."])]
    held = prompt("e", "Whisper like leaves in the evening wind.", split="eval")
    answers = ["", "  \n", "1. Be kind.", "ok", "Be kind. " * 99, "说话要温柔。", "Write a poem about rain.", held.text + "!!", rows[0].text.upper(), "\u0000\ud7ff", "?!?", "[Setting] Be kind."]
    stage = Stage(tmp_path)
    hostile = lambda request, rng: rng.choice([{"text": rng.choice(answers)}, {"text": "Be loud and", "finish": "length"}])
    out = pool.grow([*rows, held], engine(hostile), 8, stage, max_attempts=600)
    stage.close(5 + stage.ledger.notes["candidates"], len(out))
    reasons = stage.ledger.as_dict()["reasons"]
    assert out == [*rows, held]
    assert set(reasons) == {"empty", "not_text", "too_short", "too_long", "wrong_language", "task", "leak", "copy_of_example", "near_duplicate", "unfinished"}
    assert stage.ledger.notes["short_of_target:tone"] == 3


def test_engine_errors_are_no_prompts(tmp_path):
    broken = SimpleNamespace(name="down", generate=lambda requests, seed, progress=None: [{"id": one["id"], "error": "429 too many requests"} for one in requests])
    stage, rows = Stage(tmp_path), [prompt("a", "Be calm.")]
    assert pool.grow(rows, broken, 2, stage, max_attempts=8) == rows
    assert stage.ledger.as_dict()["reasons"] == {"engine_error": 8}


def test_evaluation_prompts_are_never_shown(tmp_path):
    shown = []

    def spy(request, rng):
        shown.append(request["messages"][1]["content"])
        return inventive(request, rng)

    train, evaluation = split_prompts(pool.seed_prompts(), seed=0)
    grown = pool.grow(train + evaluation, engine(spy), 15, Stage(tmp_path))
    assert shown and not [text for text in shown for one in evaluation if one.text in text]
    again = split_prompts(grown, seed=1)
    assert [one.id for one in again[1] if one.source == "seed"] == [one.id for one in evaluation]
    assert_no_leak(*again)


def test_chinese_grows_from_chinese(tmp_path):
    trades = "渔夫 木匠 邮差 琴师 茶农 船工 画匠 猎人 驿卒 药童".split()
    wise = lambda request, rng: {"text": f"你是一位{rng.choice(trades)}，爱说{rng.choice(trades)}的旧事，最怕{rng.choice(trades)}来访，常念{rng.choice(trades)}。"}
    both = pool.seed_prompts("en") + pool.seed_prompts("zh")
    grown = pool.grow(both, engine(wise), 14, Stage(tmp_path), language="zh")
    assert Counter(one.language for one in grown) == {"en": 130, "zh": 140}
    assert all(one.id.split("-")[1] == "zh" for one in grown[260:])


# --- the task rule on real collections


@pytest.mark.skipif(not (SHARED / "self-instruct/seed_tasks.jsonl").exists(), reason="no shared data")
def test_rule_on_real_tasks():
    tasks = [json.loads(line)["instruction"] for line in (SHARED / "self-instruct/seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(map(pool.sets_task, tasks)) > 0.6 * len(tasks)  # single tasks, often without their material


@pytest.mark.skipif(not (SHARED / "awesome-chatgpt-prompts").exists(), reason="no shared data")
def test_rule_on_real_personas_with_a_first_request():
    with open(SHARED / "awesome-chatgpt-prompts/prompts_2024-06-12.csv", encoding="utf-8", newline="") as file: rows = [row["prompt"] for row in csv.DictReader(file)]
    asking = [text for text in rows if re.search(r"my first \w+", text, re.I)]
    assert sum(map(pool.sets_task, asking)) > 0.9 * len(asking)
