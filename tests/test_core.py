"What the chapters of core cannot hold: hostile files, kills, a full disk, round trips of made-up rows, real files."
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.convert import READERS, detect
from s3ft_nb.core.convert import convert, read_conversations, read_prompts
from s3ft_nb.core.stage import Ledger, in_shards, rows_hash
from s3ft_nb.core.stage import EVENTS, Progress
from s3ft_nb.core.records import Conversation, conversation
from s3ft_nb.core.files import InputError, iter_lines, read_json, read_rows, write_json, write_rows
from s3ft_nb.core.files import redact

DATA = Path(os.environ.get("S3FT_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip).filter(bool)
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def refused(path, **options) -> InputError:
    "The error that reading a file ends in."
    with pytest.raises(InputError) as found: read_conversations(path, **options)
    assert "\n" not in str(found.value) and found.value.remedy
    return found.value


def messages_of(pairs) -> list:
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def branch(pairs) -> dict:
    (asked, answered), *rest = pairs
    reply = {"role": "assistant", "text": answered, "replies": [branch(rest)] if rest else []}
    return {"role": "prompter", "text": asked, "replies": [reply]}


WRITERS = {
    "openai": lambda pairs: {"messages": messages_of(pairs)},
    "sharegpt": lambda pairs: {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]}
                                                 for one in messages_of(pairs)]},
    "alpaca": lambda pairs: {"history": pairs[:-1], "instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]},
    "tree": lambda pairs: {"prompt": branch(pairs)},
    "turns": lambda pairs: {"conversation": [{"prompt": asked, "response": answered} for asked, answered in pairs]},
    "speakers": lambda pairs: {"utterances": [{"speaker": one["role"].upper(), "text": one["content"]} for one in messages_of(pairs)]},
}


@pytest.mark.parametrize("format", READERS)
@settings(max_examples=25, deadline=None)
@given(some=st.lists(pairs, min_size=1, max_size=3, unique_by=str))
def test_every_format_gives_back_what_was_said(tmp_path_factory, format, some):
    path = write_rows(tmp_path_factory.mktemp("f") / "a.jsonl.gz", [WRITERS[format](one) for one in some])
    read = read_conversations(path)
    assert [[(one.role, one.content) for one in each.messages] for each in read] == [
        [(one["role"], one["content"]) for one in messages_of(each)] for each in some]
    assert detect(WRITERS[format](some[0])) == format


@settings(max_examples=50, deadline=None)
@given(some=st.lists(pairs, max_size=3), ending=st.sampled_from([".jsonl", ".jsonl.gz"]))
def test_rows_survive_the_disk(tmp_path_factory, some, ending):
    rows = [conversation(messages_of(one), id=f"c{i}") for i, one in enumerate(some)]
    path = write_rows(tmp_path_factory.mktemp("r") / f"a{ending}", rows)
    assert read_rows(path, Conversation) == rows
    before = path.read_bytes()
    assert write_rows(path, read_rows(path, Conversation)).read_bytes() == before


@settings(max_examples=50, deadline=None)
@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
                          lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8))
def test_json_survives_the_disk(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("j") / "a.json"
    assert read_json(write_json(path, value)) == value


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_no_bytes_are_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("b") / "a.jsonl"
    path.write_bytes(data)
    for options in ({}, {"on_error": "skip"}):
        try: read_conversations(path, **options)
        except InputError as error: assert str(path) in str(error)


@settings(max_examples=150, deadline=None)
@given(row=st.recursive(st.none() | st.integers() | texts | st.sampled_from(["user", "system", "assistant"]), lambda inner: st.lists(inner, max_size=3)
       | st.dictionaries(st.sampled_from(["messages", "role", "content", "turns", "prompt", "response", "replies", "instruction", "history",
                                          "instances", "output", "system", "from", "value", "id", "meta", "conversation", "text"]), inner, max_size=4), max_leaves=12),
       format=st.sampled_from(["auto", *READERS]))
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
    '{"messages": [{"role": "assistant", "content": "a"}]}': ("role_order", "where user is due"),
    '{"messages": [{"role": "user", "content": 5}]}': ("wrong_type", "should be text, got 5"),
    '{"messages": "hi"}': ("missing_field", "has none of the lists"),
    '"hi"': ("wrong_type", "should be an object"),
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': ("broken_line", "half of a character pair"),
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


def test_same_roles_are_joined_on_request(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                                                           {"role": "assistant", "content": "c"}]}])
    ledger = Ledger("read")
    assert read_conversations(path, same_role="join", ledger=ledger)[0].messages[0].content == "a\n\nb"
    assert ledger.notes["joined_same_role"] == 1


