"Training: the loss against one computed by hand, kills at any step, and rows nobody asked for."

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import tiny_dialogues, tiny_model
from transformers import AutoTokenizer
from trl import SFTTrainer

from s3ft_nb.core.stage import Ledger, Stage
from s3ft_nb.core.files import InputError
from s3ft_nb.lm import train as room
from s3ft_nb.lm.model import linked_model, load, quiet
from s3ft_nb.lm.template import Policy, prompt_ids, with_policy
from s3ft_nb.lm.train import encode_rows, make_settings, make_trainer, order_of, sft


def make_rows(n=8, system=True):
    "Rows of different lengths."
    return [
        {"id": f"r{i}", "messages": messages, "response": "Aye, sailor, it rains. " * (1 + i % 4)}
        for i, messages in enumerate(tiny_dialogues(n, n_turns=3, system=system))
        for messages in [messages[: 2 + 2 * (i % 3)] if system else messages]
    ]


def losses_of(trainer):
    with quiet():
        trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


def by_hand(model, encoded):
    "Sum of negative log-probabilities and number of labels, one row at a time, from plain logits."
    total, n = 0.0, 0
    for one in encoded:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one["input_ids"]])).logits[0]
        for at, label in enumerate(one["labels"][1:]):
            if label != -100:
                total, n = total - float(logits[at].float().log_softmax(-1)[label]), n + 1
    return total, n


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(home / kind, kind) for kind in ("llama", "qwen3", "gemma")}


def still(**more):
    "Settings under which the model does not move."
    return make_settings({"learning_rate": 0.0, "quantization": "none", "dtype": "float32", "device": "cpu", **more})


def plain(model):
    return load(model, "none", dtype="float32", device="cpu")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("trl", [False, True])
def test_padded_loss_is_the_one_by_hand(models, tmp_path, monkeypatch, kind, trl):
    if trl:
        monkeypatch.setattr(room, "trainer_class", lambda lm: SFTTrainer)
    lm = plain(models[kind])
    encoded = encode_rows(lm.tokenizer, make_rows(), 512, Ledger("train"))
    order = order_of([len(one["input_ids"]) for one in encoded], 4, 1, seed=3)
    config = still(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = make_trainer(lm, encoded, order, config, tmp_path)
    assert trainer.train_dataset["input_ids"][:] == [encoded[i]["input_ids"] for i in order]
    assert trainer.train_dataset["labels"][:] == [encoded[i]["labels"] for i in order]
    losses = losses_of(trainer)
    assert len(losses) == 2
    for step, loss in enumerate(losses):
        total, n = by_hand(trainer.model, [encoded[i] for i in order[4 * step : 4 * step + 4]])
        assert loss == pytest.approx(total / n, abs=1e-5)


def test_all_responses_of_a_conversation_train_as_they_would_alone(models, tmp_path):
    "Where the template is prefix-stable, one row with all responses has the losses of one row per response."
    lm = plain(models["llama"])
    talk = [*tiny_dialogues(1, n_turns=3)[0], {"role": "assistant", "content": "Aye."}]
    together = encode_rows(lm.tokenizer, [{"id": "a", "messages": talk, "train_on": "all"}], 512, Ledger("t"))
    apart = [{"id": f"a{n}", "messages": talk[:n], "train_on": "last"} for n in (3, 5, 7)]
    assert by_hand(lm.model, together) == pytest.approx(by_hand(lm.model, encode_rows(lm.tokenizer, apart, 512, Ledger("t"))), abs=1e-3)


def test_a_base_that_cannot_carry_an_adapter_is_refused(models, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    lm = plain(models["llama"])
    encoded = encode_rows(lm.tokenizer, make_rows(2), 512, Ledger("train"))
    lm.model = MambaForCausalLM(MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=1, state_size=8)).eval()
    with pytest.raises(InputError, match="cannot train llama: .*incompatible with Mamba"):
        make_trainer(lm, encoded, [0, 1], still(), tmp_path / "out")


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=60),
    batch=st.integers(1, 9),
    epochs=st.sampled_from([0.25, 0.5, 1, 1.5, 2, 3]),
    seed=st.integers(0, 3),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_every_row_comes_once_per_epoch(lengths, batch, epochs, seed):
    order = order_of(lengths, batch, epochs, seed)
    counts = [order.count(i) for i in range(len(lengths))]
    assert len(order) == max(1, round(len(lengths) * epochs))
    if epochs == int(epochs):
        assert set(counts) == {int(epochs)}
    assert order == order_of(lengths, batch, epochs, seed)


