"Published IFEval files: scored as they are, spoilt ones named."

import json

import pytest

from s3ft_nb.core.files import InputError, write_rows
from s3ft_nb.measure.benchmarks import score_ifeval


def task(key, prompt, **kinds):
    ids = [id.replace("__", ":") for id in kinds]
    return {"key": key, "prompt": prompt, "instruction_id_list": ids, "kwargs": list(kinds.values())}


NULLS = dict.fromkeys(["keyword", "frequency", "relation", "num_words", "num_bullets", "language"])
TASKS = [task(1000, "Two bullets. ", detectable_format__number_bullet_lists=NULLS | {"num_bullets": 2.0}, punctuation__no_comma=NULLS),
         task(1001, "Ten words.", length_constraints__number_words={"num_words": 10, "relation": "less than"})]
ANSWERS = {1000: "Sure, here:\n* a\n* b", 1001: "One two three."}


def jsonl(path, rows): return write_rows(path, rows)


def numbers_of(found): return {(row["arm"], row["metric"]): row for row in found["numbers"] if row["part"] == "all"}


@pytest.mark.parametrize("form", ["prompt", "key", "log"])
def test_published_files_are_scored(tmp_path, form):
    make = {"prompt": lambda t: {"prompt": t["prompt"].strip(), "response": ANSWERS[t["key"]]}, "key": lambda t: {"key": t["key"], "response": ANSWERS[t["key"]], "model": "m"},
            "log": lambda t: {"doc_id": 0, "doc": t, "resps": [[ANSWERS[t["key"]]]], "filtered_resps": [ANSWERS[t["key"]]]}}[form]
    found = score_ifeval(jsonl(tmp_path / "in.jsonl", TASKS), jsonl(tmp_path / "out.jsonl", [make(t) for t in reversed(TASKS)]))
    rows = numbers_of(found)  # prompt level: all instructions of a task; instruction level: each
    assert [rows[arm, metric]["mean"] for metric in ("adherence", "csr") for arm in ("strict", "loose")] == [0.5, 1.0, pytest.approx(2 / 3), 1.0]
    assert rows["strict", "adherence"]["n"] == 2 and rows["strict", "csr"]["n"] == 3 and found["unknown"] == {}


@pytest.mark.parametrize("spoil, said", [
    (lambda t: t | {"kwargs": []}, "in.jsonl:2: kwargs: does not go with"),
    (lambda t: t | {"kwargs": [{"num_words": 3}]}, "in.jsonl:2: kwargs: .*takes"),
    (lambda t: {k: v for k, v in t.items() if k != "prompt"}, "in.jsonl:2: prompt: is missing"),
    (lambda t: t | {"instruction_id_list": "x"}, "in.jsonl:2: instruction_id_list: "),
])
def test_spoilt_inputs_are_named(tmp_path, spoil, said):
    with pytest.raises(InputError, match=said):
        score_ifeval(*(files := (jsonl(tmp_path / "in.jsonl", [TASKS[0], spoil(TASKS[1])]), jsonl(tmp_path / "out.jsonl", [{"key": key, "response": text} for key, text in ANSWERS.items()]))), complete=True)
    found = score_ifeval(*files)  # without the flag, what is there is scored
    assert numbers_of(found)["strict", "adherence"]["n"] == 1 and len(found["left_out"]["unreadable_task"]) == 1 and "in.jsonl:2" in found["left_out"]["unreadable_task"][0]


@pytest.mark.parametrize("rows, said", [
    ([{"key": 1000, "response": "a"}, {"key": 1000, "response": "b"}], "out.jsonl:2: key: has two responses to one task"),
    ([{"key": 1000}], "out.jsonl:1: response: holds no response"),
    ([{"key": 1000, "response": ["a", 3]}], "out.jsonl:1: response: holds no response"),
    ([{"key": 1000, "response": " "}, {"key": 1001, "response": "a"}], "out.jsonl: response: is empty"),
])
def test_spoilt_responses_are_named(tmp_path, rows, said):
    with pytest.raises(InputError, match=said): score_ifeval(jsonl(tmp_path / "in.jsonl", TASKS), jsonl(tmp_path / "out.jsonl", rows), complete=True)


