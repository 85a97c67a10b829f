"""One process against a copy of it per core, for the bundled model on a CPU: seconds by the clock, ways in turn, the same rows.

usage: python tests/benchmarks/bench_copies.py [COPIES]   (default: one per core)"""
import sys
import time

from s3ft_nb.core.files import model_folder
from s3ft_nb.core.stage import cores
from s3ft_nb.lm.engine import make_engine

ASK = "What does {} cost?", "Where does {} come from?", "Who loves {}?", "Which season is best for {}?"
THINGS = "the oak", "blue cheese", "the harp", "linen", "the ferry", "corn bread", "marble", "the heron"


def requests(n: int) -> list[dict]:
    "n requests with histories of one to three turns."
    rows = []
    for i in range(n):
        said = [{"role": ("user", "assistant")[at % 2], "content": ASK[(i + at) % 4].format(THINGS[(3 * i + at) % 8])} for at in range(1 + 2 * (i % 3))]
        rows.append({"id": str(i), "messages": [{"role": "system", "content": "Answer in capital letters."}, *said], "response": "IT COSTS TEN COINS."})
    return rows


def main(copies: int, n: int = 512, rounds: int = 3) -> None:
    rows = requests(n)
    prompts = [{key: row[key] for key in ("id", "messages")} for row in rows]
    works = {"generate": lambda engine: engine.generate(prompts), "score": lambda engine: engine.score(prompts, ["A", "B"]), "likelihood": lambda engine: engine.likelihood(rows)}
    engines = {k: make_engine("transformers", str(model_folder("micro-base")), max_new_tokens=32, copies=k) for k in (1, copies)}
    print(f"| what | 1 process, s | {copies} processes, s | ratio | same rows |\n|---|---|---|---|---|")
    for name, work in works.items():
        seconds, found = {k: [] for k in engines}, {}
        for k, engine in engines.items(): work(engine)  # starts the copies
        for _ in range(rounds):
            for k, engine in engines.items():
                began = time.perf_counter()
                found[k] = work(engine)
                seconds[k].append(time.perf_counter() - began)
        one, many = (min(took) for took in seconds.values())
        print(f"| {name} | {one:.2f} | {many:.2f} | {one / many:.2f} | {sum(a == b for a, b in zip(*found.values()))} of {n} |", flush=True)


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else max(cores(), 2))