def test_one_id_for_two_conversations_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"id": "x", **WRITERS["openai"]([("a", text)])} for text in "bc"])
    assert "id: 'x' is used twice" in str(refused(path))


def test_other_separators_do_not_end_a_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"a": "one\u2028two\x85three\x0bfour\r"}])
    assert len(list(iter_lines(path))) == 1
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(tmp_path / "b.jsonl") == read_rows(path)


def test_wrong_files_are_named(tmp_path):
    assert "no such file" in str(refused(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 50)[:-9])
    assert "cut-off gzip" in str(refused(tmp_path / "cut.jsonl.gz"))
    (tmp_path / "wide.jsonl").write_bytes(GOOD.encode("utf-16"))
    assert "not UTF-8" in str(refused(tmp_path / "wide.jsonl"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1....")
    assert "Parquet" in str(refused(tmp_path / "rows.parquet"))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    assert "deep.jsonl" in str(refused(tmp_path / "deep.jsonl"))


def test_datasets_on_disk(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [WRITERS["sharegpt"]([("Hi.", str(i))]) for i in range(3)]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(tmp_path / "one")
    assert [each.messages[1].content for each in read_conversations(tmp_path / "one")] == ["0", "1", "2"]
    datasets.DatasetDict(train=one, test=one).save_to_disk(tmp_path / "two")
    assert "has the splits test, train (name one, such as" in str(refused(tmp_path / "two"))
    assert len(read_conversations(f"{tmp_path / 'two'}@test", format="hf")) == 3
    assert "cannot be loaded as a dataset" in str(refused(f"{tmp_path / 'two'}@none", format="hf"))


def test_convert_writes_nothing_when_it_fails(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n{\n")
    out = tmp_path / "out.jsonl"
    out.write_text("kept")
    with pytest.raises(InputError): convert(tmp_path / "a.jsonl", out)
    assert out.read_text() == "kept" and not (tmp_path / "out.ledger.json").exists()
    assert convert(tmp_path / "a.jsonl", out, on_error="skip")["rows_out"] == 1


# Disk and kills


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"a": 1}])
    code = f"""
import resource
from s3ft_nb.core.files import InputError, write_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try: write_rows({str(path)!r}, [{{"a": "x" * 5000}}])
except InputError as error: print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "a.jsonl: cannot be written" in said and "nothing was overwritten (free some space and run again)" in said
    assert read_rows(path) == [{"a": 1}] and os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_no_space_at_any_step_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = write_rows(tmp_path / "a.jsonl", [{"a": 1}])
    with monkeypatch.context() as patch:
        def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, step, full)
        with pytest.raises(InputError, match="a.jsonl: cannot be written: No space left on device; nothing was overwritten"):
            write_rows(path, [{"a": 2}])
    assert read_rows(path) == [{"a": 1}] and os.listdir(tmp_path) == ["a.jsonl"]


WORKER = """
import sys, time
from s3ft_nb.core.stage import in_shards
from s3ft_nb.core.files import write_rows

def work(rows, seed):
    time.sleep(0.02)
    return [{"id": row["id"], "seed": seed, "text": "x" * 20_000} for row in rows]

write_rows(sys.argv[1] + "/all.jsonl", in_shards([{"id": i} for i in range(60)], work, sys.argv[1] + "/shards", 2, seed=7))
"""


def files_of(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kill_at_random_instants_changes_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    subprocess.run([sys.executable, "-c", WORKER, str(whole)], check=True)
    dice = random.Random(0)
    for _ in range(4):
        run, until = subprocess.Popen([sys.executable, "-c", WORKER, str(killed)]), time.time() + 20
        before = len(list(killed.glob("shards/shard-*")))
        while time.time() < until and run.poll() is None and len(list(killed.glob("shards/shard-*"))) == before: time.sleep(0.002)
        time.sleep(dice.random() * 0.05)
        run.send_signal(signal.SIGKILL), run.wait()
    assert 0 < len(list(killed.glob("shards/shard-*"))) < 30
    (killed / "shards" / ".shard-00029.jsonl.part").write_text("half")
    subprocess.run([sys.executable, "-c", WORKER, str(killed)], check=True)
    assert files_of(killed) == files_of(whole)


def test_shards_without_a_claim_are_not_trusted(tmp_path):
    write_rows(tmp_path / "shard-00000.jsonl", [{"stale": True}])
    assert in_shards([{"id": 1}], lambda rows, seed: rows, tmp_path, 1, seed=0) == [{"id": 1}]


def test_a_failing_shard_leaves_the_finished_ones(tmp_path):
    def fails(rows, seed):
        if rows[0]["id"] == 2: raise InputError("engine down")
        return rows
    rows = [{"id": i} for i in range(4)]
    with pytest.raises(InputError): in_shards(rows, fails, tmp_path, 1, seed=0)
    done = []
    assert in_shards(rows, lambda rows, seed: done.append(rows) or rows, tmp_path, 1, seed=0) == rows
    assert done == [[rows[2]], [rows[3]]]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 12), size=st.integers(1, 5), lost=st.sets(st.integers(0, 11)))
def test_lost_shards_are_made_again(tmp_path_factory, n, size, lost):
    folder, rows = tmp_path_factory.mktemp("s"), [{"id": i} for i in range(n)]
    work = lambda some, seed: [{**row, "seed": seed} for row in some for _ in range(row["id"] % 3)]  # noqa: E731
    first = in_shards(rows, work, folder, size, seed=1)
    before = files_of(folder)
    for index in lost: (folder / f"shard-{index:05d}.jsonl").unlink(missing_ok=True)
    assert in_shards(rows, work, folder, size, seed=1) == first and files_of(folder) == before


@settings(max_examples=50)
@given(rows=st.permutations([{"id": i} for i in range(4)]))
def test_order_is_part_of_the_hash(rows):
    assert (rows_hash(rows) == rows_hash([{"id": i} for i in range(4)])) == ([row["id"] for row in rows] == [0, 1, 2, 3])


# Progress and secrets


def test_lines_go_to_a_log_and_a_full_disk_does_not_stop_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(EVENTS, raising=False)
    monkeypatch.setattr("s3ft_nb.core.stage.LINE_SECONDS", 0)
    with Progress(2, label="score") as progress: progress.update(2)
    assert capsys.readouterr().err.startswith("score 2/2 rows, ")
    monkeypatch.setenv(EVENTS, str(tmp_path / "none" / "events.jsonl"))
    with Progress(1) as progress: progress.update()


@settings(max_examples=100)
@given(secret=st.text(min_size=8).filter(lambda text: len(text.strip()) >= 8), around=texts)
def test_a_secret_is_never_said(secret, around):
    secret = secret.strip()
    if secret in "***API_KEY***" or secret in around: return
    assert secret not in redact(f"<{around}>{secret}</>", {"API_KEY": secret}).replace("***API_KEY***", "\0")


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
    if not (DATA / name).exists(): pytest.skip("the data are not here")
    format, n, n_turns = REAL[name]
    books = convert(DATA / name, tmp_path / "out.jsonl")
    assert books["notes"][f"format_{format}"] == 1 and books["expected"] == n + sum(books["reasons"].values())
    read = read_conversations(tmp_path / "out.jsonl")
    assert (len(read), sum(one.n_turns for one in read)) == (n, n_turns)


@pytest.mark.parametrize("name, n", [("lobe-chat-agents/agents.jsonl.gz", 503), ("openassistant/en_100_text.jsonl", 100),
                                     ("awesome-chatgpt-prompts/prompts_2024-06-12.csv", 169)])
def test_real_prompts(name, n):
    if not (DATA / name).exists(): pytest.skip("the data are not here")
    assert len(read_prompts(DATA / name)) == n


def test_tables_are_no_conversations():
    if not DATA.exists(): pytest.skip("the data are not here")
    assert "holds no JSON" in str(refused(DATA / "taskmaster/tm3_train-bc.tsv.gz"))
    assert "no known format" in str(refused(DATA / "lobe-chat-agents/agents.jsonl.gz"))
