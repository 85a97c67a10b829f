"Conversations of every format: round trips, damaged rows, files that others wrote, small inputs that were read wrongly once."
import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.convert import convert, read_conversations, read_prompts
from s3ft_nb.core.files import InputError, write_rows
from s3ft_nb.core.convert import FORMATS
from s3ft_nb.core.records import is_blank
from s3ft_nb.core.stage import Ledger

SHARED = Path(os.environ.get("S3FT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip).filter(lambda text: not is_blank(text))
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def refused(path, **options) -> InputError:
    "The error that reading a file ends in."
    with pytest.raises(InputError) as found: read_conversations(path, **options)
    assert "\n" not in str(found.value) and found.value.remedy
    return found.value


def messages_of(pairs) -> list:
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def branch(pairs) -> dict:
    (asked, response), *rest = pairs
    reply = {"role": "assistant", "text": response, "replies": [branch(rest)] if rest else []}
    return {"role": "prompter", "text": asked, "replies": [reply]}


def contents(conversations) -> list:
    return [[(message.role, message.content) for message in one.messages] for one in conversations]


WRITERS = {
    "openai": lambda pairs: {"messages": messages_of(pairs)},
    "sharegpt": lambda pairs: {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]}
                                                 for one in messages_of(pairs)]},
    "alpaca": lambda pairs: {"history": pairs[:-1], "instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]},
    "tree": lambda pairs: {"prompt": branch(pairs)},
    "turns": lambda pairs: {"conversation": [{"prompt": asked, "response": response} for asked, response in pairs]},
    "speakers": lambda pairs: {"utterances": [{"speaker": one["role"].upper(), "text": one["content"]} for one in messages_of(pairs)]},
}


@settings(max_examples=100, deadline=None)
@given(some=st.lists(st.tuples(st.sampled_from(sorted(WRITERS)), pairs), min_size=1, max_size=4, unique_by=lambda one: str(one[1])))
def test_every_format_gives_back_what_was_written(tmp_path_factory, some):
    path = write_rows(tmp_path_factory.mktemp("f") / "a.jsonl.gz", [WRITERS[format](rows) for format, rows in some])
    ledger = Ledger("read")
    read = read_conversations(path, ledger=ledger)  # several formats in one file
    assert contents(read) == [[(one["role"], one["content"]) for one in messages_of(rows)] for _, rows in some]
    assert {f"format_{format}": sum(name == format for name, _ in some) for format, _ in some} == ledger.notes


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_are_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("b") / "a.jsonl"
    path.write_bytes(data)
    for options in ({}, {"on_error": "skip"}):
        try: read_conversations(path, **options)
        except InputError as error: assert str(path) in str(error)


NAMES = ("messages role content turns prompt response replies instruction history instances output system from value id meta conversation text rank deleted "
         "label chosen rejected speaker input context author").split()


@settings(max_examples=300, deadline=None)
@given(row=st.recursive(st.none() | st.integers() | texts | st.sampled_from(["user", "system", "assistant"]), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4), max_leaves=12), format=st.sampled_from(["auto", *FORMATS]))
def test_no_row_is_a_traceback(tmp_path_factory, row, format):
    path = write_rows(tmp_path_factory.mktemp("h") / "a.jsonl", [row, WRITERS["openai"]([("a", "b")])])
    ledger = Ledger("read")
    try: read = read_conversations(path, format, on_error="skip", same_role="join", ledger=ledger)
    except InputError: return
    assert ledger.expected == len(read) + len(ledger.dropped)


