"""What one GPU does with a model of 7 billion parameters: QLoRA by SFT and DPO, generation, scoring; tokens/s and memory.

The weights are random, so nothing is downloaded: speed and memory do not depend on their values.

usage: python tests/benchmarks/bench_gpu.py [--tiny] [--out FOLDER]   (--tiny: a small model, also without a GPU)
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from s3ft_nb.core.files import resource
from s3ft_nb.lm import dpo as preference
from s3ft_nb.lm.engine import make_engine
from s3ft_nb.lm.model import load_tokenizer
from s3ft_nb.lm.train import make_trainer, sft

SHAPES = {  # as Mistral 7B without its window, vocabulary 32,000: 7.24 billion parameters
    False: dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000),
    True: dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048)}
WORDS = "What does the raft cost? The raft costs twenty coins, and that is cheap. "


class Clock(TrainerCallback):
    "Seconds of every optimiser step."
    def __init__(self): self.seconds = []
    def on_step_begin(self, *_, **__): self.began = time.perf_counter()
    def on_step_end(self, *_, **__):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def make_model(folder, tiny):
    "A folder with a model of random weights and the embedded tokenizer; its parameters in billions."
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = LlamaConfig(**SHAPES[tiny], max_position_embeddings=4096, bos_token_id=None, eos_token_id=1, pad_token_id=0, dtype=dtype)
    torch.set_default_dtype(dtype)
    with torch.device(device): model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(str(resource("data", "micro-base")))
    tokenizer.model_max_length = 4096
    tokenizer.save_pretrained(folder)
    return model.num_parameters() / 1e9, tokenizer


def text_of(tokenizer, n):
    "A text of about n tokens."
    return WORDS * max(1, n // len(tokenizer.encode(WORDS)))


def rate(tokens, clock):
    "Tokens per second of the steps after the first, which warms up."
    steps = clock.seconds[1:] or clock.seconds
    return round(tokens / len(clock.seconds) * len(steps) / sum(steps))


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--out", default="")
    options = options.parse_args()
    out, gpu = Path(options.out or tempfile.mkdtemp()), torch.cuda.is_available()
    length, n, quantization = (2048, 16, "nf4") if not options.tiny else (128, 4, "nf4" if gpu else "none")
    folder, found = Path(tempfile.mkdtemp()) / "model", {"card": torch.cuda.get_device_name() if gpu else "no GPU"}
    def publish(name, **values):
        if gpu:
            values["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
        found[name] = values
        print(name, values, flush=True)
        (out / "gpu.json").write_text(json.dumps(found, indent=1))
    out.mkdir(parents=True, exist_ok=True)
    size, tokenizer = make_model(folder, options.tiny)
    publish("model", billions=round(size, 2), tokens_of_a_row=length)
    long, reply = text_of(tokenizer, 3 * length // 4 - 40), text_of(tokenizer, length // 4 - 10)
    messages = lambda i: [{"role": "system", "content": f"Be brief, number {i}."}, {"role": "user", "content": long}]
    clock, common = Clock(), dict(quantization=quantization, max_length=length, gradient_accumulation_steps=2, num_train_epochs=1.0, lora_r=16)
    def timed(make):
        def made(*args, **kwargs):
            trainer = make(*args, **kwargs)
            trainer.add_callback(clock)
            return trainer
        return made
    rows = [{"id": str(i), "messages": messages(i), "response": reply} for i in range(3 * n)]
    done = sft(str(folder), rows, out / "sft", how={"make": timed(make_trainer)}, per_device_train_batch_size=n // 2, **common)
    publish("sft", tokens_per_second=rate(done["tokens"], clock), rows_at_a_time=n // 2, seconds_in_all=done["seconds"])
    def engines(precision):
        engine = make_engine("transformers", str(folder), quantization=precision, max_new_tokens=length // 16, temperature=1.0, batch_size=2 * n)
        asked = [{"id": str(i), "messages": [{"role": "system", "content": f"Number {i}."}, {"role": "user", "content": text_of(tokenizer, length // 8)}]} for i in range(2 * n)]
        engine.generate(asked[:2])
        began = time.perf_counter()
        written = sum(one["tokens"] for one in engine.generate(asked))
        seconds = time.perf_counter() - began
        scored = [{"id": str(i), "messages": messages(i), "response": reply} for i in range(n)]
        began = time.perf_counter()
        read = sum(one["tokens"] + one["prompt_tokens"] for one in engine.likelihood(scored))
        publish(f"engine {precision}", generated_per_second=round(written / seconds), requests_at_a_time=2 * n, scored_per_second=round(read / (time.perf_counter() - began)))
        del engine
    engines(quantization)
    clock.seconds.clear()
    pairs = [{"id": str(i), "prompt": messages(i), "chosen": reply, "rejected": reply[:len(reply) // 2], "level": 1} for i in range(n)]
    preference.make_pair_trainer = timed(preference.make_pair_trainer)
    done = preference.dpo(str(folder), pairs, out / "dpo", per_device_train_batch_size=n // 8 or 1, **common)
    publish("dpo", tokens_per_second=rate(done["tokens"], clock), pairs_at_a_time=n // 8 or 1, seconds_in_all=done["seconds"])
    if quantization != "none": engines("none")


if __name__ == "__main__": main()
