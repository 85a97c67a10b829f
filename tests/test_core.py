"What the chapters of core cannot hold: kills, a full disk, round trips of made-up rows, shards, secrets."
import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.stage import EVENTS, Progress, Stage, rows_hash, spend
from s3ft_nb.core.records import Conversation, conversation, is_blank
from s3ft_nb.core.files import InputError, iter_lines, read_json, read_rows, write_json, write_rows
from s3ft_nb.core.files import redact, values_of

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).map(str.strip).filter(lambda text: not is_blank(text))
pairs = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


def messages_of(pairs) -> list:
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]


def branch(pairs) -> dict:
    (asked, answered), *rest = pairs
    reply = {"role": "assistant", "text": answered, "replies": [branch(rest)] if rest else []}
    return {"role": "prompter", "text": asked, "replies": [reply]}


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


def test_other_separators_do_not_end_a_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"a": "one\u2028two\x85three\x0bfour\r"}])
    assert len(list(iter_lines(path))) == 1
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(tmp_path / "b.jsonl") == read_rows(path)


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
from s3ft_nb.core.stage import Stage, spend
from s3ft_nb.core.files import write_rows

stage = Stage(sys.argv[1], "work", seed=7, shard_size=2)

def work(rows, seed):
    time.sleep(0.02)
    spend(requests=2, generated=seed % 100)
    stage.ledger.note("worked", 2)
    if rows[0]["id"] % 8 == 0: stage.ledger.drop(rows[0]["id"], "eighth")
    return [{"id": row["id"], "seed": seed, "text": "x" * 20_000} for row in rows if row["id"] % 8]

done = stage.map([{"id": i} for i in range(60)], work)
write_rows(sys.argv[1] + "/all.jsonl", done)
stage.close(60, len(done))
"""


def files_of(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_kill_at_random_instants_changes_nothing(tmp_path):
    "Neither rows nor ledger nor token counts: `usage.json` and `ledger.json` are among the files compared."
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    subprocess.run([sys.executable, "-c", WORKER, str(whole)], check=True)
    dice, shards = random.Random(0), lambda: len(list(killed.glob("shards/shard-*.jsonl")))
    for _ in range(4):
        run, until, before = subprocess.Popen([sys.executable, "-c", WORKER, str(killed)]), time.time() + 20, shards()
        while time.time() < until and run.poll() is None and shards() == before: time.sleep(0.002)
        time.sleep(dice.random() * 0.05)
        run.send_signal(signal.SIGKILL), run.wait()
    assert 0 < shards() < 30
    (killed / "shards" / ".shard-00029.jsonl.part").write_text("half")
    subprocess.run([sys.executable, "-c", WORKER, str(killed)], check=True)
    assert files_of(killed) == files_of(whole)
    assert read_json(killed / "usage.json")["requests"] == 60 and read_json(killed / "ledger.json")["reasons"] == {"eighth": 8}


def test_shards_without_a_claim_are_not_trusted(tmp_path):
    write_rows(tmp_path / "shards" / "shard-00000.jsonl", [{"stale": True}])
    write_json(tmp_path / "shards" / "shard-00000.json", {"usage": {"prompt": 9}, "notes": {}, "dropped": []})
    stage = Stage(tmp_path, shard_size=1)
    assert stage.map([{"id": 1}], lambda rows, seed: rows) == [{"id": 1}] and not stage.usage


def test_a_failing_shard_leaves_the_finished_ones(tmp_path):
    def fails(rows, seed):
        spend(prompt=1)
        if rows[0]["id"] == 2: raise InputError("engine down")
        return rows
    rows, done = [{"id": i} for i in range(4)], []
    with pytest.raises(InputError): Stage(tmp_path, shard_size=1).map(rows, fails)
    stage = Stage(tmp_path, shard_size=1)
    assert stage.map(rows, lambda rows, seed: done.append(rows) or rows) == rows
    assert done == [[rows[2]], [rows[3]]] and stage.usage == {"prompt": 2}
    spend(prompt=1)  # outside of a stage nothing is counted, also after a failure
    assert stage.usage == {"prompt": 2}


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 12), size=st.integers(1, 5), lost=st.sets(st.integers(0, 11)))
def test_lost_shards_are_made_again(tmp_path_factory, n, size, lost):
    folder, rows = tmp_path_factory.mktemp("s"), [{"id": i} for i in range(n)]

    def run():
        stage = Stage(folder, seed=1, shard_size=size)
        def work(some, seed):
            spend(scored=len(some))
            inner = stage.part(f"inner-{some[0]['id']}", shard_size=1)  # a stage within the work of another
            return inner.map([{**row, "seed": seed} for row in some for _ in range(row["id"] % 3)], twice)
        return stage.map(rows, work), dict(stage.usage)

    def twice(some, seed):
        spend(generated=2)
        return some

    first = run()
    before = files_of(folder)
    assert first[1].get("generated", 0) == 2 * len(first[0]) and first[1].get("scored", 0) == n
    for index in lost: (folder / "shards" / f"shard-{index:05d}.jsonl").unlink(missing_ok=True)
    assert run() == first and files_of(folder) == before


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




# Limits of inputs


@pytest.mark.parametrize("name, unit, n, said", [
    ("spaces.jsonl.gz", b" ", 2**27, "holds more than"), ("rows.jsonl.gz", b"{}\n", 2**23, "holds more than 2,000,000 rows"), ("table.csv.gz", b"a,b\n", 2**23, "holds more than 2,000,000 rows"),
    ("array.json.gz", b"0,", 2**23, "holds more than 2,000,000 rows"), ("deep.jsonl.gz", b"[", 2**24, "nested more than 100 levels deep"),
])
def test_archives_that_explode_are_one_line(tmp_path, name, unit, n, said):
    body = b"[" + unit * (n // len(unit)) + b"0]" if name == "array.json.gz" else unit * (n // len(unit))
    (tmp_path / name).write_bytes(gzip.compress(body, 6))
    start = time.process_time()
    with pytest.raises(InputError, match=said): values_of(tmp_path / name)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "txt"])
def test_pipes_and_devices_are_one_line(tmp_path, ending):
    os.mkfifo(tmp_path / f"pipe.{ending}")
    os.symlink("/dev/zero", tmp_path / f"zero.{ending}")
    for name in ("pipe", "zero"):
        with pytest.raises(InputError, match=f"{name}.{ending}: is not a file"): values_of(tmp_path / f"{name}.{ending}")


def test_a_table_that_explodes_is_one_line(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pa.array(["x" * 1_000_000])
    parquet.write_table(pa.table({"prompt": pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), text)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10**6
    with pytest.raises(InputError, match="a.parquet: .*holds more than 1,073,741,824 bytes"): values_of(tmp_path / "a.parquet")


def test_file_names_that_are_not_utf8_can_be_written_down(tmp_path):
    write_json(tmp_path / "a.json", {"source": os.fsdecode(b"caf\xe9.txt")})
    assert read_json(tmp_path / "a.json") == {"source": "caf\ufffd.txt"}
    with pytest.raises(InputError, match="no such file"): values_of("x" * 5000)
