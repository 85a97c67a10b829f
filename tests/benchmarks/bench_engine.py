"""What batching and label scoring gain over the obvious way, as ratios from one run.

usage: python tests/benchmarks/bench_engine.py [--model FOLDER] [--rows 64] [--quantization nf4]
"""

import argparse
import time

import torch

from s3ft_nb.judging.rubric import LETTERS, judge_messages
from s3ft_nb.core.records import Message
from s3ft_nb.core.files import resource
from s3ft_nb.lm.engine import TransformersEngine
from s3ft_nb.lm.model import quiet
from s3ft_nb.lm.model import load
from s3ft_nb.lm.labels import stop_ids
from s3ft_nb.lm.template import prompt_ids

WORDS = 6  # Tokens of a label in words, as the paper's judge writes it ("good response", "context mismatch" …)
ASK = [
    "What should I cook in winter?",
    "And in summer?",
    "How far is the moon?",
    "Can you tell me how to grow tomatoes on a small balcony?",
]


def requests(n):
    "Prompts of one to three turns."
    rows = []
    for i in range(n):
        messages = [{"role": "system", "content": f"Talk like a sailor who has seen {i} storms."}]
        for turn in range(i % 3):
            messages += [
                {"role": "user", "content": ASK[(i + turn) % len(ASK)]},
                {"role": "assistant", "content": "That depends on the weather, my friend."},
            ]
        rows.append({"id": str(i), "messages": messages + [{"role": "user", "content": ASK[(i + 3) % len(ASK)]}]})
    return rows


def judgements(rows):
    "The requests a discriminator gets for replies to these prompts."
    made = []
    for row in rows:
        system, *prompt = [Message(**one) for one in row["messages"]]
        asked = judge_messages(system.content, prompt, "Arr, that depends on the weather, my friend.")
        made.append({"id": row["id"], "messages": asked})
    return made


def timed(work):
    "(result, seconds), the better of two."
    best = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return result, best


def one_at_a_time(lm, rows, max_new_tokens, min_new_tokens=0):
    "Tokens written by the library's `generate`, one prompt after the other."
    written, stops = 0, stop_ids(lm.tokenizer)
    for row in rows:
        ids = torch.tensor([prompt_ids(lm.tokenizer, row["messages"], lm.policy)], device=lm.device)
        with torch.inference_mode(), quiet():
            out = lm.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                eos_token_id=stops,
                pad_token_id=lm.tokenizer.pad_token_id,
            )
        written += out.shape[1] - ids.shape[1]
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    given = parser.parse_args()
    lm = load(given.model or resource("data", "micro-base"), given.quantization)
    rows = requests(given.rows)
    engine = TransformersEngine(lm, max_new_tokens=given.max_new_tokens)
    label = TransformersEngine(lm, max_new_tokens=2, temperature=0)
    judged, few = judgements(rows), max(1, given.rows // 8)
    engine.generate(rows[:4], seed=0)  # the first call pays for everything lazy

    replies, seconds = timed(lambda: engine.generate(rows, seed=0))
    batched = sum(one["tokens"] for one in replies) / seconds
    written, seconds = timed(lambda: one_at_a_time(lm, rows[:few], given.max_new_tokens))
    single = written / seconds
    scored = given.rows / timed(lambda: label.score(judged, list(LETTERS.values())))[1]
    written_out = given.rows / timed(lambda: label.generate(judged, seed=0))[1]
    letter = few / timed(lambda: one_at_a_time(lm, judged[:few], 2, 2))[1]
    words = few / timed(lambda: one_at_a_time(lm, judged[:few], WORDS, WORDS))[1]

    print(f"{lm.name}, {given.quantization}, {lm.dtype}, {lm.device}, {torch.get_num_threads()} threads, {given.rows} rows")
    print(f"generate, batched            {batched:9.0f} tokens/s")
    print(f"generate, one at a time      {single:9.0f} tokens/s   ratio {batched / single:.1f}")
    print(f"label, scored in batches     {scored:9.1f} rows/s")
    print(f"label as letter, in batches  {written_out:9.1f} rows/s     ratio {scored / written_out:.1f}")
    print(f"label as letter, one by one  {letter:9.1f} rows/s     ratio {scored / letter:.1f}")
    print(f"label in words, one by one   {words:9.1f} rows/s     ratio {scored / words:.1f}")


if __name__ == "__main__":
    main()
