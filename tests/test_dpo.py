"Preference training: losses by hand, where a stage starts, kills, and rows that are no pairs."

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import CHILD, make_rows
from tiny import tiny_model

from s3ft_nb.core.files import InputError
from s3ft_nb.core.stage import Ledger, Stage
from s3ft_nb.lm.dpo import dpo, encode_pairs
from s3ft_nb.lm.model import load
from s3ft_nb.lm.train import order_of

SAME = {"quantization": "none", "dtype": "float32", "device": "cpu", "per_device_train_batch_size": 2}
ASK, GOOD, BAD = ({"role": role, "content": text} for role, text in (("user", "Hello"), ("assistant", "Ahoy"), ("assistant", "Hi")))


def make_pairs(n=5, turned=False):
    "Pairs of different lengths."
    found = [{"id": row["id"], "messages": row["messages"], "chosen": row["response"], "rejected": "It is cold today." * (1 + i % 2)}
             for i, row in enumerate(make_rows(n))]
    return [{**one, "chosen": one["rejected"], "rejected": one["chosen"]} for one in found] if turned else found


def by_hand(model, encoded):
    "(pairs, 2) log-probabilities of chosen and rejected, one side at a time, from plain logits."
    table = []
    for one in encoded:
        for side in ("chosen_ids", "rejected_ids"):
            ids = one["prompt_ids"] + one[side]
            with torch.no_grad(): logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            table.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(one["prompt_ids"]), len(ids))))
    return np.array(table).reshape(-1, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def first(base, tmp_path_factory):
    "A finished stage."
    folder = tmp_path_factory.mktemp("first")
    return folder, dpo(base, make_pairs(), folder, learning_rate=1e-2, num_train_epochs=4, **SAME)


@pytest.fixture(scope="module")
def table(base, first):
    "(encoded pairs, log-probabilities under the base, under the first stage)."
    plain, tuned = (load(base, "none", adapter=one, dtype="float32", device="cpu") for one in (None, first[0] / "adapter"))
    encoded = encode_pairs(plain.tokenizer, make_pairs(), 512, Ledger("t"))
    return encoded, by_hand(plain.model, encoded), by_hand(tuned.model, encoded)


sigmoid = lambda x: 1 / (1 + math.exp(-x))
LOSSES = {  # of one pair, from the log ratios of chosen and rejected and their tokens, at beta 0.3
    "sigmoid": lambda c, r, n, m: -math.log(sigmoid(0.3 * (c - r))),
    "sigmoid_norm": lambda c, r, n, m: -math.log(sigmoid(0.3 * (c / n - r / m))),
    "ipo": lambda c, r, n, m: (c / n - r / m - 1 / 0.6) ** 2,
    "robust": lambda c, r, n, m: (-0.9 * math.log(sigmoid(0.3 * (c - r))) + 0.1 * math.log(sigmoid(0.3 * (r - c)))) / 0.8,
}


@pytest.mark.parametrize("loss, weight", [*((name, 0.0) for name in LOSSES), ("sigmoid", 0.5)])
def test_padded_loss_is_the_one_by_hand(base, first, table, tmp_path, loss, weight):
    "A policy that does not move, compared with the base: its losses are neither ln 2 nor those of another order."
    encoded, reference, policy = table
    smoothing = 0.1 if loss == "robust" else 0.0
    done = dpo(base, make_pairs(), tmp_path, first[0] / "adapter", reference="base", loss_type=loss, beta=0.3, learning_rate=0.0,
               label_smoothing=smoothing, sft_weight=weight, **SAME)
    lengths = [len(one["input_ids"]) for one in encoded]
    order = order_of(lengths, 2, 1.0, 0)
    for step, row in enumerate(done["loss"]):
        batch = order[2 * step : 2 * step + 2]
        sizes = [(len(encoded[i]["chosen_ids"]), len(encoded[i]["rejected_ids"])) for i in batch]
        mean = np.mean([LOSSES[loss](*(policy[i] - reference[i]), *size) for i, size in zip(batch, sizes)])
        nll = -sum(policy[i][0] for i in batch) / sum(n for n, _ in sizes)
        assert row["loss"] == pytest.approx(mean + weight * nll, abs=1e-5)
        assert row["logps/chosen"] == pytest.approx(np.mean([policy[i][0] for i in batch]), abs=1e-3)
        assert row["logps/rejected"] == pytest.approx(np.mean([policy[i][1] for i in batch]), abs=1e-3)
    assert len(done["loss"]) == 3 and abs(done["loss"][0]["loss"] - math.log(2)) > 1e-3


def test_pairs_are_learnt_and_scrambled_pairs_are_not(base, first, table, tmp_path):
    encoded, reference, policy = table
    losses = first[1]["loss"]
    assert losses[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and losses[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert losses[-1]["rewards/margins"] > 0.1 and losses[-1]["rewards/accuracies"] == 1
    dpo(base, make_pairs(turned=True), tmp_path, learning_rate=1e-2, num_train_epochs=4, **SAME)
    turned = by_hand(load(base, "none", adapter=tmp_path / "adapter", dtype="float32", device="cpu").model, encoded)
    margin = lambda found: float((found[:, 0] - found[:, 1]).mean())
    assert margin(turned) < margin(reference) - 1 < margin(policy) - 2


def test_a_stage_starts_from_the_last(base, first, tmp_path):
    adapter = first[0] / "adapter"
    done = dpo(base, make_pairs(), tmp_path / "still", adapter, learning_rate=0.0, lora_r=4, **SAME)
    assert [one["loss"] for one in done["loss"]] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "still" / "adapter"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not [name for name in after if "ref" in name.split(".")] and not (tmp_path / "still" / "adapter" / "ref").exists()
    with pytest.raises(InputError, match="belongs to a training with other rows"):
        dpo(base, make_pairs(), tmp_path / "still", learning_rate=0.0, lora_r=4, **SAME)
    other = tiny_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(InputError, match="was trained on|is not the template|does not fit"):
        dpo(other, make_pairs(), tmp_path / "no", adapter, **SAME)
    with pytest.raises(InputError, match="is not an adapter folder"):
        dpo(base, make_pairs(), tmp_path / "no", base, **SAME)


def test_killed_and_resumed_gives_the_same_bytes(base, first, tmp_path):
    child = CHILD.replace("room.sft(", "dpo(").replace("train as room\n", "train as room\nfrom s3ft_nb.lm.dpo import dpo\n")
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 2, "device": "cpu",
                "start_from": str(first[0] / "adapter")}
    spec = {"model": str(base), "rows": make_pairs(4), "whole": str(tmp_path / "whole"), "killed": str(tmp_path / "killed"),
            "settings": settings, "kills": [{"die_at_step": 3}, {"die_before": "save_adapter"}]}
    done = subprocess.run([sys.executable, "-c", child, json.dumps(spec)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, signal.SIGKILL, signal.SIGKILL, 0], done.stderr
    whole, killed = Path(spec["whole"]), Path(spec["killed"])
    for path in sorted((whole / "adapter").iterdir()):
        assert path.read_bytes() == (killed / "adapter" / path.name).read_bytes(), path.name
    found = [json.loads((folder / "training.json").read_text()) for folder in (whole, killed)]
    for one in found: del one["seconds"]
    assert found[0] == found[1] and found[0]["steps"] == len(found[0]["loss"]) == 6


def test_pairs_that_teach_nothing_leave_with_a_reason(base):
    tokenizer, ledger = load(base, "none", dtype="float32", device="cpu").tokenizer, Ledger("t")
    one = {"messages": [ASK], "chosen": "Ahoy", "rejected": "Hi"}
    other = {"chosen": [{**ASK, "content": "Bye"}, GOOD], "rejected": [ASK, BAD]}
    rows = [{"id": "fine", **one}, {"id": "same", **one, "rejected": "Ahoy "}, {"id": "blank", **one, "rejected": " \n"},
            {"id": "long", **one, "chosen": "Ahoy " * 400}, {"id": "other", **other}]
    assert [pair["id"] for pair in encode_pairs(tokenizer, rows, 200, ledger)] == ["fine"]
    assert {row["id"]: row["reason"] for row in ledger.dropped} == {
        "same": "same", "blank": "blank", "long": "too_long", "other": "prompts_differ"}
    with pytest.raises(InputError, match="none of 4 pairs can be trained on: 1 blank, 1 prompts_differ, 1 same, 1 too_long"):
        encode_pairs(tokenizer, rows[1:], 200, Ledger("t"))


def test_both_sides_lose_the_same_turns(base):
    tokenizer, ledger = load(base, "none", dtype="float32", device="cpu").tokenizer, Ledger("t")
    row = {"id": "a", "messages": [*[ASK, GOOD] * 4, ASK], "chosen": "Ahoy", "rejected": "Hi " * 30}
    whole = encode_pairs(tokenizer, [row], 512, Ledger("t"))[0]
    longest = len(whole["prompt_ids"] + whole["rejected_ids"])
    cut = encode_pairs(tokenizer, [row], longest - 1, ledger)[0]
    assert len(cut["prompt_ids"]) < len(whole["prompt_ids"]) and ledger.notes["turns_cut"] == 1
    assert (cut["chosen_ids"], cut["rejected_ids"]) == (whole["chosen_ids"], whole["rejected_ids"])
    with pytest.raises(InputError, match="1 too_long"):
        encode_pairs(tokenizer, [row], longest - 1, ledger, "refuse")


@pytest.mark.parametrize("row, message", [
    ({"prompt": "Hello", "chosen": "Ahoy"}, "has no rejected"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "chosen": [GOOD], "rejected": [BAD]}, "must be text"),
    ({"messages": [ASK, GOOD], "chosen": "Ahoy", "rejected": "Hi"}, "second assistant message in a row"),
    ({"messages": [ASK], "chosen": ASK, "rejected": "Hi"}, "second user message in a row|does not end"),
    ({"chosen": "Ahoy", "rejected": "Hi"}, "has role assistant where another is due"),
])
def test_a_row_that_is_no_pair_is_named(base, tmp_path, row, message):
    tokenizer = load(base, "none", dtype="float32", device="cpu").tokenizer
    with pytest.raises(InputError, match=f"row x: .*({message})|({message})"):
        encode_pairs(tokenizer, [{"id": "x", **row}], 200, Ledger("t"))


def test_ledger_and_usage_account_for_every_pair(base, tmp_path):
    rows, stage = [*make_pairs(2), {**make_pairs(1)[0], "id": "twins", "rejected": make_pairs(1)[0]["chosen"]}], Stage(tmp_path)
    done = dpo(base, rows, stage, **SAME)
    stage.close(len(rows), done["n_rows"])
    assert [one["reason"] for one in stage.ledger.dropped] == ["same"] and stage.usage["trained"] == done["tokens"] > 0


@pytest.mark.parametrize("settings, message", [
    ({"loss_type": "hinge"}, "loss_type: Input should be"),
    ({"label_smoothing": 0.2}, "label_smoothing: does nothing to sigmoid"),
    ({"reference": "last"}, "reference: Input should be 'start' or 'base'"),
    ({"beta": 0.0}, "beta: Input should be greater than 0"),
])
def test_settings_that_cannot_work_are_refused(base, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        dpo(base, make_pairs(2), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