# One process imports everything once and forks a child for each run, before any of them computes.
CHILD = """
import json, os, signal, sys
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
torch.set_num_threads(1)
from s3ft_nb.lm import train as room

spec = json.loads(sys.argv[1])
step_end, save = room.Watch.on_step_end, room.Watch.on_save

def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)

def run(out, die_at_step=None, die_in_save=None, die_before=None):
    if die_before: setattr(room, die_before, die)
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == die_at_step: die()
        step_end(self, args, state, control, **kwargs)
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == die_in_save: die()
        save(self, args, state, control, **kwargs)
    room.Watch.on_step_end, room.Watch.on_save = on_step_end, on_save
    room.sft(spec["model"], spec["rows"], out, **spec["settings"])

def forked(*args, **kwargs):
    child = os.fork()
    if child == 0:
        try: run(*args, **kwargs)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

codes = [forked(spec["whole"])]
for kill in spec["kills"]: codes.append(forked(spec["killed"], **kill))
codes.append(forked(spec["killed"]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize(
    "settings, kills",
    [
        ({}, [{"die_at_step": 2}, {"die_in_save": 9}, {"die_before": "save_adapter"}]),
        (
            {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "quantization": "none"},
            [{"die_at_step": 8}, {"die_before": "round"}],
        ),
    ],
)
def test_killed_and_resumed_gives_the_same_bytes(models, tmp_path, settings, kills):
    fixed = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 3, "device": "cpu"}
    batch = 2 * settings.get("gradient_accumulation_steps", 1)
    n = 4 * batch - 1  # some rows of each epoch wait for the next
    spec = {
        "model": str(models["llama"]),
        "rows": make_rows(n),
        "whole": str(tmp_path / "whole"),
        "killed": str(tmp_path / "killed"),
        "settings": fixed | settings,
        "kills": kills,
    }
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(spec)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, *[signal.SIGKILL] * len(kills), 0], done.stderr
    whole, killed = Path(spec["whole"]), Path(spec["killed"])
    for name in sorted(path.name for path in (whole / "adapter").iterdir()):
        assert (whole / "adapter" / name).read_bytes() == (killed / "adapter" / name).read_bytes(), name
    told = [json.loads((folder / "training.json").read_text()) for folder in (whole, killed)]
    for one in told:
        del one["seconds"]
    assert told[0] == told[1]
    assert told[0]["steps"] == len(told[0]["loss"]) == math.ceil(3 * n / batch)
    assert sorted(path.name for path in killed.iterdir()) == ["adapter", "training.json"]


def test_recomputing_activations_changes_nothing(models, tmp_path):
    given = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "quantization": "none", "dtype": "float32", "device": "cpu"}
    plain, recomputed = (
        sft(models["qwen3"], make_rows(), tmp_path / str(on), gradient_checkpointing=on, **given)["loss"] for on in (False, True)
    )
    assert [one["loss"] for one in plain] == pytest.approx([one["loss"] for one in recomputed], abs=1e-6)


def test_ledger_and_usage_account_for_every_row(models, tmp_path):
    rows = make_rows(9) + [{"id": "endless", "messages": make_rows(1)[0]["messages"], "response": "word " * 400}]
    lm = plain(models["llama"])
    longest = sorted(len(one["input_ids"]) for one in encode_rows(lm.tokenizer, rows[:9], 512, Ledger("t")))[-1]
    usage = []
    for _ in range(2):  # the second finds the training finished, and reports the same
        stage = Stage(tmp_path)
        done = sft(models["llama"], rows, stage, max_length=longest - 1, per_device_train_batch_size=4, device="cpu")
        stage.close(len(rows), done["n_rows"])
        assert [one["id"] for one in stage.ledger.dropped] == ["endless"] and stage.ledger.notes["history_cut"] >= 1
        usage.append((tmp_path / "usage.json").read_bytes() + (tmp_path / "ledger.json").read_bytes())
    assert usage[0] == usage[1] and stage.usage["trained"] == done["tokens"] > 0


@pytest.mark.parametrize("tracker", ["trackio", "tensorboard", "wandb"])
def test_a_tracker_that_is_not_there_is_one_line(models, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(room, "get_available_reporting_integrations", list)
    with pytest.raises(InputError, match=f"report_to: {tracker} is not installed .pip install {tracker}"):
        sft(models["llama"], make_rows(2), tmp_path / "out", report_to=tracker, device="cpu")
    assert not (tmp_path / "out").exists()


def test_tensorboard_gets_the_loss(models, tmp_path):
    pytest.importorskip("tensorboard")
    sft(models["llama"], make_rows(4), tmp_path, report_to="tensorboard", per_device_train_batch_size=2, device="cpu")
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_template_without_system_role_still_trains_on_the_system_prompt(models):
    lm = load(models["gemma"], "none", dtype="float32", device="cpu")
    one = encode_rows(lm.tokenizer, make_rows(1), 512, Ledger("t"))[0]
    assert lm.policy.system == "first_user"
    assert "sailor number 0" in lm.tokenizer.decode(one["input_ids"])


def test_the_template_goes_with_the_adapter(models, tmp_path):
    "Inference renders what training rendered, or says that it cannot."
    lm = load(models["gemma"], "none", dtype="float32", device="cpu")
    mine = linked_model(models["gemma"], with_policy(lm.tokenizer.chat_template, Policy("every_user")), tmp_path / "mine")
    done = sft(mine, make_rows(4), tmp_path / "run", quantization="none", per_device_train_batch_size=4, device="cpu")
    assert done["policy"]["system"] == "every_user"
    adapter = tmp_path / "run" / "adapter"
    tuned = load(mine, "none", adapter=adapter, dtype="float32", device="cpu")
    assert tuned.policy.system == "every_user"
    talk = tiny_dialogues(1, n_turns=2)[0]
    with_library = AutoTokenizer.from_pretrained(adapter).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert with_library == tuned.tokenizer.decode(prompt_ids(tuned.tokenizer, talk)) and with_library.count(talk[0]["content"]) == 2
    (adapter / "chat_template.jinja").write_text((models["gemma"] / "chat_template.jinja").read_text())
    with pytest.raises(InputError, match="is not the template that this adapter was trained under"):
        load(mine, "none", adapter=adapter, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": [], "response": "a"}, "row x: is empty"),
        ({"messages": [{"role": "user", "content": "a"}], "response": ""}, "row x: is blank"),
        ({"messages": [{"role": "bot", "content": "a"}], "response": "b"}, "row x: Input should be"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no response"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}, "row x: ends with the assistant"),
    ],
)
def test_a_wrong_row_is_named_and_nothing_is_written(models, tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        sft(models["llama"], [*make_rows(2), {"id": "x", **row}], tmp_path / "out", device="cpu")
    assert not (tmp_path / "out" / "adapter").exists()
    sft(models["llama"], make_rows(2), tmp_path / "out", device="cpu")  # a refused start does not block the folder


def test_full_disk_is_one_line_and_can_be_resumed(models, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows, given = make_rows(4), {"per_device_train_batch_size": 2, "save_steps": 1, "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(room, "save_adapter", full)
        with pytest.raises(InputError, match="the disk is full"):
            sft(models["llama"], rows, tmp_path, **given)
    with pytest.raises(InputError, match="belongs to a training with other rows"):
        sft(models["llama"], rows, tmp_path, learning_rate=1.0, **given)
    assert sft(models["llama"], rows, tmp_path, **given)["steps"] == 2
    assert sft(models["llama"], rows, Stage(tmp_path, fresh=True), learning_rate=1e-3, **given)["steps"] == 2
