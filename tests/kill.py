"""`kill -9` at random instants, resumed until it is done: every file is byte-identical but those that hold durations or times of day.
python tests/kill.py run|measure KILLS FOLDER [seed [most seconds of processor time before a kill]]
The same command runs once undisturbed (FOLDER/whole, taken as it is when it is there), then again and again in the same place, killed with
all its kernels; it prints which files differ."""
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from s3ft_nb.run.folder import lasting_hash

SMALL = ["world.n_conversations=12", "world.n_eval_conversations=6", "conversations.n_conversations=12", "conversations.n_eval_conversations=6", "world.eval_turns=2",
         "pool.per_type=13", "pool.max_attempts=2", "sample.n_train=20", "sample.n_threshold=16", "sample.n_test=16", "discriminator.num_train_epochs=0.3",
         "train.num_train_epochs=0.3", "measure.dialogues=3", "measure.turns=2", "measure.agreement=4", "measure.guard=2"]
COMMANDS = {"run": ["run", "s3ft-smoke", *SMALL], "measure": ["measure", "--turns", "6", "--dialogues", "3", "--arms", "base,repeat,best_of:2", "--shard-size", "2"]}
CLOCK = {  # files that hold durations or times of day, by name or pattern; a JSON file is the same without these
    r"(run|done|training)\.json": "seconds, peak memory, and when it was", r"events\.jsonl": "progress", r"notebook\.ipynb": "seconds of a training that is shown",
    r"(report/.*)?(steps|facts)\.(csv|md|tex)": "seconds", r"(report/)?index\.html": "seconds on the page"}


def start(words, place):
    "The command in a session of its own."
    return subprocess.Popen([sys.executable, "-c", "from s3ft_nb.cli import app; app()", *words, "--out", str(place)],
                            stdout=subprocess.DEVNULL, stderr=open(place.with_name("stderr.txt"), "wb"), start_new_session=True)


def finish(words, place):
    process = start(words, place)
    if process.wait(): sys.exit(f"failed: {place.with_name('stderr.txt').read_text(errors='replace')[-2000:]}")


def family(process):
    "The command and its kernels, which may have sessions of their own."
    try: return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess: return []


def spent(process):
    "Seconds of processor time so far, of kernels that ended as well: a busy machine kills no earlier than a quiet one."
    total = 0
    for one in family(process):
        with suppress(psutil.Error): total += sum(one.cpu_times()[:4])
    return total


def kill(process):
    for one in (members := family(process)):
        with suppress(psutil.NoSuchProcess): one.kill()
    psutil.wait_procs(members, 10)
    process.wait()


def different(a, b):
    "Paths that differ in two folders."
    names = {path.relative_to(folder) for folder in (a, b) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    same = lambda name: (a / name).is_file() and (b / name).is_file() and (a / name).read_bytes() == (b / name).read_bytes()
    return sorted(str(name) for name in names if not same(name))


def excused(name, a, b):
    "Whether a difference is one of the clock: by name, and for JSON, by what is left without it."
    if not any(re.fullmatch(f"(.*/)?{pattern}", name) for pattern in CLOCK) or not ((a / name).is_file() and (b / name).is_file()): return False
    return Path(name).name != "training.json" or lasting_hash(a / name) == lasting_hash(b / name)


def main(kind, kills, folder, seed=0, longest=40):
    folder, dice, instants = Path(folder).resolve(), random.Random(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    words, place, whole = COMMANDS[kind], folder / "run", folder / "whole"
    if kind == "measure":
        (folder / "sea.txt").write_text("From now on you are a pirate. Answer in at most 9 words. Never use commas.")
        words = [*words, "--system-prompt", str(folder / "sea.txt")]
    shutil.rmtree(place, ignore_errors=True)
    if not whole.exists():
        finish(words, place)
        place.rename(whole)
    seen, bad, rounds = set(), [], 0
    while len(instants) < kills or place.exists() or not rounds:
        process, wait = start(words, place), dice.uniform(5, longest)
        while process.poll() is None and (len(instants) >= kills or spent(process) < wait): time.sleep(0.05)
        if process.poll() is None:
            kill(process)
            instants.append(round(wait, 1))
            continue
        if process.wait(): sys.exit(f"failed after kills at {instants}: {place.with_name('stderr.txt').read_text(errors='replace')[-2000:]}")
        found, rounds = different(whole, place), rounds + 1
        seen |= set(found)
        bad += [name for name in found if not excused(name, whole, place)]
        shutil.rmtree(place)
    print(f"{kind}: {len(instants)} kills in {rounds} rounds, seed {seed}, after {instants} s of processor time")
    print(f"differ by the clock: {', '.join(sorted(seen - set(bad))) or 'none'}")
    print(f"differ otherwise: {', '.join(sorted(set(bad))) or 'none'}", flush=True)
    return bool(bad)


if __name__ == "__main__": sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])))
