"""Generation by two Ray workers against one, in turn, each worker with one thread; and what that costs beside this process.

usage: python tests/benchmarks/bench_ray.py [--model FOLDER] [--rows 256] [--rounds 2]     (extra `ray`; two quiet processors)
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # of this process and of each worker

import argparse
import time

import ray
from bench_engine import requests

from s3ft_nb.core.files import resource
from s3ft_nb.core.stage import machine
from s3ft_nb.lm.engine import make_engine


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(resource("data", "micro-base")))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rows, best, found = requests(given.rows), {}, {}
    options = {"quantization": "none", "dtype": "float32", "device": "cpu", "batch_size": 16, "max_new_tokens": 48}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    ways = {"this process": {"kind": "transformers"}, "1 worker": {"kind": "ray", "workers": 1}, "2 workers": {"kind": "ray", "workers": 2}}
    for _ in range(given.rounds):
        for name, way in ways.items():
            engine = make_engine(model=given.model, **way, **options)
            engine.generate(rows[:64], seed=1)  # each worker loads the model
            load, began = os.getloadavg()[0], time.perf_counter()
            found[name] = engine.generate(rows, seed=0)
            seconds = time.perf_counter() - began
            best[name] = min(best.get(name, (seconds, load)), (seconds, load))
    assert found["this process"] == found["1 worker"] == found["2 workers"]
    tokens = sum(row["tokens"] for row in found["1 worker"])
    print(f"{machine()}; {given.rows} rows, {tokens} tokens, the better of {given.rounds}; the same rows each way")
    for name, (seconds, load) in best.items():
        print(f"{name:14}{tokens / seconds:9.0f} tokens/s   ratio to 1 worker {best['1 worker'][0] / seconds:.2f}   load at its start {load:.1f}")


if __name__ == "__main__":
    main()
