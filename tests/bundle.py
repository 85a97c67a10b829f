"""Make data/micro-run: the outputs of very small runs, so that every chain notebook opens alone.

usage: python tests/bundle.py [RUN ...]   (finished runs of the recipes of RUNS, in their order; those not named are made in a temporary folder)
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
discriminator/calibration.json discriminator/explained.jsonl select/s3ft.jsonl select/numbers.jsonl world/truth.json measure/numbers.jsonl measure/responses-base.jsonl measure/verdicts.jsonl""".split()

RNR_SIZES = ["world.n_conversations=40", "conversations.n_conversations=40", "world.n_eval_conversations=4", "conversations.n_eval_conversations=4", "world.n_prompts=4",
             "world.n_eval_prompts=1", "per_k=1", "per_instruction=1", "train.num_train_epochs=1.0", "measure.dialogues=6", "measure.turns=3", "world.eval_turns=3", "measure.guard=4"]
RNR_FILES = "roles/examples.jsonl instructions/train.jsonl rules/prompts.jsonl responses/train.jsonl verify/kept.jsonl".split()
SELFALIGN_SIZES = ["n_seeds=24", "n_eval_conversations=2", "eval_turns=2", "n_requests=20", "n_topics=6", "rounds=2", "n_texts=24", "num_train_epochs=1.0",
                   "measure.dialogues=4", "change.dialogues=2", "thinking.dialogues=2", "turns=2", "change.change_at=2",
                   "measure.guard=4"]
SELFALIGN_FILES = """principles/principles.json principles/questions.json principles/truth.json principles/rules.jsonl instruct/instructions.jsonl topics/questions.jsonl
align/aligned.jsonl align/principles.json measure/responses-*.jsonl>played measure/verdicts.jsonl>played""".split()  # >: another folder of the bundle
CONSTRAINTS_SIZES = ["world.n_conversations=20", "conversations.n_conversations=20", "world.n_eval_conversations=4", "conversations.n_eval_conversations=4", "world.n_prompts=4",
                     "world.n_eval_prompts=1", "classes.n_paths=6", "classes.per_k=1", "construct.n_instructions=12", "train-sft.num_train_epochs=1.0", "agreement=0",
                     "measure.dialogues=5", "measure.turns=2", "world.eval_turns=2", "measure.guard=4"]
CONSTRAINTS_FILES = "classes/classes.json classes/eval_paths.jsonl construct/paths.jsonl outputs/outputs.jsonl judger/comparisons.jsonl".split()
RUNS = [("s3ft-smoke", SIZES, FILES), ("rnr-micro", RNR_SIZES, RNR_FILES), ("selfalign-micro", SELFALIGN_SIZES, SELFALIGN_FILES),
        ("constraints-micro", CONSTRAINTS_SIZES, CONSTRAINTS_FILES)]


def shortened(path: Path) -> str:
    "Text of a file; four digits of the discriminator's numbers, words once, and of the measurement's what the figures of the report need."
    text = path.read_text()
    if path.parent.name == "discriminator": text = re.sub(r"(\.\d{4})\d+(?![\de])", r"\1", text)
    if path.name.startswith("responses-"): text = re.sub(r'"system_prompt": "(?:[^"\\]|\\.){400,}"', '"system_prompt": ""', text)  # principles
    if path.name == "scores.jsonl": text = re.sub(r',\s*"explanation":.*"(?=})', "", text)
    if path.parent.name != "measure" or path.name != "numbers.jsonl": return text
    rows = [json.loads(line) for line in text.splitlines()]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["part"] in ("all", "turn") and row["metric"] in ("adherence", "ssr"))


def main() -> None:
    folder = tempfile.mkdtemp()
    runs = [Path(name) for name in sys.argv[1:]]
    for recipe, sizes, _ in RUNS[len(runs):]:
        runs.append(Path(folder) / recipe)
        s3ft = Path(sys.executable).with_name("s3ft")
        subprocess.run([s3ft, "run", recipe, "--out", runs[-1], *(word for size in sizes for word in ("--set", size))], check=True)
    for old in HOME.glob("*/"): shutil.rmtree(old)
    for run, (_, _, names) in zip(runs, RUNS):
        for name in names:
            source, _, folder = name.partition(">")
            for path in sorted(run.glob(source)) or sys.exit(f"{run}: no {source}"):
                place = HOME / folder / path.name if folder else HOME / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(shortened(path))
    print(f"{HOME}: {sum(path.stat().st_size for path in HOME.rglob('*') if path.is_file()) / 1000:.0f} kB")


if __name__ == "__main__": main()
