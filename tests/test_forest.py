"Forest training: losses and gradients against rows read one at a time, refusals, and a kill."

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_train import CHILD
from tiny import tiny_dialogues, tiny_model
from transformers import (BloomConfig, BloomForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM)

from s3ft_nb.core.files import InputError, resource
from s3ft_nb.core.stage import Ledger
from s3ft_nb.lm import forest
from s3ft_nb.lm.dpo import PairSettings, dpo, encode_pairs, make_pair_trainer
from s3ft_nb.lm.forest import branches, grow_tree, mask_for, obstacles, pad_trees, plan_forest, plant
from s3ft_nb.lm.labels import encode_rows
from s3ft_nb.lm.model import load
from s3ft_nb.lm.train import Settings, make_settings, make_trainer, sft

PLAIN = {"quantization": "none", "dtype": "float32", "device": "cpu"}


def turns_of(n=3, n_turns=3):
    "A row for each turn of each conversation."
    return [{"id": f"{i}-{turn}", "messages": messages[: 2 + 2 * turn], "response": f"Aye, sailor, {turn} it is. " * (1 + turn % 2)}
            for i, messages in enumerate(tiny_dialogues(n, n_turns=n_turns)) for turn in range(n_turns)]


def questions(n=3):
    "Three questions about each of n responses, as a judge is asked."
    return [{"id": f"{row['id']}-{what}", "messages": [*row["messages"], {"role": "assistant", "content": row["response"]}, {
                "role": "user", "content": f"Is it {what}? Answer with one letter."}], "response": answer}
            for row in turns_of(n, 1) for what, answer in {"good": "A", "short": "B", "polite": "A"}.items()]


def pairs_of(*size):
    return [{"id": row["id"], "messages": row["messages"], "chosen": row["response"], "rejected": "It is cold today."} for row in turns_of(*size)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(home / kind, kind) for kind in ("llama", "qwen3", "gemma")}


def trainer_of(lm, rows, folder, kind=None, batch=6, **values):
    "(trainer as `fit` makes it, with an adapter that does something; encoded rows)."
    settings = make_settings({**PLAIN, "packing": "forest", "per_device_train_batch_size": batch, **values}, kind or Settings)
    encoded = (encode_pairs if kind else encode_rows)(lm.tokenizer, rows, 512, Ledger("t"))
    groups, _, size = plan_forest(lm, encoded, batch)
    settings = settings.model_copy(update={"per_device_train_batch_size": size})
    trainer = (make_pair_trainer if kind else make_trainer)(lm, encoded, [*range(len(groups))], settings, folder, groups=groups)
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(weight, std=0.02)
    return trainer, encoded, [i for group in groups[:size] for i in group]


def logprob(model, ids, labels):
    "Sum of a row's learnt tokens, with gradient, the row alone."
    logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return torch.stack([logits[at - 1, label] for at, label in enumerate(labels) if at and label != -100])


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])


def require_same(trainer, expected):
    "Loss and gradient of the trainer's first batch are those expected, the gradient relative to its length."
    model = trainer.model.eval()  # no dropout in these models; gradients flow all the same
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(model, batch)
    other = expected(model)
    assert loss.item() == pytest.approx(other.item(), rel=1e-5, abs=1e-5)
    found, wanted = gradient(model, loss), gradient(model, other)
    assert float(wanted.norm()) > 1e-3 and float((found - wanted).norm() / wanted.norm()) < 1e-5


def mean_loss(encoded, used):
    def of(model):
        learnt = torch.cat([logprob(model, encoded[i]["input_ids"], encoded[i]["labels"]) for i in used])
        return -learnt.mean()
    return of


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rows", [turns_of, questions])
def test_loss_and_gradient_are_those_of_the_rows(models, tmp_path, kind, rows):
    trainer, encoded, used = trainer_of(load(models[kind], "none", dtype="float32", device="cpu"), rows(), tmp_path)
    assert len(used) >= 6 and len(grow_tree([encoded[i]["input_ids"] for i in used]).ids) < 0.7 * sum(len(encoded[i]["input_ids"]) for i in used)
    require_same(trainer, mean_loss(encoded, used))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("loss, weight", [("sigmoid", 0.0), ("ipo", 0.5)])
def test_loss_of_pairs_is_that_of_the_rows(models, tmp_path, kind, loss, weight):
    lm = load(models[kind], "none", dtype="float32", device="cpu")
    trainer, encoded, used = trainer_of(lm, pairs_of(2, 3), tmp_path, PairSettings, 3, beta=0.5, loss_type=loss, sft_weight=weight)

    def expected(model):
        sides = [[logprob(model, *side) for side in branches(encoded[i])] for i in used]
        with torch.no_grad(), model.disable_adapter(): base = [[logprob(model, *side) for side in branches(encoded[i])] for i in used]
        take = torch.mean if loss == "ipo" else torch.sum
        margins = torch.stack([take(c - c0) - take(r - r0) for (c, r), (c0, r0) in zip(sides, base)])
        preferred = (margins - 1 / (2 * 0.5)) ** 2 if loss == "ipo" else -torch.nn.functional.logsigmoid(0.5 * margins)
        return preferred.mean() - weight * torch.cat([c for c, _ in sides]).mean()

    require_same(trainer, expected)


