"""How long a measurement takes to be judged by checks and turned into its report, and whether memory grows with it.

usage: python tests/benchmarks/bench_measure.py [--conversations 200 800] [--turns 20] [--arms 2]
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from s3ft_nb.core.records import Check
from s3ft_nb.core.files import write_json, write_rows
from s3ft_nb.judging.checks import run_check
from s3ft_nb.measure.metrics import numbers
from s3ft_nb.measure.verdicts import stream_rows
from s3ft_nb.report.page import measurement_section, write_report

CHECKS = {
    "words": ("At most 45 words.", Check(kind="max_words", params={"n": 45})),
    "question": ("End with a question mark.", Check(kind="ends_with_character", params={"character": "?"})),
    "arr": ("Say arr.", Check(kind="contains_any", params={"words": ["arr"]})),
    "price": ("Never say euro.", Check(kind="contains_none", params={"words": ["euro", "euros"]})),
    "sentences": ("At most three sentences.", Check(kind="max_sentences", params={"n": 3})),
}
WORDS = "the moon is far and the tide comes in when nobody looks at it for long so we wait here by the harbour arr euro".split()


def lines(path, rows):
    "Write rows as they are made."
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle: handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def responses(arm, n, n_turns, rng):
    "Rollouts of one arm under both histories; a prompt holds the whole history, as in real ones."
    for history in ("own", "original"):
        for d in range(n):
            prompt = []
            for turn in range(1, n_turns + 1):
                text = ". ".join(" ".join(rng.choices(WORDS, k=13)) for _ in range(3)) + rng.choice("?..")
                prompt = [*prompt, {"role": "user", "content": f"And what of number {turn}?"}]
                ids = {"arm": arm, "history": history, "dialogue_id": f"d{d}", "conversation_id": f"c{d}", "system_prompt_id": "p", "turn": turn}
                yield {"id": f"{arm}-{history}-{d}-{turn}", **ids, "type": "given", "system_prompt": "Be a sailor.", "prompt": prompt, "response": text}
                prompt = [*prompt, {"role": "assistant", "content": text}]


def verdicts(folder):
    "Every check on every response, read line by line."
    for path in sorted(folder.glob("responses-*.jsonl")):
        for row in stream_rows(path):
            ids = {key: row[key] for key in ("arm", "history", "dialogue_id", "conversation_id", "system_prompt_id", "turn")}
            for rule, (_, check) in CHECKS.items():
                yield {"response_id": row["id"], **ids, "rule_id": rule, "type": "format", "satisfied": run_check(check, row["response"]), "applicable": True, "judge": "checks", "evidence": None, "rationale": ""}


def build(folder, n, n_turns, arms):
    "A measurement before its verdicts."
    rng = random.Random(0)
    for arm in arms: lines(folder / f"responses-{arm}.jsonl", responses(arm, n, n_turns, rng))
    lines(folder / "rules.jsonl", ({"id": rule, "text": text, "type": "format", "how": "check"} for rule, (text, _) in CHECKS.items()))
    lines(folder / "dialogues.jsonl", ({"id": f"d{d}", "turns": [{"user": "x", "stance": "neutral"}] * n_turns} for d in range(n)))
    write_json(folder / "measure.json", {"complete": True})


def stage(name, folder):
    "Run one stage in this process: seconds and peak memory in MiB."
    began = time.perf_counter()
    {"judge": lambda: lines(folder / "verdicts.jsonl", verdicts(folder)), "numbers": lambda: write_rows(folder / "numbers.jsonl", numbers(folder / "verdicts.jsonl")),
     "report": lambda: (measurement_section(folder), write_report([folder], folder / "report", "Measurement")), "nothing": lambda: None}[name]()
    return time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--conversations", type=int, nargs="*", default=[200, 800])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--arms", type=int, default=2)
    parser.add_argument("--stage")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.stage: sys.exit(print(*stage(given.stage, given.folder)))
    for n in given.conversations:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), n, given.turns, [f"arm{i}" for i in range(given.arms)])
            size = lambda pattern: sum(path.stat().st_size for path in Path(folder).glob(pattern)) / 2**20
            for name in ("nothing", "judge", "numbers", "report"):
                found = subprocess.run([sys.executable, __file__, "--stage", name, "--folder", folder], capture_output=True, text=True, check=True)
                seconds, peak = map(float, found.stdout.split())
                print(f"{n:5} conversations x {given.turns} turns x {given.arms} arms x 2 histories, {name:8} {seconds:6.1f} s, peak {peak:6.0f} MiB", flush=True)
            print(f"{n:5} conversations: responses {size('responses-*'):.0f} MiB, verdicts {size('verdicts*'):.0f} MiB on disk")
