"""Damaged inputs by seed: every row is accounted for, or one clear error. python tests/fuzz.py conversations 10000 [first seed]
The suite runs some hundreds of the same seeds (test_fuzz.py); a seed that fails is tried alone by giving it as the first."""
import copy
import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

from s3ft_nb.annotation.exchange import from_tool
from s3ft_nb.annotation.task import read_annotations
from s3ft_nb.core.convert import FORMATS, convert, read_conversations
from s3ft_nb.core.files import InputError, read_json, read_rows
from s3ft_nb.core.files import resource as bundled
from s3ft_nb.core.records import Annotation, Conversation, Preference
from s3ft_nb.measure.benchmarks import score_ifeval
from s3ft_nb.run.plan import make_plan

ASKED, SAID = {"role": "user", "content": "Is tea hot?"}, {"role": "assistant", "content": "Yes, as a rule."}
CONVERSATIONS = [
    {"id": "a", "messages": [{"role": "system", "content": "Be brief."}, ASKED, SAID], "source": "s", "meta": {"n": 1}},
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!", "train": False}], "system": "Be kind."},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi.", "Hello!"]], "label": True},
    {"instruction": "Who?", "instances": [{"input": "a", "output": "b"}, {"input": "", "output": "c"}]},
    {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi.", "deleted": False, "replies": [
        {"role": "assistant", "text": "Hello!", "rank": 1, "replies": [{"role": "prompter", "text": "Bye.", "replies": []}]}, {"role": "assistant", "text": "No.", "rank": 0.0}]}},
    {"conversation": [{"prompt": "Hi.", "response": "Hello!"}, {"prompt": "Bye."}], "model": "m", "split": "eval"},
    {"dialogue_id": 3, "utterances": [{"speaker": "USER", "text": "Hi."}, {"speaker": "SYSTEM", "text": "Hello!"}]},
    {"prompt": [ASKED], "chosen": [SAID], "rejected": [{"role": "assistant", "content": "No."}], "kto_tag": True},
    {"messages": {"role": ["user", "assistant"], "content": ["Hi.", "Hello!"]}},
    {"contents": [{"role": "user", "parts": [{"text": "Hi."}]}, {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Hello!"}]}]},
]
TASKS = [
    {"key": 1, "prompt": "Name two teas.", "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"], "kwargs": [{}, {"num_words": 9, "relation": "less than"}]},
    {"key": 2, "prompt": "Write about tin.", "instruction_id_list": ["keywords:existence", "detectable_format:number_bullet_lists"], "kwargs": [{"keywords": ["tin"]}, {"num_bullets": 2}]},
    {"key": 3, "prompt": "Say it twice.", "instruction_id_list": ["combination:repeat_prompt", "keywords:letter_frequency"],
     "kwargs": [{"prompt_to_repeat": "Say it twice."}, {"letter": "s", "let_frequency": 3, "let_relation": "at least"}]},
    {"key": 4, "prompt": "In parts.", "instruction_id_list": ["length_constraints:nth_paragraph_first_word", "language:response_language"],
     "kwargs": [{"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "tin"}, {"language": "en"}]},
]
RESPONSES = [{"key": 1, "response": "Green and black."}, {"prompt": "Write about tin.", "response": "* tin\n* pot"},
             {"doc_id": 0, "doc": {"key": 3}, "resps": [["Say it twice. Yes."]], "filtered_resps": ["Say it twice. Yes."]}, {"key": 4, "response": "Tin.\n\nPot."}]
NAMES = "role content from value text messages conversations turns prompt response replies instruction output system id meta label train rank deleted key kwargs resps doc".split()


def nested(depth):
    value = "deep"
    for _ in range(depth): value = [value]
    return value


def strange(dice):
    "A value that stands nowhere by rights."
    return dice.choice([None, True, False, 0, -1, 2**70, 10**400, 1.5, 1e308, "", " ", "\u200b", "a", "x" * 30_000, "\x00\x1b[31m", "<think>a</think>", [], {}, [[]], [None], ["a", "b"], {"a": {}},
                        {"type": "text"}, {"type": "image_url", "image_url": "x"}, {"role": "user"}, nested(dice.choice([5, 99, 300])), [{"role": "user", "content": "a"}], {"content": ["a"], "role": ["user"]}, "1e999"])


def damage(value, dice):
    "A copy of a value with one change somewhere."
    places = []
    def walk(one):
        for key in (one if isinstance(one, dict) else range(len(one))):
            places.append((one, key))
            if isinstance(one[key], dict | list): walk(one[key])
    value = copy.deepcopy(value)
    walk(value)
    if not places: return strange(dice)
    owner, key = dice.choice(places)
    how = dice.randrange(6)
    if how == 0: del owner[key]
    elif how == 1 and isinstance(owner, dict): owner[dice.choice(NAMES)] = owner.pop(key)
    elif how == 2 and isinstance(owner, dict): owner[dice.choice(NAMES)] = strange(dice)
    elif how == 3 and isinstance(owner, list): owner.insert(key, copy.deepcopy(dice.choice(owner)))
    elif how == 4: owner[key] = [owner[key]]
    else: owner[key] = strange(dice)
    return value


def write(path, rows, dice):
    "Write rows, with now and then a fault of the text itself."
    lines = [json.dumps(row).encode() for row in rows]
    i, how = dice.randrange(len(lines)), dice.randrange(20)
    if how == 0: lines[i] = lines[i][: dice.randrange(len(lines[i]))]
    if how == 1: lines[i] = lines[i].replace(b'"', dice.choice([b"'", b"\xff", b"\\ud800\""]), 2)
    if how == 2: lines[i] = lines[i].replace(b"{", b'{"id": 1, "id": NaN, ', 1)
    if how == 3: lines[i] = b'{"meta": 1e999, ' + lines[i][1:]
    if how == 4: lines = [b"[\n" + b",\n".join(lines) + dice.choice([b"]", b""])]
    if how == 5: lines.insert(i, dice.choice([b"\xef\xbb\xbf", b"", b"\x00", b"null", b"[", b"{"]))
    Path(path).write_bytes(b"\n".join(lines))


def fuzz_conversations(seed, folder):
    "One file of damaged conversations: the ledger balances and what is written can be read again, or one line says what is wrong."
    dice = random.Random(f"conversations {seed}")
    rows = [dice.choice(CONVERSATIONS) for _ in range(dice.randint(1, 4))]
    for _ in range(dice.randint(1, 4)):
        i = dice.randrange(len(rows))
        rows[i] = damage(rows[i], dice) if isinstance(rows[i], dict | list) else strange(dice)
    write(folder / "in.jsonl", rows, dice)
    options = {"on_error": dice.choice(["skip", "skip", "raise"]), "same_role": dice.choice(["join", "refuse"]), "format": dice.choice(["auto"] * 5 + [*FORMATS])}
    ledger = convert(folder / "in.jsonl", folder / "out.jsonl", **options)
    assert ledger["expected"] == ledger["rows_out"] + len(ledger["dropped"]) and ledger["rows_in"] >= 1
    made = read_rows(folder / "out.jsonl", Conversation)
    assert len(made) == ledger["rows_out"] and read_conversations(folder / "out.jsonl", max_chars=10**6) == made


def fuzz_ifeval(seed, folder):
    "One pair of damaged IFEval files: scored with what is left out counted, or one line that says what is wrong."
    dice = random.Random(f"ifeval {seed}")
    sides = [[dice.choice(rows) for rows in [side] * dice.randint(1, 3)] for side in (TASKS, RESPONSES)]
    for _ in range(dice.randint(1, 3)):
        side = dice.choice(sides)
        i = dice.randrange(len(side))
        side[i] = damage(side[i], dice) if isinstance(side[i], dict | list) else strange(dice)
    for name, side in zip(("in", "out"), sides): write(folder / f"{name}.jsonl", side, dice)
    json.dumps(score_ifeval(folder / "in.jsonl", folder / "out.jsonl"), allow_nan=False)


TASK = {"id": 7, "data": {"sample_id": "s1", "conversation_id": "c", "turn": 1, "response": "Tea is hot \U0001f375, as a rule."}, "annotations": [
    {"completed_by": {"id": 4, "email": "ann@example.org"}, "lead_time": 8.5, "was_cancelled": False, "updated_at": "2026-01-02T03:04:05Z", "result": [
        {"from_name": "label", "to_name": "response", "type": "choices", "value": {"choices": ["good"]}},
        {"from_name": "span", "to_name": "response", "type": "labels", "value": {"start": 0, "end": 3, "text": "Tea", "labels": ["offending"]}},
        {"from_name": "note", "to_name": "response", "type": "textarea", "value": {"text": ["Fine."]}}]}]}
PAIR = {"data": {"pair_id": "p1"}, "annotations": [{"completed_by": 4, "created_at": "2026-01-02T03:04:05Z", "result": [
    {"from_name": "choice", "type": "choices", "value": {"choices": ["first"]}}]}]}


def fuzz_label_studio(seed, folder):
    "One damaged export of Label Studio: what is read can be read again, what is not is in the ledger, or one line says what is wrong."
    dice = random.Random(f"label studio {seed}")
    kind = dice.choice([TASK, TASK, PAIR])
    tasks = [copy.deepcopy(kind) for _ in range(dice.randint(1, 3))]
    for i, task in enumerate(tasks): task["data"] |= {name: f"{value}-{i}" for name, value in task["data"].items() if name in ("sample_id", "pair_id")}
    for _ in range(dice.randint(1, 4)):
        i = dice.randrange(len(tasks))
        tasks[i] = damage(tasks[i], dice) if isinstance(tasks[i], dict | list) else strange(dice)
    text = json.dumps(dice.choice([tasks] * 12 + [tasks[0], {"tasks": tasks}]))
    if dice.randrange(20) == 0: text = text[: dice.randrange(len(text))]
    (folder / "export.json").write_text(text)
    from_tool(folder / "export.json", folder / "out.jsonl")
    ledger, rows = read_json(folder / "out.ledger.json"), read_rows(folder / "out.jsonl")
    assert ledger["rows_in"] == ledger["rows_out"] + len(ledger["dropped"]) and len(rows) == ledger["rows_out"]
    assert len(read_annotations(folder / "out.jsonl", Preference if rows and "pair_id" in rows[0] else Annotation)) == len(rows)


VALUES = ["1", "-1", "1e999", "nan", '"x"', '""', "true", "[]", '[1, "a"]', "{}", "{a = 1}", "1979-05-27", '"{step:none}"', '"{step:*}"', '"{step:train}"',
          '"{data:none}"', '"../x.ipynb"', '"/etc/passwd"', "'''", "10" * 400, '"https://a:b@c/"', r'"\u0000"', '"' + "x" * 9000 + '"']
KEYS = ["extends", "name", "notebook", "each", "skip", "cost", "out", "seed", "model", "required", "steps", "params", "a.b"]
HEADS = ["[steps]", "[params]", "[steps.train]", "[[steps]]", "[steps.'..']", "[", "\x00", "\ufeff", "= 1", "[steps.a.each]"]


def fuzz_recipes(seed, folder):
    "One damaged recipe: it is planned, or one line says what is wrong with it."
    dice = random.Random(f"recipes {seed}")
    lines = dice.choice(sorted(bundled("recipes").glob("*.toml"))).read_text().splitlines()
    for _ in range(dice.randint(1, 4)):
        i, how = dice.randrange(len(lines)), dice.randrange(8)
        key, equals, _ = lines[i].partition(" = ")
        if how == 0: del lines[i:i + dice.choice([1, 1, 1, 5])]
        elif how == 1: lines.insert(i, dice.choice(lines))
        elif how in (2, 3) and equals: lines[i] = f"{key} = {dice.choice(VALUES)}"
        elif how == 4: lines.insert(i, f"{dice.choice(KEYS)} = {dice.choice(VALUES)}")
        elif how == 5: lines.insert(i, dice.choice(HEADS))
        elif how == 6 and lines[i]: lines[i] = lines[i][: dice.randrange(len(lines[i]))]
        else: lines[i] = lines[i].replace(dice.choice('=["e{.'), dice.choice(["", "=", '"', "{", "\u00e9"]), 1)
        lines = lines or [""]
    (folder / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
    (folder / "talks.jsonl").write_text(json.dumps(CONVERSATIONS[0]) + "\n")
    settings = [f"conversations={folder / 'talks.jsonl'}"] if dice.randrange(3) else []
    json.dumps(make_plan(folder / "recipe.toml", settings, folder / "run"), allow_nan=False)


FUZZERS = {name.removeprefix("fuzz_"): function for name, function in list(globals().items()) if name.startswith("fuzz_")}


def fuzz(kind, n, first=0):  # -> seeds that failed, with what happened
    "Try seeds `first` to `first + n` of a kind."
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + n):
            start = time.process_time()
            try: FUZZERS[kind](seed, Path(folder))
            except InputError as error:
                places = {0, 1} if kind == "recipes" else {1}  # what is wrong with a setting or a step may stand in no file
                if "\n" in str(error) or not error.remedy or str(error).count(folder) not in places: failed[seed] = f"unclear: {error}"
            except Exception as error: failed[seed] = f"{type(error).__name__}: {error}"[:300]
            if time.process_time() - start > 10: failed[seed] = "took more than 10 seconds"
    return failed


if __name__ == "__main__":
    os.environ.setdefault("S3FT_EVENTS", os.devnull)
    kind, n, first = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or [0])[0])
    error, sys.stderr = sys.stderr, open(os.devnull, "w")
    found = fuzz(kind, n, first)
    sys.stderr = error
    for seed, text in found.items(): print(f"{kind} {seed}: {text}")
    print(f"{n} {kind}, {len(found)} failed, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MB")
    sys.exit(bool(found))
