"Prose of all sorts, and the examples of every pattern."

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.files import InputError, read_rows, resource, write_rows
from s3ft_nb.core.records import Check, SystemPrompt
from s3ft_nb.core.stage import Stage
from s3ft_nb.judging.checks import assert_check, run_check
from s3ft_nb.judging.ifeval import LANGUAGE_KINDS, can_detect_language
from s3ft_nb.judging.rules import RULE_TYPES, load_patterns, make_rules, read_rules, recognise, split_prompt

SEEDS = [prompt for name in ("en", "zh") for prompt in read_rows(resource("data", "seed-prompts", f"{name}.jsonl"), SystemPrompt)]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_seed_prompt_comes_apart(language):
    for prompt in (prompt for prompt in SEEDS if prompt.language == language):
        found = split_prompt(prompt.text)
        assert found and len({rule.id for rule in found}) == len(found)
        for rule in found:
            assert rule.text in prompt.text and rule.type in RULE_TYPES
            if rule.check: assert_check(rule.check)


def test_world_prompts_keep_their_rules_and_lose_their_reminders():
    from s3ft_nb.micro.world import read_prompt, system_prompts
    for prompt in system_prompts(8, "eval", seed=3):
        found = split_prompt(prompt.text)
        assert len(found) == len(read_prompt(prompt.text)), (prompt.text, [rule.text for rule in found])


PATTERNS = load_patterns()["pattern"]


@pytest.mark.parametrize("row", PATTERNS, ids=[f"{i}-{row['kind']}" for i, row in enumerate(PATTERNS)])
def test_patterns_match_their_examples(row):
    if row["kind"] in LANGUAGE_KINDS and not can_detect_language(): pytest.skip("langdetect is not installed")
    assert row["positive"] and row["negative"] and row["type"] in RULE_TYPES
    for text, params in row["positive"].items():
        found = Check(kind=row["kind"], params=params)
        assert recognise(text) == (found, row["type"]) and assert_check(found) == params
    for text in row["negative"]: assert recognise(text) is None


@pytest.mark.parametrize("text, good, bad", [
    ("Please keep your answers to at most five words.", "Yes, of course I do.", "Yes, of course I really do."),
    ("Answer in fewer than 4 words, please.", "Yes it is.", "Yes it is so."),
    ("Always start your responses with the phrase “Well now”.", "Well now, let me see.", "Well, now"),
    ("Conclude each message by saying 'over and out'.", "Fine. Over and out!", "Over and out, fine."),
    ("Never mention \"Paris\" or \"London\".", "Rome.", "paris!"),
    ("You must use the words \"sea\" and \"ship\" in every answer.", "The ship is at sea.", "The ship is at see."),
    ("Do not use exclamation marks.", "Hi.", "Hi！"),
    ("ONLY OUTPUT VALID JSON.", '{"a": 1}', "a: 1"),
    ("Every reply must end with a question.", "So?", "So."),
    ("Your replies should never contain the word \"sorry\".", "Fine.", "Sorry, no."),
    ("All responses must include the name \"Ada\".", "Ada knows.", "Adam knows."),
    ("Responses must be in all lowercase letters.", "so it is.", "So it is."),
    ("每次回复都必须包含“大海”。", "我爱大海。", "我爱山。"),
    ("请用三句话回答。", "好。真的？是。", "好。"),
    ("回答控制在十个字以内。", "海很静。", "今天早上海面非常非常安静啊。"),
])
def test_known_demands_are_decided_by_program(text, good, bad):
    check, _ = recognise(text)
    assert_check(check)
    assert run_check(check, good) and not run_check(check, bad)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="aA1. \n-*#:;。；“”\"'|请不要use at most words5", max_size=80))
def test_any_prose_comes_apart_or_is_refused(text):
    try: found = split_prompt(text)
    except InputError as error: assert "holds no rule" in str(error)
    else: assert all(rule.text.strip() for rule in found) and len({rule.id for rule in found}) == len(found)


def test_endless_prompts_come_apart_in_time():
    start = time.monotonic()
    for text in ("please ", "请", "回答", "use \"a\" or ", "and ", "answer in ", "never use ", "- ", "a; ", "必须", "in every reply ", "do not forget it ", "'"):
        try: split_prompt(text * 3_000 + "x")
        except InputError: pass
    assert time.monotonic() - start < 20


def test_rules_of_a_prompt_survive_the_file(tmp_path):
    made = [rule for prompt in SEEDS[::20] for rule in split_prompt(prompt.text, prompt.id)]
    assert read_rules(write_rows(tmp_path / "rules.jsonl", made)) == made


class Says:
    name = "says"
    def __init__(self, text): self.text = text
    def generate(self, requests, seed=0, progress=None): return [{"id": one["id"], "text": self.text, "tokens": 3, "finish": "stop"} for one in requests]


SHY = SystemPrompt(id="p", type="tone", text="Be shy. Never use commas.")


@pytest.mark.parametrize("text", ["", "I cannot.", "tone|Be shy.", "tone | Be shy. | be bold", "tone | Be shy. | Be shy\n\nThat is all!", "1. tone | Be shy. | Be shy", "tone | Be shy. | ", "TONE | Be shy. | Be shy"])
def test_engines_that_babble_split_nothing(tmp_path, text):
    stage = Stage(tmp_path)
    found = make_rules([SHY], Says(text), stage)
    assert {rule.source for rule in found} == {"prompt"} and stage.ledger.as_dict()["notes"] == {"engine_unreadable_split_by_sentences": 1}


def test_an_engine_splits_once_and_what_it_overlooks_is_counted(tmp_path):
    stage = Stage(tmp_path)
    found = make_rules([SHY], Says("tone | Be shy. | Be shy"), stage)
    assert [(rule.text, rule.source, rule.how) for rule in found] == [("Be shy.", "engine", "judge")]
    assert stage.ledger.as_dict()["notes"] == {"sentences_without_a_rule": 1, "split_by_engine": 1}
    assert make_rules([SHY], Says("something else"), Stage(tmp_path)) == found  # read from disk
