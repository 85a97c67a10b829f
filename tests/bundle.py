"""Make data/micro-run: the outputs of a very small run, so that every chain notebook opens alone.

usage: python tests/bundle.py [RUN [SELFALIGN_RUN]]   (RUN: a finished run of s3ft-smoke; without one it is made in a
temporary folder; SELFALIGN_RUN: one of selfalign-micro; without one its files stay as they are)
"""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "data/micro-run"
SIZES = ["world.n_conversations=6", "conversations.n_conversations=6", "world.n_eval_conversations=3", "conversations.n_eval_conversations=3",
         "world.n_prompts=4", "world.n_eval_prompts=1", "pool.per_type=6", "pool.max_attempts=4", "sample.n_train=16", "sample.n_threshold=12", "sample.n_test=12",
         "measure.dialogues=6", "measure.turns=3", "world.eval_turns=3"]
FILES = """conversations/train.jsonl conversations/eval.jsonl pool/train.jsonl pool/eval.jsonl pool/pool.json
restyle/train.jsonl restyle/eval.jsonl sample/to_annotate.jsonl sample/use.json annotators/annotations.jsonl
annotations/labels.jsonl annotations/annotations.jsonl annotations/numbers.jsonl discriminator/scores.jsonl
discriminator/calibration.json discriminator/explained.jsonl select/s3ft.jsonl select/numbers.jsonl world/truth.json measure/numbers.jsonl""".split()


SELFALIGN = """principles/principles.json principles/questions.json instruct/instructions.jsonl topics/questions.jsonl align/aligned.jsonl
align/principles.json""".split()  # of a run of selfalign-micro, the first rows of each
N_ROWS = 24


def shortened(path: Path) -> str:
    "Text of a file; four digits of the discriminator's numbers, words once, and of the measurement's what the figures of the report need."
    text = path.read_text()
    if path.parent.name == "discriminator": text = re.sub(r"(\.\d{4})\d+(?![\de])", r"\1", text)
    if path.name == "scores.jsonl": text = re.sub(r',\s*"explanation":.*"(?=})', "", text)
    if path.parent.name != "measure": return text
    rows = [json.loads(line) for line in text.splitlines()]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["part"] in ("all", "turn") and row["metric"] in ("adherence", "ssr"))


def main() -> None:
    folder = tempfile.mkdtemp()
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "run"
    if len(sys.argv) < 2:
        s3ft = Path(sys.executable).with_name("s3ft")
        subprocess.run([s3ft, "run", "s3ft-smoke", "--out", run, *(word for size in SIZES for word in ("--set", size))], check=True)
    for old in HOME.glob("*/"):
        if old.name not in {Path(name).parts[0] for name in SELFALIGN}: shutil.rmtree(old)
    for name in FILES:
        (HOME / name).parent.mkdir(parents=True, exist_ok=True)
        (HOME / name).write_text(shortened(run / name))
    if len(sys.argv) > 2:
        for name in SELFALIGN:
            (HOME / name).parent.mkdir(parents=True, exist_ok=True)
            lines = (Path(sys.argv[2]) / name).read_text().splitlines(keepends=True)
            (HOME / name).write_text("".join(lines[:N_ROWS] if name.endswith(".jsonl") else lines))
    print(f"{HOME}: {sum(path.stat().st_size for path in HOME.rglob('*') if path.is_file()) / 1000:.0f} kB")


if __name__ == "__main__": main()