def test_unknown_kinds_are_counted(tmp_path):
    rows = [task(1, "Shout.", count__shouts={"n": 2}, punctuation__no_comma={}), task(2, "Whisper.", punctuation__no_comma={})]
    files = jsonl(tmp_path / "in.jsonl", rows), jsonl(tmp_path / "out.jsonl", [{"key": key, "response": "Hey!\nHo!"} for key in (1, 2)])
    found = score_ifeval(*files)
    assert (found["unknown"], found["left_out"], numbers_of(found)["strict", "adherence"]["n"]) == ({"count:shouts": 1}, {"unknown_instruction": ["1"]}, 1)


def test_tasks_without_a_response_are_counted_or_refused(tmp_path):
    files = jsonl(tmp_path / "in.jsonl", TASKS), jsonl(tmp_path / "out.jsonl", [{"key": 1000, "response": "a"}])
    found = score_ifeval(*files)
    assert (found["left_out"], numbers_of(found)["strict", "adherence"]["n"]) == ({"no_response": ["1001"]}, 1)
    with pytest.raises(InputError, match="no response to any task"): score_ifeval(files[0], jsonl(files[1], [{"key": 7, "response": "a"}]))


@pytest.mark.parametrize("rows, mean, n, left_out", [
    ([{"key": "1000", "response": "* a\n* b"}, {"key": "1001", "response": None}], 0.5, 2, {"empty_response": ["1001"]}),  # text keys; null follows nothing
    ([{"response": "* a\n* b"}, {"response": "Fine."}], 1.0, 2, {"paired_by_place": ["1000", "1001"]}),
    ([{"prompt": "Two bullets!", "response": "* a\n* b"}, {"prompt": "Something else.", "response": "Fine."}], 1.0, 1, {"paired_by_place": ["1000"], "no_response": ["1001"]}),
    ([{"key": 1000, "response": "<think>\nTwo, no commas, fine\n</think>\n* a\n* b"}, {"key": 1000, "response": "other"}, 7], 1.0, 1, {"second_response": ["1000"], "no_response": ["1001"]}),
    ([{"doc": TASKS[0], "resps": [["Well, * a"]], "filtered_resps": ["* a\n* b"]}], 1.0, 1, {"no_response": ["1001"]}),
])
def test_what_is_there_is_scored_and_the_rest_is_named(tmp_path, rows, mean, n, left_out):
    found = score_ifeval(jsonl(tmp_path / "in.jsonl", TASKS), jsonl(tmp_path / "out.jsonl", rows))
    row = numbers_of(found)["strict", "adherence"]
    assert (row["mean"], row["n"]) == (mean, n) and {code: what for code, what in found["left_out"].items() if code != "unreadable_response"} == left_out


@pytest.mark.parametrize("spoil", [{"instruction_id_list": [["punctuation:no_comma"], "a"]}, {"kwargs": ["a", {}]}, {"prompt": "\u200b"}, {"key": 1001}])
def test_files_of_another_shape_are_named(tmp_path, spoil):
    files = tmp_path / "in.jsonl", jsonl(tmp_path / "out.jsonl", [{"doc": "x", "resps": "a", "response": "a"}])
    files[0].write_text("\n" + "".join(json.dumps(one) + "\n" for one in [TASKS[0] | spoil, TASKS[1]]))
    with pytest.raises(InputError, match=f"in.jsonl:2: {next(iter(spoil))}: "): score_ifeval(*files, complete=True)
    with pytest.raises(InputError, match="out.jsonl:1: response: holds no response"): score_ifeval(jsonl(tmp_path / "good.jsonl", TASKS), files[1], complete=True)