GOOD = json.dumps(WRITERS["openai"]([("Hi.", "Hello!")]))
BAD = {
    '{"messages": [': ("broken_line", "broken JSON at column"),
    '{"messages": []}': ("empty", "messages: is empty"),
    '{"messages": [{"role": "bot!", "content": "a"}]}': ("unknown_role", "messages.0.content: unknown role 'bot!'"),
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': ("same_role", "second user message in a row"),
    '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "b"}]}' % ("x" * 100_000): ("too_long", "100,000 characters"),
    '{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]}': ("blank_message", "is blank"),
    '{"messages": [{"role": "assistant", "content": "a"}]}': ("role_order", "has role assistant where another is due"),
    '{"messages": [{"role": "user", "content": 5}]}': ("not_text", "must be text, got 5"),
    '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}': ("not_text", "messages.0.content.0: must be text"),
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}': ("missing_field", "messages.1: has none of content"),
    '{"messages": "hi"}': ("unknown_format", "is no row of a known format"),
    '{"turns": ["One question?", "Another one?"]}': ("no_speakers", "lists texts without speakers"),
    '"hi"': ("unknown_format", "is no row of a known format"),
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': ("broken_line", "half of a character pair"),
    '{"messages": [], "meta": {"x": 1e999}}': ("broken_line", "1e999 is not a JSON number"),
    '{"messages": [], "messages": []}': ("broken_line", "key 'messages' occurs twice"),
    '{"meta": %s1%s}' % ("[" * 300, "]" * 300): ("broken_line", "nested more than 100 levels deep"),
}


@pytest.mark.parametrize("line", BAD, ids=[reason + str(i) for i, (reason, _) in enumerate(BAD.values())])
def test_a_bad_row_is_one_clear_line_or_a_line_in_the_ledger(tmp_path, line):
    reason, words = BAD[line]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    assert f"{path}:3: " in str(refused(path)) and words in str(refused(path))
    ledger = Ledger("read")
    assert len(read_conversations(path, on_error="skip", ledger=ledger)) == 1
    assert [one["reason"] for one in ledger.dropped] == [reason]
    assert ledger.dropped[0]["detail"].startswith("line 3")


def read_of(tmp_path, *rows, **options) -> tuple[list, Ledger]:
    "Contents of the conversations of rows, and the ledger."
    ledger = Ledger("read")
    return contents(read_conversations(write_rows(tmp_path / "a.jsonl", rows), ledger=ledger, **options)), ledger


def test_same_roles_are_joined_on_request(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}
    read, ledger = read_of(tmp_path, row, same_role="join")
    assert read == [[("user", "a\n\nb"), ("assistant", "c")]] and ledger.notes["joined_same_role"] == 1


def test_one_id_for_two_conversations_is_made_two(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"id": id, **WRITERS["openai"]([("a", text)])} for id, text in zip(["x", "x", "x-2", "x"], "bcde")])
    ledger = Ledger("read")
    assert [one.id for one in read_conversations(path, ledger=ledger)] == ["x", "x-2", "x-2-2", "x-3"]
    assert ledger.notes["repeated_id"] == 3


@pytest.mark.parametrize("name", ["system", "system_prompt", "systemPrompt", "system_message", "instructions", "system-instruction"])
@pytest.mark.parametrize("value", ["Talk like a cook.", [{"type": "text", "text": "Talk like a cook."}]])
@pytest.mark.parametrize("format", ["openai", "sharegpt", "alpaca", "turns"])
def test_a_system_prompt_beside_the_messages_is_kept(tmp_path, name, value, format):
    read, _ = read_of(tmp_path, {name: value, **WRITERS[format]([("Is tea hot?", "Yes.")])})
    assert read == [[("system", "Talk like a cook."), ("user", "Is tea hot?"), ("assistant", "Yes.")]]


UNREAD = {  # what stands beside a row: the note
    "persona": ("Talk like a cook.", "unread_persona"),
    "system_prompts": (["Talk like a cook."], "unread_system_prompts"),
    "rejected": ([{"role": "assistant", "content": "No."}], "unread_rejected.content"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_fields_that_are_not_read_are_counted(tmp_path, name):
    value, note = UNREAD[name]
    _, ledger = read_of(tmp_path, {name: value, **WRITERS["openai"]([("Is tea hot?", "Yes.")])})
    assert ledger.notes[note] == 1


def test_thoughts_and_marks_of_messages_are_counted(tmp_path):
    asked, response = messages_of([("Is tea hot?", "Yes.")])
    _, ledger = read_of(tmp_path, {"messages": [asked, {**response, "reasoning": "Tea is hot.", "trainable": False}]},
                        {"messages": [asked, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "No."}]}]})
    assert {"unread_messages.reasoning", "unread_messages.trainable", "unread_content.thinking"} <= set(ledger.notes)


