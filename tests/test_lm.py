"""Rooms of the lm floor against several architectures, hostile text and broken folders."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from tiny import DIALECTS, LINES, tiny_dialogues, tiny_model

from s3ft_nb.core.files import InputError
from s3ft_nb.core.stage import file_hash
from s3ft_nb.lm import engine as engines
from s3ft_nb.lm.http import EngineError
from s3ft_nb.lm.labels import stop_ids
from s3ft_nb.lm.model import load, model_hash, weights_hash
from s3ft_nb.lm.template import chat_template, control_tokens, prompt_ids
from s3ft_nb.run.plan import folder_size

POLICY = {"llama": "native", "qwen3": "native", "gemma": "first_user"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: tiny_model(tmp_path_factory.mktemp(kind) / kind, kind) for kind in DIALECTS}


@pytest.fixture(scope="session")
def lms(folders):
    return {kind: load(folder, quantization="none", dtype="float32", device="cpu") for kind, folder in folders.items()}


# ---- model


def test_load_refuses_in_one_line(folders, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folders["llama"], broken)
    (broken / "model.safetensors").write_bytes(b"not a tensor")
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["llama"], pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    foreign = tmp_path / "foreign"
    shutil.copytree(folders["llama"], foreign)
    (foreign / "config.json").write_text('{"model_type": "nobody", "auto_map": {"AutoConfig": "evil.Config"}}')
    mute = tmp_path / "mute"
    shutil.copytree(folders["llama"], mute)
    (mute / "chat_template.jinja").unlink()
    cut = tmp_path / "cut"
    shutil.copytree(folders["llama"], cut)
    (cut / "config.json").write_text((cut / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    cases = {
        tmp_path / "nowhere": "no such model folder",
        "./no/such/model": "no such model folder",
        broken: "cannot load the model",
        pickled: "no safetensors",
        foreign: "never run here",
        mute: "no chat template",
        cut: "lacks weights",
        tmp_path / "torn": "config.json",
    }
    for path, said in cases.items():
        with pytest.raises(InputError) as caught:
            load(path, quantization="none")
        assert said in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_hub_name_without_a_network_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="hub can be reached"):
        load("s3ft-nb/there-is-no-such-model")


def test_loading_is_silent(folders, capfd):
    load(folders["qwen3"])
    out, err = capfd.readouterr()
    assert out == "" and err == ""


@pytest.mark.parametrize("kind", DIALECTS)
def test_nf4_is_unpacked_once_on_a_cpu_and_the_same(folders, kind, monkeypatch):
    lm = load(folders[kind], dtype="float32", device="cpu")
    assert lm.policy.system == POLICY[kind] and lm.tokenizer.padding_side == "left"
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=0))  # no room to unpack
    packed, plain = (load(folders[kind], quantization, dtype="float32", device="cpu") for quantization in ("nf4", "none"))
    assert [type(one.model.model.layers[0].mlp.up_proj).__name__ for one in (packed, lm)] == ["Linear4bit", "Linear"]
    ids = torch.tensor([prompt_ids(lm.tokenizer, tiny_dialogues(1)[0])])
    logits = [one.model(ids).logits for one in (packed, lm, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_copies_of_the_process_give_the_same_rows(folders, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    alone, beside = (engines.make_engine("transformers", str(folders["llama"]), batch_size=2, max_new_tokens=6, **how) for how in ({"copies": 1}, {}))
    assert (alone.copies, beside.copies) == (1, 2)
    talks = [{"id": str(i), "thread": str(i), "messages": messages, "pieces": True} for i, messages in enumerate(tiny_dialogues(7))]
    for turn in range(2):  # the second continues the dialogues, which the copies have kept
        said, again = alone.generate(talks, turn), beside.generate(talks, turn)
        assert said == again
        talks = [one | {"messages": [*one["messages"], {"role": "assistant", "content": row["text"] or "…"}, {"role": "user", "content": "And then?"}]}
                 for one, row in zip(talks, said)]
    assert alone.score(talks, ["A", "B"]) == beside.score(talks, ["A", "B"])
    given = [one | {"response": "Ahoy" * (1 + i)} for i, one in enumerate(talks)]
    assert alone.likelihood(given) == beside.likelihood(given)
    assert beside.pools and not alone.pools
    pids = [pid for pool in beside.pools for pid in pool._processes]
    del beside  # copies go with their engine
    end = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)): assert time.monotonic() < end


def test_a_copy_that_dies_is_an_error_with_a_remedy(folders):
    engine = engines.make_engine("transformers", str(folders["llama"]), batch_size=2, max_new_tokens=4, copies=2)
    requests = [{"id": str(i), "messages": messages} for i, messages in enumerate(tiny_dialogues(6))]
    before = engine.generate(requests)
    for pool in engine.pools: [os.kill(pid, 9) for pid in pool._processes]
    with pytest.raises(EngineError, match="a copy of the process died.*OMP_NUM_THREADS=1"): engine.generate(requests)
    assert engine.generate(requests) == before  # by new ones


def test_copies_end_with_their_process(folders, tmp_path):
    code = ("import os, sys, time\nfrom s3ft_nb.lm.engine import make_engine\n"
            "engine = make_engine('transformers', sys.argv[1], batch_size=1, max_new_tokens=4, copies=2)\n"
            "engine.generate([{'id': str(i), 'messages': [{'role': 'user', 'content': 'Ahoy'}]} for i in range(4)])\n"
            "print(*[pid for pool in engine.pools for pid in pool._processes], flush=True)\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(folders["llama"])], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(map(psutil.pid_exists, pids))
    process.kill(), process.wait()
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids): assert time.monotonic() < end


def test_adapter_changes_replies_and_brings_its_tokenizer(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = load(folders["llama"], quantization="none", dtype="float32", device="cpu")
    torch.manual_seed(0)
    tuned = get_peft_model(base.model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "run" / "adapter")
    request = [{"id": "a", "messages": tiny_dialogues(1)[0]}]
    plain = load(folders["llama"], quantization="none", dtype="float32", device="cpu")
    tuned = load(folders["llama"], quantization="none", adapter=tmp_path / "run" / "adapter", dtype="float32", device="cpu")
    scores = [engines.TransformersEngine(lm).score(request, ["A", "B"])[0]["logprobs"] for lm in (plain, tuned)]
    assert not np.allclose(*scores, atol=1e-3)
    assert tuned.name == "llama+run/adapter"
    with pytest.raises(InputError, match="base as the model"):
        load(tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match="was trained on"):
        load(folders["gemma"], quantization="none", adapter=tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"xx")
    with pytest.raises(InputError, match="cannot load the adapter"):
        load(folders["llama"], quantization="none", adapter=tmp_path / "run" / "adapter")


def test_model_hash_follows_every_file(folders, tmp_path):
    copy = shutil.copytree(folders["llama"], tmp_path / "copy")
    assert model_hash(copy) == model_hash(folders["llama"])
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert model_hash(copy) != model_hash(folders["llama"])


# ---- engine


def alike(rows):
    "Rows without the one figure that depends on the batch."
    return [{name: value for name, value in row.items() if name != "cached_tokens"} for row in rows]


def ragged(n=7, n_turns=(1, 2, 3)):
    return [
        {"id": f"r{i}", "messages": tiny_dialogues(n, n_turns[i % len(n_turns)])[i]} for i in range(n)
    ]  # up to about 200 tokens, well over the sliding window of the tiny Gemma


@pytest.mark.parametrize("kind", DIALECTS)
def test_greedy_replies_are_those_of_generate(lms, kind):
    lm, requests = lms[kind], ragged()
    ours = engines.TransformersEngine(lm, batch_size=3, max_new_tokens=10, temperature=0).generate(requests, seed=0)
    stops = stop_ids(lm.tokenizer)
    banned = engines.forbidden(lm, stops).nonzero()[:, 0].tolist()
    for request, reply in zip(requests, ours):
        ids = prompt_ids(lm.tokenizer, request["messages"])
        out = lm.model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=lm.tokenizer.pad_token_id,
            suppress_tokens=banned,
        )[0, len(ids) :]
        assert lm.tokenizer.decode(out, skip_special_tokens=True).strip() == reply["text"]
        assert len(out) == reply["tokens"]


@pytest.mark.parametrize("kind", DIALECTS)
def test_rows_that_end_leave_the_others_alone(lms, kind, monkeypatch):
    "With many stop tokens rows end early at different steps; each reply must still be what it is alone."
    lm, requests = lms[kind], ragged(6)
    _, control = control_tokens(lm.tokenizer, chat_template(lm.tokenizer))
    stops = sorted({lm.tokenizer.eos_token_id} | (set(range(60, 180)) - control))
    monkeypatch.setattr(engines, "stop_ids", lambda tokenizer: stops)
    together = engines.TransformersEngine(lm, batch_size=6, max_new_tokens=12).generate(requests, seed=3)
    alone = engines.TransformersEngine(lm, batch_size=1, max_new_tokens=12).generate(requests, seed=3)
    assert alike(together) == alike(alone)
    assert len({one["tokens"] for one in together}) > 2


@pytest.mark.parametrize("kind", DIALECTS)
def test_scores_are_those_of_a_single_forward_pass(lms, kind):
    lm, requests, labels = lms[kind], ragged(), ["A", "B", "C", "D", "E"]
    scores = engines.TransformersEngine(lm, batch_size=4).score(requests, labels)
    for request, score in zip(requests, scores):
        ids = prompt_ids(lm.tokenizer, request["messages"])
        with torch.inference_mode():
            logits = lm.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        wanted = [lm.tokenizer.convert_tokens_to_ids(label) for label in labels]
        assert np.allclose(score["logprobs"], logits[wanted], atol=1e-4)
        assert abs(score["outside"] + np.exp(score["logprobs"]).sum() - 1) < 1e-5
    assert [one["id"] for one in scores] == [one["id"] for one in requests]


@pytest.mark.parametrize("kind", DIALECTS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_shared_beginning_changes_nothing(folders, kind, quantization, monkeypatch):
    lm = load(folders[kind], quantization, dtype="float32", device="cpu")
    rules = [{"role": "system", "content": " ".join(LINES)}]
    requests = [{"id": one["id"], "messages": rules + one["messages"][1:]} for one in ragged(5)]
    prompts = [prompt_ids(lm.tokenizer, one["messages"]) for one in requests]
    assert (engines.n_shared(lm, prompts) == 0) == (kind == "gemma")
    engine = engines.TransformersEngine(lm, max_new_tokens=6, temperature=0)
    found = engine.score(requests, ["A", "B"]), engine.generate(requests)
    monkeypatch.setattr(engines, "n_shared", lambda *_: 0)
    wanted = engine.score(requests, ["A", "B"]), engine.generate(requests)
    assert alike(found[1]) == alike(wanted[1])
    assert (sum(one["cached_tokens"] for one in found[1]) > 0) == (kind != "gemma")
    for one, other in zip(found[0], wanted[0]):
        assert np.allclose(one["logprobs"], other["logprobs"], atol=1e-4 if quantization == "none" else 1e-2)


@pytest.mark.parametrize("kind", DIALECTS)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_history_that_is_kept_says_the_same_as_one_read_again(lms, kind, temperature):
    def talk(**options):
        engine, said = engines.TransformersEngine(lms[kind], batch_size=3, max_new_tokens=6, temperature=temperature, **options), {}
        for turn in range(3):
            for one in (rows := ragged(5)):
                for text in said.get(one["id"], ()): one["messages"] += [{"role": "assistant", "content": text}, {"role": "user", "content": "And then?"}]
            if turn == 2: rows[0]["messages"][-1]["content"] = "Or so?"  # a changed end is read again
            asked = [{"id": f"{one['id']}-{turn}", "thread": one["id"], "messages": one["messages"]} for one in rows]
            for one, row in zip(rows, engine.generate(asked, seed=turn)): said.setdefault(one["id"], []).append(row["text"] or "…")
        return said, engine.memory
    (kept, memory), (again, _) = talk(), talk(keep_gib=0)
    assert kept == again and (memory is None) == (kind == "gemma")  # whose window would count the padding in between
    if not memory: return
    some, part = talk(keep_gib=sum(side.nbytes for _, layers in memory.rows.values() for pair in layers for side in pair) / 2**31)
    assert some == kept and len(memory.rows) == 5 and 0 < len(part.rows) < 5 and part.room >= 0  # half of it has room


def test_order_and_chance_do_not_depend_on_the_list(lms):
    lm, requests = lms["llama"], ragged(9)
    engine = engines.TransformersEngine(lm, batch_size=4, max_new_tokens=8, temperature=0.8, top_p=0.9)
    replies = {one["id"]: one for one in engine.generate(requests, seed=5)}
    assert list(replies) == [one["id"] for one in requests]
    for one in engine.generate(requests[3:7], seed=5):
        assert alike([one]) == alike([replies[one["id"]]])
    assert engine.generate(requests, seed=6) != list(replies.values())


def test_sampling_follows_the_model(lms):
    "The first tokens of many replies to one prompt are spread as the model's probabilities say."
    lm = lms["llama"]
    messages = tiny_dialogues(1, 1)[0]
    requests = [{"id": str(i), "messages": messages} for i in range(3000)]
    engine = engines.TransformersEngine(lm, batch_size=500, max_new_tokens=1, temperature=0.7)
    prompt = prompt_ids(lm.tokenizer, messages)
    with torch.inference_mode():
        logits = lm.model(torch.tensor([prompt])).logits[0, -1]
    banned = engines.forbidden(lm, stop_ids(lm.tokenizer))
    expected = (logits.masked_fill(banned, -torch.inf) / 0.7).softmax(-1).numpy()
    drawn = np.stack([engines.draws(0, one["id"], prompt, 1) for one in requests])
    first = np.bincount([ids[0] for ids in engines.write(lm, [prompt] * 3000, drawn, 0.7, 1.0)[0]], minlength=len(expected))
    assert 0.5 * np.abs(first / 3000 - expected).sum() < 0.5 * np.sqrt(2 * len(expected) / np.pi / 3000) * 1.5
    assert engine.generate(requests[:2])[0]["tokens"] == 1


def test_text_holds_no_control_tokens(lms):
    lm = lms["llama"]
    replies = engines.TransformersEngine(lm, max_new_tokens=30, temperature=5.0).generate(ragged(20), seed=1)
    assert not any("<|" in one["text"] for one in replies)
    assert {one["finish"] for one in replies} <= {"stop", "length"}


def test_progress_counts_rows_and_tokens(lms):
    class Count:
        rows = tokens = 0

        def update(self, n=1, tokens=0):
            self.rows, self.tokens = self.rows + n, self.tokens + tokens

    count = Count()
    replies = engines.TransformersEngine(lms["llama"], batch_size=4, max_new_tokens=5).generate(ragged(10), progress=count)
    assert (count.rows, count.tokens) == (10, sum(one["tokens"] for one in replies))


def test_no_requests_give_no_replies(lms):
    engine = engines.TransformersEngine(lms["llama"])
    assert engine.generate([]) == [] and engine.score([], ["A", "B"]) == []


# ---- which base, which weights


def adapt(model, out, **options):
    from peft import LoraConfig, get_peft_model
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options))
    wrapped.save_pretrained(out, save_embedding_layers=False)
    return out


def plain(folder):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_base_is_known_by_its_weights(folders, tmp_path):
    adapter, model = adapt(plain(folders["llama"]), tmp_path / "adapter"), plain(folders["llama"])
    other = shutil.copytree(folders["llama"], tmp_path / "other")
    assert load(other, "none", adapter, device="cpu").name == "other+" + "/".join(adapter.parts[-2:])
    next(model.parameters()).data[0, 0] += 1  # one number of one weight
    model.save_pretrained(other)
    with pytest.raises(InputError, match="whose weights are not those of .*other"): load(other, "none", adapter, device="cpu")
    facts = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": str(tmp_path / "gone")}))
    load(other, "none", adapter, device="cpu")  # nobody knows
    (adapter / "template.json").write_text(json.dumps({"base": weights_hash(folders["llama"]), "sha256": file_hash(other / "chat_template.jinja")}))
    shutil.copy(other / "chat_template.jinja", adapter)
    with pytest.raises(InputError, match="weights are not those"): load(other, "none", adapter, device="cpu")  # training wrote it down
    assert load(folders["llama"], "none", adapter, device="cpu")


def test_a_base_in_the_cache_has_its_name_on_the_hub(folders, tmp_path):
    place = shutil.copytree(folders["llama"], tmp_path / "models--sea--sailor-1b" / "snapshots" / "0a1b")
    adapter = adapt(plain(folders["llama"]), tmp_path / "adapter")
    facts = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": "sea/sailor-1b"}))
    assert load(place, "none", adapter, device="cpu").name.startswith("sea/sailor-1b+")


@pytest.mark.parametrize("way", ["embeddings", "rows", "none"])
def test_an_adapter_with_tokens_of_its_own(folders, tmp_path, way):
    from transformers import AutoTokenizer
    tokenizer, model = AutoTokenizer.from_pretrained(folders["llama"]), plain(folders["llama"])
    tokenizer.add_tokens([f"<buoy{i}>" for i in range(1 + model.config.vocab_size - len(tokenizer))])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    new = [len(tokenizer) - 1]
    adapter = adapt(model, tmp_path / "adapter", **{"embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]}, "rows": {"trainable_token_indices": new}, "none": {}}[way])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(InputError, match=r"adapter: the tokenizer has \d+ tokens, more than the model's .*merge the adapter"): load(folders["llama"], "none", adapter, device="cpu")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_that_are_no_numbers_are_refused(folders, tmp_path, quantization):
    model = plain(folders["llama"])
    adapter = adapt(plain(folders["llama"]), tmp_path / "adapter")
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = float("nan")
    model.save_pretrained(shutil.copytree(folders["llama"], tmp_path / "nan"))
    with pytest.raises(InputError, match="nan: weight model.layers.0.mlp.up_proj.weight holds NaN"): load(tmp_path / "nan", quantization, device="cpu")
    from safetensors.torch import load_file, save_file
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight * float("inf") for name, weight in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match="adapter: weight .*lora_A.* holds NaN or infinity"): load(folders["llama"], quantization, adapter, device="cpu")


@pytest.mark.parametrize("odd", [[], None, 3, {"base_model_name_or_path": 7}, {"r": -1}, {"target_modules": 5}, {"peft_type": []}, {"lora_alpha": "many"}])
def test_odd_configurations_are_one_line(folders, tmp_path, odd):
    adapter = adapt(plain(folders["llama"]), tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | odd if isinstance(odd, dict) else odd))
    with pytest.raises(InputError): load(folders["llama"], "none", adapter, device="cpu")
    model = shutil.copytree(folders["llama"], tmp_path / "model")
    odd = json.loads((model / "config.json").read_text()) | {"hidden_size": [64], "num_attention_heads": odd} if isinstance(odd, dict) else odd
    (model / "config.json").write_text(json.dumps(odd))
    with pytest.raises(InputError): load(model, "none", device="cpu")
    folder_size(model)


def test_every_end_that_the_model_declares_ends_a_response(folders, tmp_path):
    folder = shutil.copytree(folders["llama"], tmp_path / "declares")
    tokenizer = load(folder, "none", dtype="float32", device="cpu").tokenizer
    other = tokenizer.convert_tokens_to_ids("<|/head|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, other, 10**7]}))
    lm = load(folder, "none", dtype="float32", device="cpu")
    assert stop_ids(lm.tokenizer) == sorted({tokenizer.eos_token_id, other}) and not engines.forbidden(lm, stop_ids(lm.tokenizer))[other]