def test_on_four_bit_weights(tmp_path):
    lm = load(resource("data", "micro-base"), "nf4", dtype="float32", device="cpu")
    trainer, encoded, used = trainer_of(lm, turns_of(1) + questions(1), tmp_path, batch=6, quantization="nf4")
    require_same(trainer, mean_loss(encoded, used))


def test_pairs_on_four_bit_weights(tmp_path):
    lm = load(resource("data", "micro-base"), "nf4", dtype="float32", device="cpu")
    trainer, encoded, used = trainer_of(lm, pairs_of(1, 3), tmp_path, PairSettings, 3, quantization="nf4", beta=0.5)

    def expected(model):
        sides = [[logprob(model, *side).sum() for side in branches(encoded[i])] for i in used]
        with torch.no_grad(), model.disable_adapter(): base = [[logprob(model, *side).sum() for side in branches(encoded[i])] for i in used]
        return -torch.stack([torch.nn.functional.logsigmoid(0.5 * (c - c0 - r + r0)) for (c, r), (c0, r0) in zip(sides, base)]).mean()

    require_same(trainer, expected)


def test_a_training_takes_the_steps_of_one_on_rows(models, tmp_path):
    "Where a step holds all rows it holds the same rows in both ways; then every loss on the way is the same."
    same = {**PLAIN, "per_device_train_batch_size": 9, "num_train_epochs": 4, "learning_rate": 1e-2}
    ways = {"none": {}, "forest": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}}
    done = {packing: sft(models["qwen3"], turns_of(), tmp_path / packing, packing=packing, **{**same, **more}) for packing, more in ways.items()}
    assert [one["loss"] for one in done["forest"]["loss"]] == pytest.approx([one["loss"] for one in done["none"]["loss"]], abs=2e-4)
    assert done["none"]["loss"][-1]["loss"] < done["none"]["loss"][0]["loss"] - 0.5
    for name in ("supervised_tokens", "n_rows", "steps", "trainable_parameters"): assert done["forest"][name] == done["none"][name]
    assert done["forest"]["tokens"] < 0.7 * done["none"]["tokens"]
    paired = {**same, "per_device_train_batch_size": 6, "num_train_epochs": 2, "beta": 0.5}
    done = {packing: dpo(models["qwen3"], pairs_of(2), tmp_path / f"{packing}-pairs", packing=packing, **paired) for packing in ("none", "forest")}
    for name in ("loss", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert [one[name] for one in done["forest"]["loss"]] == pytest.approx([one[name] for one in done["none"]["loss"]], abs=2e-3)


def test_settings_of_before_keep_their_claim(models, tmp_path):
    done = sft(models["llama"], turns_of(1), tmp_path / "a", **PLAIN)
    assert sft(models["llama"], turns_of(1), tmp_path / "a", packing="none", **PLAIN) == done
    with pytest.raises(InputError, match="belongs to a training with other rows, model or settings"):
        sft(models["llama"], turns_of(1), tmp_path / "a", packing="forest", **PLAIN)
    with pytest.raises(InputError, match="packing: Input should be 'none' or 'forest'"): make_settings({"packing": "bfd"})


rows_of_ids = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=9)


@given(rows_of_ids)
@hypothesis_settings(deadline=None, max_examples=80)
def test_a_tree_holds_its_rows_and_nothing_else(rows):
    tree = grow_tree(rows)
    assert [[tree.ids[at] for at in path] for path in tree.paths] == rows
    assert len(tree.ids) == len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})  # each beginning once
    for row, path in zip(rows, tree.paths):
        for n, q in enumerate(path):
            assert [k for k in range(len(tree.ids)) if k <= q < tree.end[k]] == path[: n + 1] and tree.depth[q] == n


@given(rows_of_ids, st.integers(3, 20), st.integers(1, 5))
@hypothesis_settings(deadline=None, max_examples=80)
def test_groups_hold_every_row_once_within_the_limits(rows, limit, most):
    groups = plant(rows, limit, most, 8)
    assert sorted(i for group in groups for i in group) == [*range(len(rows))]
    for group in groups: assert len(group) == 1 or len(group) <= most and len(grow_tree([rows[i] for i in group]).ids) <= limit


