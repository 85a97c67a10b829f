"""How fast conversations are encoded for training, and whether memory grows with their number.

usage: python tests/benchmarks/bench_template.py [--rows 3000] [--templates llama3 qwen3 gptoss]
"""

import argparse
import random
import sys
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from templates import USUAL, tokenizer_of

from s3ft_nb.core.stage import Ledger
from s3ft_nb.core.files import resource
from s3ft_nb.lm.doctor import set_policy
from s3ft_nb.lm.labels import encode_rows

WORDS = "the moon is far and the tide comes in when nobody looks at it for long so we wait here by the harbour".split()


def rows(n, n_turns, n_words):
    "Conversations, made as they are asked for."
    rng = random.Random(0)
    say = lambda: " ".join(rng.choices(WORDS, k=n_words))
    for i in range(n):
        talk = [{"role": "system", "content": "Talk like a sailor."}]
        talk += [{"role": role, "content": say()} for _ in range(n_turns) for role in ("user", "assistant")]
        yield {"id": str(i), "messages": talk, "train_on": "last"}


def measure(name, n):
    "Rows per second, tokens per row and growth of memory between a tenth of the rows and all of them, MiB."
    tokenizer = tokenizer_of(name, large=True)
    set_policy(tokenizer)
    process, tokens, at_tenth, began = psutil.Process(), 0, 0, time.perf_counter()
    for i, row in enumerate(rows(n, 8, 24)):
        (one,) = encode_rows(tokenizer, [row], 4096, Ledger("bench"))
        tokens += len(one["input_ids"])
        if i == n // 10: at_tenth = process.memory_info().rss
    seconds = time.perf_counter() - began
    return n / seconds, tokens / n, (process.memory_info().rss - at_tenth) / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--templates", nargs="*", default=list(USUAL))
    given = parser.parse_args()
    for name in given.templates:
        speed, length, growth = measure(name, given.rows)
        print(f"{name:24} {speed:7.0f} conversations of 8 turns and {length:.0f} tokens a second, memory {growth:+.1f} MiB")
