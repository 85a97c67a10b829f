"""Write the results table of the README, between its two marker comments, from a run over seeds.

usage: python tests/results.py RUN [README]   (RUN: folder of `s3ft run RECIPE --seeds ...`, pooled; see `make results`)
"""
import sys
from pathlib import Path
from textwrap import fill

from s3ft_nb.core.files import read_json, read_rows

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by make results -->", "<!-- end of results -->"


def table(run: Path) -> str:
    "Where the numbers come from, in words, and adherence of every arm over the seeds."
    numbers = [row for row in read_rows(run / "numbers.jsonl") if (row["metric"], row["history"]) == ("adherence", "own")]
    cells = {(row["arm"], row["against"], row["part"], row["key"]): row for row in numbers}
    arms, seeds = (list(dict.fromkeys(row[key] for row in numbers if row["part"] == part)) for part, key in (("all", "arm"), ("seed", "key")))
    turns = sorted({int(row["key"]) for row in numbers if row["part"] == "turn"})
    runs = [read_json(run / f"seed-{seed}" / "run.json") for seed in seeds]
    steps = [own for one in runs for own in one["params"].values()]
    main = next((own["main"] for own in steps if own.get("main") in arms), arms[-1])
    gather = lambda values, nothing: "; ".join(sorted(set(values))) or nothing
    machines = gather((machine for one in runs for machine in one.get("machines", [])), "of a kind that was not recorded")
    versions = ", ".join(f"{name} {runs[0]['versions'][name]}" for name in ("s3ft_nb", "torch", "transformers", "trl", "peft") if name in runs[0]["versions"])
    held = ("mean over seeds [95 % interval that holds seeds and conversations], each seed beside it" if len(seeds) > 1 else
            "one seed only, so the 95 % interval holds conversations, and another seed may lie outside it")
    first = cells[main, "", "all", ""]
    text = (f"`s3ft run {runs[0]['recipe']}` with {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}, {max(str(one['finished'])[:10] for one in runs)}, on a machine "
            f"{machines}; {gather((own['dtype'] for own in steps if 'dtype' in own), 'dtype not recorded')}; {versions}. Adherence on held-out prompts and dialogues, own history, "
            f"{first['n_clusters']} conversations{' in all' if len(seeds) > 1 else ''}: {held}.")

    def shown(row: dict | None, sign: str = "") -> str:
        if row is None: return "–"
        ends = "" if row["low"] is None else f" [{row['low']:{sign}.2f}, {row['high']:{sign}.2f}]"
        return f"{row['mean']:{sign}.2f}{ends}"

    lines = [["arm", "adherence", *(["each seed"] if len(seeds) > 1 else []), f"turn {turns[0]} → {turns[-1]}", f"minus {arms[0]}", f"{main} minus it"]]
    for arm in arms:
        at = [f"{cells[arm, '', 'turn', str(turn)]['mean']:.2f}" for turn in (turns[0], turns[-1])]
        own = [f"{cells[arm, '', 'seed', seed]['mean']:.2f}" for seed in seeds if (arm, "", "seed", seed) in cells]
        lines.append([f"**{arm}**" if arm == main else arm, shown(cells[arm, "", "all", ""]), *([", ".join(own)] if len(seeds) > 1 else []), " → ".join(at),
                      shown(cells.get((arm, arms[0], "all", "")), "+"), shown(cells.get((main, arm, "all", "")), "+")])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join([fill(text, 120, break_long_words=False, break_on_hyphens=False), "", *(f"| {' | '.join(line)} |" for line in lines)])


def main(run: str, readme: str = str(ROOT / "README.md")) -> None:
    text = Path(readme).read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1: sys.exit(f"{readme}: needs the lines {BEGIN} and {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    Path(readme).write_text(f"{before}{BEGIN}\n\n{table(Path(run))}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
