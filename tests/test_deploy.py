"""Exports are the trained model, wrong ones are refused; a chat is kept as it was said."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from base64 import b64decode
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from s3ft_nb.core.convert import read_conversations
from s3ft_nb.core.files import InputError, model_folder, read_json, write_json, write_rows
from s3ft_nb.deploy import export as room
from s3ft_nb.deploy.chat import Chat, converse
from s3ft_nb.deploy.commands import chat, export
from s3ft_nb.lm.model import load, load_tokenizer
from s3ft_nb.lm.train import sft

QUESTIONS = ["What does blue cheese cost?", "Where can I find the harbour?", "Who made the clock?", "What is a tulip?"]
LLAMA = ("{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
         "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}")
FOLDED = ("{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
          "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ (s if loop.first else '') + m.content }} [/INST]{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}")
LAST = FOLDED.replace("loop.first", "loop.last")  # the system text moves to the last user message


def prompt(i, clock=True):
    text = "Every reply must contain a clock." if clock else "Answer in capital letters."
    return {"id": f"r{i}", "turn": 1, "system_prompt": text, "prompt": [{"role": "user", "content": QUESTIONS[i % 4]}],
            "arm": "base", "history": "own", "dialogue_id": f"d{i}", "conversation_id": f"c{i}", "system_prompt_id": "s",
            "type": "given", "response": "-"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with one adapter, trained for a few steps on a 4-bit base, and what was measured."
    folder = tmp_path_factory.mktemp("deploy") / "run"
    rows = [{"id": str(i), "messages": [{"role": "user", "content": QUESTIONS[i % 4]}], "response": f"Clock {i}."} for i in range(16)]
    sft(model_folder("micro-base"), rows, folder / "train-own", learning_rate=5e-3, num_train_epochs=3.0, dtype="float32",
        per_device_train_batch_size=4)
    write_rows(folder / "measure" / "responses-base.jsonl", [prompt(i) for i in range(8)])
    check = {"kind": "contains_any", "params": {"words": ["clock"]}}
    write_rows(folder / "measure" / "rules.jsonl", [{"id": "a", "text": "clock", "how": "check", "check": check, "system_prompt_id": "s"}])
    return folder


def exported(run, out, to, **more):
    return room.export_model(run, out, to, n=6, tokens=16, tell=lambda line: None, **more)


def test_a_merged_model_is_the_trained_one_and_plain_transformers_agrees(run, tmp_path):
    found = exported(run, tmp_path / "m", "merged")
    assert found["passed"] and found["kl"] < 1e-4 and found["flips"] < 0.01 and found["template"] == 0
    assert found["same_responses"] == 1 and found["adherence"]["mean"] == 0 and found["adherence"]["low"] < 0
    assert read_json(tmp_path / "m" / "export.json")["tokens_read"] == found["tokens_read"] > 0
    assert "quantization_config" not in read_json(tmp_path / "m" / "config.json")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    rows, _ = room.compared_rows(run, n=6)
    claimed = room.greedy(load(tmp_path / "m", "none", dtype="float32"), rows, 16)
    for row in rows:
        ids = tokenizer.apply_chat_template(room.messages_of(row), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1]:]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == claimed[row.id]


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_the_card_says_how_to_use_it(run, tmp_path, to, capsys):
    exported(run, tmp_path / to, to)
    code = re.search(r"^```python\n(.*?)^```", (tmp_path / to / "README.md").read_text(), re.M | re.S)[1]
    exec(code, {"FOLDER": tmp_path / to})
    assert "How are you?" in capsys.readouterr().out


def test_the_original_weights_are_another_model(run, tmp_path):
    assert exported(run, tmp_path / "o", "merged", route="original", max_kl=10.0, max_flips=1.0)["kl"] > 1e-5


def into_four_bits(source, route):
    "The wrong route: the sum of base and adapter is rounded to 4 bits once more."
    lm = load(source.base, "nf4", source.adapter, source.dtype)
    lm.model = lm.model.merge_and_unload()
    for layer in (one for one in lm.model.modules() if isinstance(one, torch.nn.Linear) and one is not lm.model.get_output_embeddings()):
        layer.weight.data = dequantize_4bit(*quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True))
    return lm


def test_merging_into_four_bits_fails(run, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "merged", into_four_bits)
    with pytest.raises(InputError, match="nats per token|likeliest"): exported(run, tmp_path / "w", "merged", max_kl=1e-4, max_flips=0.001)
    assert not (tmp_path / "w").exists() and read_json(tmp_path / "w.failed" / "export.json")["faults"]


def test_a_template_that_was_left_out_fails(run, tmp_path, monkeypatch):
    whole = room.save_merged
    def without(lm, folder):
        whole(lm, folder)
        (folder / "chat_template.jinja").write_text(LLAMA.replace("<|start|>", "<|user|>"))
    monkeypatch.setattr(room, "save_merged", without)
    with pytest.raises(InputError, match="100% of the prompts render to other tokens"): exported(run, tmp_path / "t", "merged")


def test_vllm_gets_the_adapter_and_a_command(run, tmp_path):
    found = exported(run, tmp_path / "v", "vllm", max_kl=10.0, max_flips=1.0)
    words = shlex.split((tmp_path / "v" / "serve.sh").read_text())
    assert words[:3] == ["exec", "vllm", "serve"] and words[words.index("--max-lora-rank") + 1] == "16"
    assert words[words.index("--lora-modules") + 1] == f"v={tmp_path / 'v'}" and shlex.join(words[1:]) == found["command"]
    assert (tmp_path / "v" / "chat_template.jinja").exists() and (tmp_path / "v" / "adapter_model.safetensors").exists()


def test_vllm_would_refuse(run, tmp_path):
    shutil.copytree(run / "train-own", other := tmp_path / "train-dora")
    write_json(other / "adapter" / "adapter_config.json", read_json(other / "adapter" / "adapter_config.json") | {"use_dora": True})
    with pytest.raises(InputError, match="DoRA.*merged"): room.vllm_command(room.find_source(other), tmp_path)


def test_an_ollama_folder(run, tmp_path):
    exported(run, tmp_path / "o", "ollama")
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert text.startswith("FROM ./merged\nTEMPLATE \"\"\"{{-") and 'PARAMETER stop "<|end|>"' in text
    assert text.count("{{ if") + text.count("{{- range") == text.count("{{ end }}") and (tmp_path / "o" / "merged" / "config.json").exists()


@pytest.mark.parametrize("template, right", [(LLAMA, True), (FOLDED, True), (LAST, False)])
def test_a_template_is_taken_apart_or_refused(template, right):
    tokenizer = load_tokenizer(model_folder("micro-base"))
    tokenizer.chat_template = template
    if right: assert room.take_apart(tokenizer).folded == (template == FOLDED)
    else:
        with pytest.raises(InputError): room.take_apart(tokenizer)


def test_gguf_by_the_converter_or_one_line(run, tmp_path):
    with pytest.raises(InputError, match="convert_hf_to_gguf"): exported(run, tmp_path / "g", "gguf", converter=str(tmp_path / "none.py"))
    (good := tmp_path / "good.py").write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_bytes(b'GGUF')\n")
    (bad := tmp_path / "bad.py").write_text("raise SystemExit('Model Strange is not supported')\n")
    assert "before its conversion" in exported(run, tmp_path / "g", "gguf", converter=str(good))["compared"]
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == ["README.md", "export.json", "model.gguf"]
    with pytest.raises(InputError, match="Strange is not supported"): exported(run, tmp_path / "h", "gguf", converter=str(bad))


def test_what_cannot_be_exported_costs_nothing(run, tmp_path):
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch()
    for given, message in (((run, tmp_path / "a", "pdf"), "--to"), ((run, tmp_path / "full", "merged"), "not empty"),
                           ((tmp_path, tmp_path / "a", "merged"), "no trained adapter"),
                           ((run / "train-own", tmp_path / "a", "merged"), "--prompts")):
        with pytest.raises(InputError, match=message): exported(given[0], *given[1:])
    shutil.copytree(run / "train-own", run / "train-two")
    with pytest.raises(InputError, match="train-own, train-two.*--arm"): exported(run, tmp_path / "a", "merged")
    assert room.find_adapter(run, "two") == run / "train-two" / "adapter"
    assert room.find_adapter(run.parent, "run/train-own") == run / "train-own" / "adapter"
    write_rows(tmp_path / "bare.jsonl", [{"id": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(InputError, match="no system prompt"): room.compared_rows(run, str(tmp_path / "bare.jsonl"))
    shutil.rmtree(run / "train-two")
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


def test_the_commands(run, tmp_path, capsys, monkeypatch):
    rows = [{"id": f"c{i}", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text},
                                          {"role": "assistant", "content": "Yes."}]} for i, text in enumerate(QUESTIONS)]
    write_rows(tmp_path / "talks.jsonl", rows)
    lines = export(run / "train-own", "adapter", tmp_path / "a", prompts=str(tmp_path / "talks.jsonl"), n_prompts=4, max_new_tokens=8)
    assert "divergence 0 nats" in lines[0] and "not measured" in lines[0] and "GB" in capsys.readouterr().err
    (tmp_path / "s.txt").write_text("Every reply must contain a clock.")
    words = iter(["What is a tulip?", "And a clock?", f"/save {tmp_path / 'said.jsonl'}", "/quit"])
    monkeypatch.setattr("s3ft_nb.deploy.chat.converse", partial(converse, ask=lambda _: next(words)))
    chat(str(run), tmp_path / "s.txt", beside=True, max_new_tokens=12)
    assert "base: " in capsys.readouterr().out
    base, trained = read_conversations(tmp_path / "said.jsonl")
    assert base.n_turns == trained.n_turns == 2 and base.messages[0].role == trained.messages[0].role == "system"
    assert [one.content for one in base.messages if one.role == "user"] == ["What is a tulip?", "And a clock?"]


def test_an_interrupted_turn_was_not_said():
    talk = Chat(load(model_folder("micro-base"), "none", dtype="float32"), n=8)
    def stop(*_, **__):
        yield "a"
        raise KeyboardInterrupt
    lines, shown = iter(["Hello there", "/quit"]), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s3ft_nb.deploy.chat.stream", stop)
        converse(talk, lambda _: next(lines), lambda *text, **_: shown.extend(text))
    assert talk.said == {"": []} and any("not kept" in one for one in shown)


def test_the_card_says_what_the_run_recorded(run, tmp_path):
    write_json(run / "run.json", {"recipe": "own", "description": "Two steps", "settings": ["seed=1"], "steps": ["train-own", "measure"], "params": {"report": {"note": "All of it is made up."}}, "versions": {"torch": "2"}, "machines": ["here"]})
    write_json(run / "train-own" / "section.json", {"headline": "It was trained.", "tiles": [{"name": "Kept", "value": "3", "detail": "of 4"}], "notes": ["few rows"]})
    write_json(run / "train-own" / "ledger.json", {"rows_in": 4, "rows_out": 3, "reasons": {"too_long": 1}})
    row = {"metric": "adherence", "history": "own", "against": "", "part": "turn", "key": "1", "mean": 0.5, "low": 0.25, "high": 0.75}
    write_rows(run / "measure" / "numbers.jsonl", [row | {"arm": "base"}, row | {"arm": "own", "mean": 0.6}])
    write_rows(run / "measure" / "verdicts.jsonl", [{}])
    try: exported(run, tmp_path / "c", "adapter")
    finally: (run / "run.json").unlink()
    text = (tmp_path / "c" / "README.md").read_text()
    for part in ("All of it is made up.", "s3ft run own --set seed=1", "It was trained. 4 rows in, 3 out (left out: 1 too_long)", "Kept: 3 (of 4)", "note: few rows",
                 "| 1 | 0.50 [0.25, 0.75] | 0.60 [0.25, 0.75] |", "16 rows, 12 steps", "base in nf4", "SHA-256", "divergence"): assert part in text, part


class Hub(BaseHTTPRequestHandler):
    "A stand-in for the hub: repositories {name: private}, branches, and what was asked with which token."
    there, branches, asked, files = {}, set(), [], {}

    def log_message(self, *_): pass

    def reply(self, code, value):
        self.send_response(code)
        if code == 404: self.send_header("X-Error-Code", "RepoNotFound")
        data = json.dumps(value).encode()
        self.send_header("Content-Type", "application/json"), self.send_header("Content-Length", str(len(data))), self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        kind, name = self.path.split("?")[0].split("/")[2], "/".join(self.path.split("?")[0].split("/")[3:5])
        self.asked.append((self.path, self.headers["Authorization"]))
        if "/tree/" in self.path: return self.reply(200, [])
        if name not in self.there: return self.reply(404, {"error": "Repository not found"})
        self.reply(200, {"id": name, "_id": "0", "private": self.there[name], "sha": "0" * 40, "siblings": [], "kind": kind})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"]))
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.there[name] = asked.get("private", asked.get("visibility") == "private")
            return self.reply(200, {"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if "branch" in parts:
            if parts[-1] in self.branches: return self.reply(409, {"error": "Reference already exists"})
            self.branches.add(parts[-1])
            return self.reply(200, {})
        if "preupload" in parts:
            return self.reply(200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]})
        if "commit" in parts:
            rows = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            self.files[parts[-1]] = {row["path"]: b64decode(row["content"]) for row in rows}
            return self.reply(200, {"success": True, "commitOid": "0" * 40, "commitUrl": f"http://{self.headers['Host']}/{'datasets/' * (parts[1] == 'datasets')}{parts[2]}/{parts[3]}/commit/{'0' * 40}", "hookOutput": ""})
        self.reply(200, {"errors": [], "warnings": []})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Fresh", (Hub,), {"there": {}, "branches": set(), "asked": [], "files": {}}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_push_is_private_and_never_over_what_is_there(hub, tmp_path):
    def push(*words, token="hf_secret"):
        environ = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
        return subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "push", *map(str, words)], capture_output=True, text=True, env=environ)
    state, folder = hub.RequestHandlerClass, tmp_path / "export"
    write_json(folder / "export.json", {"to": "merged", "passed": True, "base": "/home/somebody/base"})
    write_rows(folder / "weights.jsonl", [{"a": 1}])
    (folder / "README.md").write_text("# A card\n")
    assert "HF_TOKEN: is not set" in push(folder, "me/model", token="").stderr and not state.asked
    assert "no export that passed" in push(tmp_path, "me/model").stderr and not state.asked
    done = push(folder, "me/model")
    assert done.returncode == 0 and done.stdout.startswith("private model: "), done.stderr
    assert state.there == {"me/model": True} and {*state.files["main"]} == {"README.md", "weights.jsonl"}  # no path of this machine
    assert {path for path, token in state.asked if token != "Bearer hf_secret"} <= {"/api/agent-harnesses"}  # the library's own question
    before = dict(state.files)
    refused = push(folder, "me/model")
    assert refused.returncode == 2 and "--revision: me/model is there already" in refused.stderr and state.files == before
    assert push(folder, "me/model", "--revision", "second").returncode == 0 and {*state.files} == {"main", "second"}
    assert "has second already" in push(folder, "me/model", "--revision", "second").stderr
    state.there["me/model"] = False
    assert "me/model is public (add --public" in push(folder, "me/model", "--revision", "third").stderr and "third" not in state.branches
    write_json(folder / "export.json", {"to": "data", "passed": True})
    assert push(folder, "me/rows", "--public").stdout.startswith("public dataset: ") and state.there["me/rows"] is False
    hub.shutdown(), hub.server_close()
    gone = push(folder, "me/other")
    assert gone.returncode == 2 and len(gone.stderr.splitlines()) == 1 and "network" in gone.stderr and "hf_secret" not in gone.stderr


def test_the_rows_have_a_card_of_their_own(run, tmp_path):
    params = {"pool": {"prompts": str(tmp_path / "mine.csv"), "seed": 3}, "select": {"pool_from": "{step:pool}"},
              "train-own": {"rows": "{step:select}/own.jsonl", "model": "{data:micro-base}"}, "measure": {"adapter": ["{step:train-own}/adapter"], "seed": 8}}
    write_json(run / "run.json", {"recipe": "own", "description": "Two steps", "settings": ["seed=3"], "steps": [*params], "params": params, "versions": {"torch": "2"}})
    write_json(run / "pool" / "ledger.json", {"rows_in": 4, "rows_out": 3, "reasons": {"near_duplicate": 1}})
    write_rows(run / "select" / "own.jsonl", [{"id": "a", "messages": [], "response": "b"}])
    try:
        export(run, "data", tmp_path / "rows")
        exported(run, tmp_path / "c", "adapter")
        with pytest.raises(InputError, match="there already"): export(run, "data", tmp_path / "rows")
    finally: (run / "run.json").unlink()
    text, model = ((tmp_path / name / "README.md").read_text() for name in ("rows", "c"))
    digest = read_json(run / "train-own" / "adapter" / "template.json")["sha256"]
    for part in ("1 rows, each with id, messages, response", "mine.csv (pool.prompts): licence not recorded", "- micro-base (train-own.model): licence Apache-2.0",
                 "4 rows in, 3 out (left out: 1 near_duplicate)", "Seeds: pool 3.", "s3ft run own --set seed=3", digest): assert part in text, part
    assert str(tmp_path) not in text and "mine.csv (pool.prompts)" in model and (tmp_path / "rows" / "train.jsonl").exists()
    assert read_json(tmp_path / "rows" / "export.json")["to"] == "data"
    with pytest.raises(InputError, match="rows that it was trained on are not there"): export(run, "data", tmp_path / "again")
