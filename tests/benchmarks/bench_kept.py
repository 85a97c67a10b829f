"""Dialogues of many turns, history kept or read again at every turn: seconds of processor time, ways in turn, same responses.

usage: python tests/benchmarks/bench_kept.py [TURNS ...]   (default 6 12 20; the bundled model on CPU)"""
import sys
import time

import torch

from s3ft_nb.core.files import model_folder
from s3ft_nb.lm.engine import TransformersEngine
from s3ft_nb.lm.model import load

ASK = "What does {} cost?", "Where does {} come from?", "Who loves {}?", "Which season is best for {}?"
THINGS = "the oak", "blue cheese", "the harp", "linen", "the ferry", "corn bread", "marble", "the heron"


def play(engine, turns: int, dialogues: int) -> tuple[list, float]:  # (responses, seconds)
    "Own history, all dialogues a turn at a time."
    said, began = [[] for _ in range(dialogues)], time.process_time()
    for turn in range(turns):
        requests = []
        for i, mine in enumerate(said):
            asked = [ASK[(i + k) % 4].format(THINGS[(3 * i + k) % 8]) for k in range(turn + 1)]
            messages = [{"role": "system", "content": "Answer in capital letters."}, {"role": "user", "content": asked[0]}]
            for text, user in zip(mine, asked[1:]): messages += [{"role": "assistant", "content": text}, {"role": "user", "content": user}]
            requests.append({"id": f"{i}-{turn}", "thread": str(i), "messages": messages})
        for mine, one in zip(said, engine.generate(requests, seed=turn)): mine.append(one["text"] or "…")
    return said, time.process_time() - began


def main(turns: list[int], dialogues: int = 32, rounds: int = 2) -> None:
    torch.set_num_threads(1)
    lm = load(model_folder("micro-base"))
    ways = {"read again": 0.0, "kept": 1.0}
    print("turns  read again, s  kept, s  ratio  same responses")
    for n in turns:
        found, seconds = {}, {way: [] for way in ways}
        for _ in range(rounds):
            for way, keep in ways.items():
                found[way], took = play(TransformersEngine(lm, 32, 24, 0.7, keep_gib=keep), n, dialogues)
                seconds[way].append(took)
        again, kept = (min(seconds[way]) for way in ways)
        same = sum(a == b for one, two in zip(*found.values()) for a, b in zip(one, two))
        print(f"{n:5}  {again:13.1f}  {kept:7.1f}  {again / kept:5.2f}  {same} of {n * dialogues}")


if __name__ == "__main__": main([int(one) for one in sys.argv[1:]] or [6, 12, 20])