def test_learnt_tokens_are_those_of_the_labels(models):
    lm = load(models["qwen3"], "none", dtype="float32", device="cpu")
    encoded = encode_rows(lm.tokenizer, turns_of(), 512, Ledger("t"))
    ids, labels = [one["input_ids"] for one in encoded], [one["labels"] for one in encoded]
    _, _, tokens, row, number = forest.read_rows_as_trees(lm.model, ids, labels, "cpu")
    assert list(zip(row.tolist(), number.tolist(), tokens.tolist())) == [
        (i, at, label) for i, one in enumerate(labels) for at, label in enumerate(one) if at and label != -100]


def test_block_mask_and_matrix_have_one_meaning(models):
    model = load(models["llama"], "none", dtype="float32", device="cpu").model
    trees = [grow_tree([[1, 2, 3], [1, 2, 4, 5], [1, 6]]), grow_tree([[7, 8], [9]])]
    _, _, end = pad_trees(trees, 128, "cpu")
    masks = {}
    for kind in ("sdpa", "eager", "flex_attention"):
        model.set_attn_implementation(kind)
        masks[kind] = mask_for(model, end)
    at = torch.arange(end.shape[1])
    seen = masks["flex_attention"].mask_mod(torch.arange(2)[:, None, None], 0, at[:, None], at)
    assert end.shape == (2, 128) and torch.equal(seen, masks["sdpa"][:, 0]) and torch.equal(masks["eager"] == 0, masks["sdpa"])
    assert masks["sdpa"].any(-1).all()  # padding sees itself
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="attention flash_attention_2 takes no mask of a tree"): mask_for(model, end)


def small(kind, **more):
    "Values of a small config."
    return kind(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **more)


REFUSED = {
    "sliding attention over 64 tokens, a row has 65": lambda: MistralForCausalLM(small(MistralConfig, sliding_window=64, num_key_value_heads=2, intermediate_size=64)),
    "layers of type linear_attention": lambda: Qwen3NextForCausalLM(small(
        Qwen3NextConfig, layer_types=["linear_attention", "full_attention"], num_experts=2, moe_intermediate_size=32, num_key_value_heads=2, head_dim=32)),
    "positions by ALiBi": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=2)),
    "a balancing loss of experts": lambda: MixtralForCausalLM(small(MixtralConfig, num_local_experts=2, intermediate_size=64, num_key_value_heads=2, router_aux_loss_coef=0.01)),
}


@pytest.mark.parametrize("why", REFUSED)
def test_models_that_cannot_are_refused_by_name(why):
    model = REFUSED[why]()
    assert any(one.startswith(why) for one in obstacles(model, 65)), obstacles(model, 65)
    if "sliding" in why: assert obstacles(model, 64) == []


def test_a_sliding_window_is_refused_before_training_and_fits_short_rows(models, tmp_path):
    with pytest.raises(InputError, match="gemma cannot read rows as a tree: sliding attention over 64 tokens, a row has"):
        sft(models["gemma"], [row | {"messages": row["messages"][1:]} for row in turns_of()], tmp_path / "long", packing="forest", **PLAIN)
    assert not (tmp_path / "long" / "checkpoints").exists()
    lm = load(models["gemma"], "none", dtype="float32", device="cpu")
    rows = [{"id": str(i), "messages": [{"role": "user", "content": "Who?"}], "response": "Aye" * (i + 1)} for i in range(6)]
    trainer, encoded, used = trainer_of(lm, rows, tmp_path / "short")
    require_same(trainer, mean_loss(encoded, used))


def test_a_model_that_reads_otherwise_is_found_before_training(models, tmp_path, monkeypatch):
    "As if a layer did not heed the mask: every branch sees those before it."
    monkeypatch.setattr(forest, "mask_for", lambda model, end: mask_for(model, torch.full_like(end, end.shape[1])))
    monkeypatch.setitem(forest.TOLERANCE, torch.float32, 1e-5)  # random weights hardly look back
    with pytest.raises(InputError, match="a tree differs from its rows by .* nats per token"):
        sft(models["llama"], turns_of(), tmp_path, packing="forest", **PLAIN)


def test_killed_and_resumed_gives_the_same_bytes(models, tmp_path):
    settings = {"packing": "forest", "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "save_steps": 2, "device": "cpu"}
    spec = {"model": str(models["llama"]), "rows": turns_of(4, 2), "whole": str(tmp_path / "whole"), "killed": str(tmp_path / "killed"), "settings": settings,
            "kills": [{"die_at_step": 3}, {"die_in_save": 4}]}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(spec)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, signal.SIGKILL, signal.SIGKILL, 0], done.stderr
    whole, killed = Path(spec["whole"]), Path(spec["killed"])
    for name in sorted(path.name for path in (whole / "adapter").iterdir()):
        assert (whole / "adapter" / name).read_bytes() == (killed / "adapter" / name).read_bytes(), name
    told = [json.loads((folder / "training.json").read_text()) | {"seconds": 0} for folder in (whole, killed)]
    assert told[0] == told[1] and told[0]["steps"] == 6
