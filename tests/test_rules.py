"Prose of all sorts, and the examples of every pattern."

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.files import InputError, read_rows, resource, write_rows
from s3ft_nb.core.records import Check, SystemPrompt
from s3ft_nb.core.stage import Ledger, Stage
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
            assert rule.text.split(" (after: ")[0] in prompt.text and rule.type in RULE_TYPES
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


# ---- Prompts of all sorts, split as a careful reader would

BANK = """You are Otto, the assistant of Lindenhof Savings Bank. Our customers are often on the move. Keep every reply between 30 and 90 words, because most people read on a phone.

Do not discuss share prices. Refer such questions to the trading desk. If the customer is upset, apologise before anything else.
Always cite the article in brackets, e.g. [LB-20]. Sign every message with "Otto, Lindenhof".
We ask for this because customers save our messages."""
API = """You are a service and no person. Respond only with valid JSON. The object must have exactly the keys "city", "celsius" and "note". "celsius" is a number. Never wrap the object in a code fence.
If the place is unknown, set "note" to "unknown"."""
PIRATE = """you are captain brandt, a pirate who teaches fractions. say "arr" now and then. answer in at most three short sentences. explain every step in at most two sentences.
never give the result straight away; ask a guiding question first. use no emojis. if the pupil is right, cheer. finish each reply with "steady as she goes"."""
CHINESE = "你是“阿蓝”，蓝灯茶馆的店员。每次回答控制在20到60字之间。请用中文回答，不要使用表情符号。如果客人着急，先道歉。不要谈论别家茶馆；遇到这类问题，请转给掌柜。每条回复末尾署名“阿蓝”。我们的茶馆开在山脚。"
LISTS = """## Never do
- mention rivals
- use emojis

When the guest is angry:
- apologise first
- answer in at most 20 words

Your replies must:
1. be in all lowercase letters
2. end with a question
Guidelines:
* Say «Bonjour. Ça va ?» first. Then listen.
"""
SPLIT = {  # {prompt: [(how a rule begins, what it must hold, its check)]}
    "bank": (BANK, [("You are Otto", "", None), ("Keep every reply", "", "word_range"), ("Do not discuss", "", None), ("Refer such questions", "Do not discuss share prices.", None),
                    ("If the customer is upset, apologise", "", None), ("Always cite", "[LB-20]", None), ("Sign every", "", "ends_with")]),
    "api": (API, [("You are a service", "", None), ("Respond only", "", "detectable_format:json_format"), ("The object must", "", "json_keys"), ('"celsius" is', "", None), ("Never wrap", "", "code_blocks"), ("If the place", "", None)]),
    "pirate": (PIRATE, [("you are captain brandt", "", None), ('say "arr"', "", None), ("answer in at most", "", "max_sentences"), ("explain every step", "", None), ("never give", "", None), ("ask a guiding", "", None),
                        ("use no emojis", "", "emojis"), ("if the pupil", "cheer", None), ("finish each", "", "ends_with")]),
    "chinese": (CHINESE, [("你是", "", None), ("每次回答", "", "word_range"), ("请用中文", "", "language:response_language"), ("不要使用", "", "emojis"), ("如果客人着急", "先道歉", None), ("不要谈论", "", None), ("遇到这类", "不要谈论别家茶馆", None), ("每条回复", "", "ends_with")]),
    "lists": (LISTS, [("Never mention rivals", "", None), ("Never use emojis", "", "emojis"), ("When the guest is angry: apologise", "", None), ("When the guest is angry: answer", "", None),
                      ("Your replies must be in", "", "lowercase"), ("Your replies must end", "", "ends_with_character"), ("Say «Bonjour. Ça va ?» first", "", None), ("Then listen", "Say «Bonjour", None)]),
    "long": ((Path(__file__).parent / "fixtures/long-prompt.txt").read_text(), [
        ("You are Edda", "", None), ("Keep every reply", "", "word_range"), ("Always answer in English", "", "language:response_language"), ("Do not use emojis", "", "emojis"), ("Never mention the word", "", "contains_none"),
        ("Do not recommend", "", None), ("Send such requests", "Do not recommend particular booksellers.", None), ("If a reader reports", "", None), ("When a child writes: use short", "", None), ("When a child writes: do not", "", None), ("End every message", "", "ends_with")]),
}


@pytest.mark.parametrize("name", list(SPLIT))
def test_prompts_are_split_as_a_careful_reader_would(name):
    text, wanted = SPLIT[name]
    if not can_detect_language() and "language" in str(wanted): pytest.skip("langdetect is not installed")
    ledger = Ledger("rules")
    found = split_prompt(text, "p", ledger)
    shown = [(rule.text, rule.check and rule.check.kind) for rule in found]
    assert len(found) == len(wanted), shown
    for rule, (begins, holds, kind) in zip(found, wanted):
        assert rule.text.startswith(begins) and holds in rule.text and (rule.check and rule.check.kind) == kind, shown
    assert all(row["detail"] in " ".join(text.split()) for row in ledger.dropped)  # what is no rule is named


def test_small_letters_change_nothing():
    text = "Be brief. Never use emojis. Always answer in French. End every message with 'so long'."
    kinds = [[rule.check and rule.check.kind for rule in split_prompt(one)] for one in (text, text.lower())]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 4 and sum(map(bool, kinds[0])) >= 2


@pytest.mark.parametrize("text", ["Cite in brackets, e.g. [KB-7].", "Put numbers in brackets.", "Play a ghost.", "You are a pirate.", "Between 5 and 9 words per line.", "Keep it short.", "Sign letters as Mia.", "Use emojis when it fits.",
                                  "Return JSON or text.", "Use the keys \"a\" and \"b\".", "Translate \"yes\" as \"oui\".", "Answer in 10 to 20 words when asked.", "Explain each point in at most three short sentences."])
def test_half_understood_demands_stay_with_the_judge(text): assert recognise(text) is None


def test_what_is_no_rule_is_named(tmp_path):
    stage = Stage(tmp_path)
    make_rules([SystemPrompt(id="p", type="tone", text="# Tone\nBe warm. The shop was founded in 1911. This helps people relax. Remember these rules.")], stage=stage)
    assert [(row["reason"], row["detail"]) for row in stage.ledger.dropped] == [("heading", "# Tone"), ("background", "The shop was founded in 1911."), ("reason", "This helps people relax."), ("reminder", "Remember these rules.")]
