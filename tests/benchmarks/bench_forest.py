"""What training on all turns of conversations costs: rows one by one, TRL's packing of rows, and forests.

usage: python tests/benchmarks/bench_forest.py [--model FOLDER] [--conversations 8] [--turns 3,6,12] [--rounds 3] [--quantization none]

One pass over all rows, forward and backward, in batches of 16 rows; the ways take turns in one process, the least of the rounds
counts, in seconds of this process on the CPU. Prints a table in Markdown, the growth of each way with the turns, and how far losses differ.
"""

import argparse
import platform
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from s3ft_nb.core.files import read_rows, resource, upstream
from s3ft_nb.core.records import Conversation
from s3ft_nb.core.stage import Ledger
from s3ft_nb.lm.forest import plan_forest
from s3ft_nb.lm.labels import encode_rows
from s3ft_nb.lm.model import load
from s3ft_nb.lm.train import make_settings, make_trainer, order_of

BATCH, SYSTEM = 16, "You are a patient teacher. Answer like an old sailor who misses the sea, and never use more than two sentences."


def conversations(n, turns):
    "A row for every turn of n conversations, with the turns before it as they were; messages of the bundled run."
    said = [message.content for one in read_rows(upstream("conversations") / "train.jsonl", Conversation) for message in one.messages if message.role != "system"]
    rows = []
    for i in range(n):
        texts = [said[(2 * turns * i + at) % (len(said) // 2 * 2)] for at in range(2 * turns)]
        messages = [{"role": "system", "content": SYSTEM}, *({"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts))]
        rows += [{"id": f"{i}-{turn}", "messages": messages[: 2 + 2 * turn], "response": f"Aye, number {turn}: {messages[2 + 2 * turn]['content']}"} for turn in range(turns)]
    return rows


def trainer_of(model, rows, packing, quantization):
    "(trainer, tokens that it reads without padding)."
    lm = load(model, quantization, dtype="float32", device="cpu")
    encoded = encode_rows(lm.tokenizer, rows, 2048, Ledger("bench"))
    groups, lengths, size = [[i] for i in range(len(encoded))], [len(one["input_ids"]) for one in encoded], BATCH
    if packing == "forest": groups, lengths, size = plan_forest(lm, encoded, BATCH)
    settings = make_settings({"quantization": quantization, "packing": packing, "per_device_train_batch_size": size})
    order = order_of(lengths, size, 1, 0)
    trainer = make_trainer(lm, encoded, order, settings, tempfile.mkdtemp(), **{"groups": groups} if packing == "forest" else {})
    return trainer, sum(lengths), encoded


def packs(trainer, encoded):
    "Batches as TRL packs them: as many tokens as fit 512, each pack its own sequence."
    data = pack_dataset(Dataset.from_list([{name: one[name] for name in ("input_ids", "labels")} for one in encoded]), 512, "bfd")
    return DataLoader(data, batch_size=1, collate_fn=DataCollatorForLanguageModeling(trainer.processing_class.pad_token_id, padding_free=True))


def once(trainer, batches):
    "(seconds of CPU, sum of losses of all rows) of one pass over the batches."
    trainer.model.train()
    began, total = time.process_time(), 0.0
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
        loss.backward()
        total += float(loss.detach())
    return time.process_time() - began, total


def measure(model, n, turns, rounds, quantization):
    "{way: {tokens, seconds, loss}} at one number of turns."
    rows, found = conversations(n, turns), {}
    trainers = {packing: trainer_of(model, rows, packing, quantization) for packing in ("none", "forest")}
    plain, tokens, encoded = trainers["none"]
    ways = {"rows": (plain, [*plain.get_train_dataloader()], tokens), "TRL bfd": (plain, [*packs(plain, encoded)], tokens),
            "forest": (trainers["forest"][0], [*trainers["forest"][0].get_train_dataloader()], trainers["forest"][1])}
    for _ in range(rounds):
        for name, (trainer, batches, tokens) in ways.items():
            seconds, loss = once(trainer, batches)
            before = found.get(name, {"seconds": float("inf")})
            found[name] = {"tokens": tokens, "seconds": min(before["seconds"], seconds), "loss": loss}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(resource("data", "micro-base")))
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", default="3,6,12")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", default="none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    turns, table = [int(one) for one in args.turns.split(",")], {}
    print("| turns | tokens, rows | tokens, forest | fewer | s, rows | s, TRL bfd | s, forest | rows / forest | bfd / forest | losses differ by |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for n in turns:
        table[n] = found = measure(args.model, args.conversations, n, args.rounds, args.quantization)
        (rows, bfd, forest), least = found.values(), found["rows"]["loss"]
        print(f"| {n} | {rows['tokens']} | {forest['tokens']} | {rows['tokens'] / forest['tokens']:.1f} | {rows['seconds']:.2f} | {bfd['seconds']:.2f} | {forest['seconds']:.2f} "
              f"| {rows['seconds'] / forest['seconds']:.1f} | {bfd['seconds'] / forest['seconds']:.1f} | {max(abs(one['loss'] / least - 1) for one in found.values()):.1e} |", flush=True)
    for way in ("rows", "TRL bfd", "forest"):
        slope = np.polyfit(np.log(turns), np.log([table[n][way]["seconds"] for n in turns]), 1)[0]
        print(f"{way}: seconds grow with turns to the power {slope:.2f}")
    print(f"{args.conversations} conversations, {args.quantization}, 1 thread, torch {torch.__version__}, {platform.machine()}")


if __name__ == "__main__":
    main()