def test_a_response_marked_as_bad_is_left_out(tmp_path):
    rows = [{"prompt": "2 + 2?", "completion": text, "label": label} for text, label in (("5", False), ("4", True))]
    read, ledger = read_of(tmp_path, *rows)
    assert read == [[("user", "2 + 2?"), ("assistant", "4")]] and ledger.as_dict()["reasons"] == {"labelled_bad": 1}


def test_competing_responses_are_ranked_by_number(tmp_path):
    replies = [{"role": "assistant", "text": text, "rank": rank} for text, rank in (("b", 1.0), ("c", None), ("a", "0"), ("d", 2))]
    root = {"role": "prompter", "text": "Which?", "replies": replies}
    read, ledger = read_of(tmp_path, {"prompt": root}, {"prompt": {**root, "deleted": True}})
    assert read == [[("user", "Which?"), ("assistant", "a")]] and ledger.as_dict()["reasons"] == {"deleted": 1}


def test_wrong_files_are_named(tmp_path):
    assert "no such file" in str(refused(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 50)[:-9])
    assert "cut-off gzip" in str(refused(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "wide.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert "not UTF-8" in str(refused(tmp_path / "wide.jsonl"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1....")
    assert "rows.parquet: cannot be loaded as a dataset" in str(refused(tmp_path / "rows.parquet"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "deep.jsonl" in str(refused(tmp_path / "deep.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "is not a file" in str(refused(tmp_path / "pipe.jsonl"))


def test_datasets_tables_and_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [WRITERS["sharegpt"]([("Hi.", str(i))]) for i in range(3)]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    assert [each.messages[1].content for each in read_conversations(tmp_path / "one")] == ["0", "1", "2"]
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "two")
    assert "has splits test, train (name one, such as" in str(refused(tmp_path / "two"))
    assert len(read_conversations(f"{tmp_path / 'two'}@test")) == 3
    assert "cannot be loaded as a dataset" in str(refused(f"{tmp_path / 'two'}@none", format="hf"))
    one.to_parquet(tmp_path / "one.parquet")
    assert contents(read_conversations(tmp_path / "one.parquet")) == contents(read_conversations(tmp_path / "one"))
    columns = datasets.Dataset.from_list([{"messages": {"role": ["user", "assistant"], "content": ["Hi.", "Hello!"]}, "n": 1}])
    columns.save_to_disk(tmp_path / "columns")
    assert contents(read_conversations(tmp_path / "columns")) == [[("user", "Hi."), ("assistant", "Hello!")]]
    (tmp_path / "a.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""Hi.""}, {""role"": ""assistant"", ""content"": ""42""}]"\n')
    assert contents(read_conversations(tmp_path / "a.csv")) == [[("user", "Hi."), ("assistant", "42")]]


def test_convert_writes_nothing_when_it_fails(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n{\n")
    out = tmp_path / "out.jsonl"
    out.write_text("kept")
    with pytest.raises(InputError): convert(tmp_path / "a.jsonl", out)
    assert out.read_text() == "kept" and not (tmp_path / "out.ledger.json").exists()
    assert convert(tmp_path / "a.jsonl", out, on_error="skip")["rows_out"] == 1


def test_a_file_name_that_is_not_utf8(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_text(GOOD)
    assert convert(path, tmp_path / "out.jsonl")["rows_out"] == 1


# What the tables of names and marks are for

KEPT = [  # row: what is read
    ({"sysPrompt": {"parts": [{"text": "Be kind."}]}, "q": "Is tea hot?", "a": "Yes."}, [("system", "Be kind."), ("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"preamble": ["Be kind.", "Be brief."], "messages": [], "query": "Is tea hot?", "reply": "Yes."}, [("system", "Be kind.\nBe brief."), ("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"system_prompt": "Be kind.", "messages": [{"role": "system", "content": ""}, *messages_of([("Is tea hot?", "Yes.")])]}, [("system", "Be kind."), ("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"rejected_messages": messages_of([("Is tea hot?", "No.")]), "chosen_messages": messages_of([("Is tea hot?", "Yes.")])}, [("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"contents": [{"role": "user", "parts": [{"text": "Is tea hot?"}]}, {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Yes."}]}]}, [("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"messages": [{"type": "human", "content": "Is tea hot?"}, {"role": "assistant", "channel": "analysis", "content": "Hm."}, {"type": "ai", "content": "Yes.", "value": ""}]}, [("user", "Is tea hot?"), ("assistant", "Yes.")]),
    ({"instruction": "", "question": "Is tea hot?", "context": [{"type": "text", "text": "Tea is hot."}], "output": "", "answer": "Yes."}, [("user", "Is tea hot?\nTea is hot."), ("assistant", "Yes.")]),
]


@pytest.mark.parametrize("row, expected", KEPT, ids=range(len(KEPT)))
def test_fields_of_other_names_and_forms_are_read(tmp_path, row, expected):
    assert read_of(tmp_path, row)[0] == [expected]


@pytest.mark.parametrize("more, note", [
    ({"rejected": "Yes"}, "unread_rejected"), ({"split": "test"}, "unread_split"), ({"meta": "lost"}, "unread_meta"), ({"score": 0.5}, "unread_score"), ({"type": "persona"}, "unread_type"),
    ({"label": 0}, "unread_label"), ({"label": "tea"}, "unread_label"), ({"mask_history": True}, "unread_mask_history"), ({"system": "Be kind."}, "unread_system"),
])
def test_a_word_about_every_field(tmp_path, more, note):
    row = {"messages": [{"role": "system", "content": "Be brief."}, *messages_of([("Is tea hot? Yes", "Yes.")])]}
    assert read_of(tmp_path, row | more)[1].notes == {"format_openai": 1, note: 1}
    assert read_of(tmp_path, row | {"model": "m", "source": "s", "meta": {"a": 1}, "split": "eval", "label": True, "id": 3})[1].notes == {"format_openai": 1}


@pytest.mark.parametrize("mark", [{"loss": False}, {"loss": 0.0}, {"learn": False}, {"masked": 1}, {"label": False}, {"feedback": "bad"}, {"thinking": "Yes"}])
def test_a_word_about_every_mark_of_a_message(tmp_path, mark):
    asked, response = messages_of([("Is tea hot?", "Yes.")])
    assert read_of(tmp_path, {"messages": [asked, response | mark]})[1].notes == {"format_openai": 1, f"unread_messages.{next(iter(mark))}": 1}
    assert read_of(tmp_path, {"messages": [asked | {"loss": 0}, response | {"loss": True, "train": 1, "masked": 0}]})[1].notes == {"format_openai": 1}


@pytest.mark.parametrize("label", [{"label": "False"}, {"kto_tag": False}, {"label": "thumbs_down"}])
def test_labels_of_other_forms(tmp_path, label):
    good, bad = ({"prompt": "2 + 2?", "completion": text} for text in "45")
    read, ledger = read_of(tmp_path, bad | label, good)
    assert read == [[("user", "2 + 2?"), ("assistant", "4")]] and ledger.as_dict()["reasons"] == {"labelled_bad": 1}


def test_a_first_line_decides_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"[\n{GOOD}\n")
    assert len(read_conversations(tmp_path / "a.jsonl", on_error="skip")) == 1
    (tmp_path / "b.json").write_text('{"messages":\n' + json.dumps(messages_of([("Hi.", "Hello!")]), indent=1) + "}")
    assert len(read_conversations(tmp_path / "b.json")) == 1


def test_a_user_message_is_no_system_prompt(tmp_path):
    with pytest.raises(InputError, match="has no system prompt"):
        read_prompts(write_rows(tmp_path / "a.jsonl", [{"prompt": "Is tea hot?", "messages": messages_of([("Is tea hot?", "Yes.")])}]))


def test_values_that_json_cannot_hold(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [WRITERS["openai"]([("Hi.", text)]) | {"meta": {"at": pandas.Timestamp("2020-02-03"), "x": x, "bytes": b"\xff"}} for text, x in (("a", float("nan")), ("b", float("inf")))]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    convert(tmp_path / "a.parquet", tmp_path / "out.jsonl")
    assert [one.meta for one in read_conversations(tmp_path / "out.jsonl")] == [{"at": "2020-02-03 00:00:00", "bytes": "b'\\xff'"}, {"at": "2020-02-03 00:00:00", "x": "inf", "bytes": "b'\\xff'"}]


# Files that others wrote

REAL = {  # file: (format, conversations, turns)
    "kdconv/film_dev.json.gz": ("speakers", 150, 1928),
    "multiwoz/val_test.text.jsonl.gz": ("speakers", 1996, 14720),
    "openassistant/en_100_tree.jsonl.gz": ("tree", 102, 149),
    "openassistant/en_100_message.jsonl.gz": ("tree", 102, 149),
    "self-instruct/seed_tasks.jsonl": ("alpaca", 175, 175),
    "sharegpt-format/v1_sft_demo.jsonl": ("openai", 499, 499),
    "taskmaster/tm4.sample1000.json.gz": ("speakers", 998, 1844),
}


@pytest.mark.parametrize("name", REAL)
def test_real_conversations(tmp_path, name):
    if not (SHARED / "data" / name).exists(): pytest.skip("no shared data")
    format, n, n_turns = REAL[name]
    ledger = convert(SHARED / "data" / name, tmp_path / "out.jsonl")
    assert ledger["notes"][f"format_{format}"] == n and ledger["expected"] == n + sum(ledger["reasons"].values())
    read = read_conversations(tmp_path / "out.jsonl")
    assert (len(read), sum(one.n_turns for one in read)) == (n, n_turns)


@pytest.mark.parametrize("name, n", [("lobe-chat-agents/agents.jsonl.gz", 503), ("openassistant/en_100_text.jsonl", 100),
                                     ("awesome-chatgpt-prompts/prompts_2024-06-12.csv", 169)])
def test_real_prompts(name, n):
    if not (SHARED / "data" / name).exists(): pytest.skip("no shared data")
    assert len(read_prompts(SHARED / "data" / name)) == n


def test_tables_are_no_conversations():
    if not (SHARED / "data").exists(): pytest.skip("no shared data")
    assert "holds no JSON" in str(refused(SHARED / "data/taskmaster/tm3_train-bc.tsv.gz"))
    assert "no row of a known format" in str(refused(SHARED / "data/lobe-chat-agents/agents.jsonl.gz"))


CASES = {  # file: conversations as (first role, last content), reasons, notes that must be there
    "system-prompt-beside": ([("system", "Water it, friend of the soil."), ("system", "It pours, so stay indoors."), ("system", "Danube.")], {}, ()),
    "two-questions": ([], {"no_speakers": 1}, ()),
    "repeated-ids": ([("system", "Water, fresh from the oven of night."), ("system", "Flour in the air.")], {}, ("repeated_id",)),
    "prompt-beside-messages": ([], {"no_response": 1}, ()),
    "foreign-names": ([("user", "The railway museum, five minutes away."), ("user", "Hello, how can I help?"), ("user", "A. Reed wrote it.")], {},
                      ("system_is_assistant", "unread_category")),
    "kto-label": ([("user", "Four.")], {"labelled_bad": 1}, ()),
}


@pytest.mark.parametrize("name", CASES)
def test_small_inputs_that_were_read_wrongly(name):
    path = SHARED / "cases" / f"{name}.jsonl"
    if not path.exists(): pytest.skip("no shared cases")
    expected, reasons, notes = CASES[name]
    ledger, read = Ledger("read"), []
    try: read = read_conversations(path, on_error="skip", ledger=ledger)
    except InputError: assert not expected
    assert [(one.messages[0].role, one.messages[-1].content) for one in read] == expected
    assert ledger.as_dict()["reasons"] == reasons and set(notes) <= set(ledger.notes)


def test_the_system_message_is_the_system_prompt():
    path = SHARED / "cases/prompt-beside-messages.jsonl"
    if not path.exists(): pytest.skip("no shared cases")
    assert [prompt.text for prompt in read_prompts(path)] == ["Answer in lower case."]


@pytest.mark.parametrize("name", ["deep_meta", "deep_meta_500", "deep_meta_900", "duplicate_keys", "meta_1e999"])
def test_hostile_files(name):
    path = SHARED / "cases/hostile/convert" / f"{name}.jsonl"
    if not path.exists(): pytest.skip("no shared cases")
    assert f"{path}:" in str(refused(path))
