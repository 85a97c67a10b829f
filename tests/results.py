"""Write a results table of the README, between two marker comments, from a run over seeds.

usage: python tests/results.py RUN [README [ARM ...]]   (RUN: folder of `s3ft run RECIPE --seeds ...`, pooled; see `make results`; ARM: those shown, or all)

The comparison's table is that of arms by testbeds. A recipe has markers of its own, `<!-- results of RECIPE -->` and `<!-- end of RECIPE -->`, or those of `make results`. Where
system prompts are of the types rules-1, rules-2, …, the table is by number of rules.
"""
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill

from s3ft_nb.comparison.methods import claimed
from s3ft_nb.core.files import read_json, read_rows, write_rows
from s3ft_nb.measure.metrics import seed_numbers

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results: written by make results -->", "<!-- end of results -->"


def shown(row: dict | None, sign: str = "") -> str:
    if row is None: return "–"
    ends = "" if row["low"] is None else f" [{row['low']:{sign}.2f}, {row['high']:{sign}.2f}]"
    return f"{row['mean']:{sign}.2f}{ends}"


def rules_columns(run: Path, seeds: list[str], arms: list[str], main: str, cells: dict) -> dict[str, list[str]]:
    "Columns of a table of arms: all rules kept, by K, at the first and last turn, single rules kept; empty without types rules-K."
    homes = [run / f"seed-{seed}/measure" for seed in seeds]
    if not all((home / "dialogues.jsonl").exists() for home in homes): return {}
    kinds = {row["id"]: row["type"] for home in homes for row in read_rows(home / "dialogues.jsonl")}
    names = sorted(kind for kind in set(kinds.values()) if kind.startswith("rules-"))
    verdicts = [[row for row in read_rows(home / "verdicts.jsonl") if row["history"] == "own"] for home in homes] if names else []

    def pooled(kind: str, metric: str = "adherence") -> list[str]:  # of dialogues under system prompts of a type; empty: all
        with TemporaryDirectory() as folder:
            files = {seed: write_rows(Path(folder) / f"{seed}.jsonl", [row for row in rows if kinds[row["dialogue_id"]].startswith(kind)])
                     for seed, rows in zip(seeds, verdicts)}
            rows = {row["arm"]: row for row in seed_numbers(files, main) if (row["metric"], row["part"], row["against"]) == (metric, "all", "")}
        return [shown(rows.get(arm)) for arm in arms]
    turns = sorted({int(key[3]) for key in cells if key[2] == "turn"})
    at = {f"turn {turn}": [shown(cells.get((arm, "", "turn", str(turn)))) for arm in arms] for turn in (turns[0], turns[-1])}
    return {f"K = {name[6:]}": pooled(name) for name in names} | at | {"single rules": pooled("", "csr")} if names else {}


def made_by(run: Path, seeds: list[str]) -> str:
    "Command, seeds, date, machine and versions, in words."
    runs = [read_json(run / f"seed-{seed}" / "run.json") for seed in seeds]
    gather = lambda values, nothing: "; ".join(sorted(set(values))) or nothing
    machines = gather((machine for one in runs for machine in one.get("machines", [])), "of a kind that was not recorded")
    types = gather((own["dtype"] for one in runs for own in one["params"].values() if "dtype" in own), "dtype not recorded")
    versions = ", ".join(f"{name} {runs[0]['versions'][name]}" for name in ("s3ft_nb", "torch", "transformers", "trl", "peft") if name in runs[0]["versions"])
    return (f"`s3ft run {runs[0]['recipe']}` with {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(seeds)}, {max(str(one['finished'])[:10] for one in runs)}, "
            f"on a machine {machines}; {types}; {versions}.")


def lines(text: str, columns: dict[str, list[str]]) -> str:
    "A paragraph and a table in Markdown."
    rows = [[*columns], ["---"] * len(columns), *zip(*columns.values())]
    return "\n".join([fill(text, 120, break_long_words=False, break_on_hyphens=False), "", *(f"| {' | '.join(line)} |" for line in rows)])


def matrix(run: Path) -> str:
    "The methods side by side over the seeds: primary metric, its difference to the base, and each testbed."
    numbers, beds = read_rows(run / "pooled/numbers.jsonl"), ("T1", "T2", "T3", "T4", "T4p", "T6", "T7")
    cells = {(row["arm"], row["against"], row["key"] or "primary"): row for row in numbers if row["part"] in ("all", "testbed")}
    arms = list(dict.fromkeys(arm for arm, _, key in cells if key == "primary"))
    seeds = list(dict.fromkeys(row["key"].split("|")[0] for row in numbers if row["part"] == "seed_all")) or read_json(run / "run.json")["seeds"]
    homes = read_json(run / f"seed-{seeds[0]}/matrix/comparison.json")["homes"]
    best = {bed: max(cells[arm, "", bed]["mean"] for arm in arms if (arm, "", bed) in cells) for bed in beds}

    def cell(arm: str, bed: str) -> str:
        if not (row := cells.get((arm, "", bed))): return "–"
        text = f"{row['mean']:.2f}"
        return f"{f'**{text}**' if row['mean'] == best[bed] else text}{' ⌂' * (homes.get(arm) == bed)}"
    gap = lambda arm: cells.get((arm, "base", "primary"))
    claims = [f"{shown(gap(arm), '+')} {claimed(numbers, gap(arm))}" if gap(arm) else "–" for arm in arms]
    columns = {"arm": arms, "primary": [shown(cells[arm, "", "primary"]) for arm in arms], "minus base, claim": claims} | {bed: [cell(arm, bed) for arm in arms] for bed in beds}
    return lines(f"{made_by(run, [*map(str, seeds)])} Mean over seeds [95 % interval]; ⌂: the method's home; bold: the highest.", columns)


def table(run: Path, chosen: tuple = ()) -> str:  # chosen: arms that are shown; empty: all
    "Where the numbers come from, in words, and adherence of every arm over the seeds."
    numbers = [row for row in read_rows(run / "numbers.jsonl") if (row["metric"], row["history"]) == ("adherence", "own")]
    cells = {(row["arm"], row["against"], row["part"], row["key"]): row for row in numbers}
    arms, seeds = (list(dict.fromkeys(row[key] for row in numbers if row["part"] == part)) for part, key in (("all", "arm"), ("seed", "key")))
    arms = [arm for arm in arms if arm in chosen or not chosen]
    turns = sorted({int(row["key"]) for row in numbers if row["part"] == "turn"})
    steps = [own for seed in seeds for own in read_json(run / f"seed-{seed}" / "run.json")["params"].values()]
    main = next((own["main"] for own in steps if own.get("main") in arms), arms[-1])
    held = ("mean over seeds [95 % interval that holds seeds and conversations], each seed beside it" if len(seeds) > 1 else
            "one seed only, so the 95 % interval holds conversations, and another seed may lie outside it")
    first = cells[main, "", "all", ""]
    text = f"{made_by(run, seeds)} Adherence on held-out prompts and dialogues, own history, {first['n_clusters']} conversations{' in all' if len(seeds) > 1 else ''}: {held}."
    by_rules = rules_columns(run, seeds, arms, main, cells)
    ends = [" → ".join(f"{cells[arm, '', 'turn', str(turn)]['mean']:.2f}" for turn in (turns[0], turns[-1])) for arm in arms]
    each = [", ".join(f"{cells[arm, '', 'seed', seed]['mean']:.2f}" for seed in seeds if (arm, "", "seed", seed) in cells) for arm in arms]
    against = {f"minus {arms[0]}": [shown(cells.get((arm, arms[0], "all", "")), "+") for arm in arms], f"{main} minus it": [shown(cells.get((main, arm, "all", "")), "+") for arm in arms]}
    columns = {"arm": [f"**{arm}**" if arm == main else arm for arm in arms], "all rules" if by_rules else "adherence": [shown(cells[arm, "", "all", ""]) for arm in arms],
               **({"each seed": each} if len(seeds) > 1 else {}), **(by_rules or {f"turn {turns[0]} → {turns[-1]}": ends}), **against}
    if by_rules: text = f"Seeds {', '.join(seeds)}, else as above; {first['n_clusters']} conversations: mean [95 % interval]."
    return lines(text, columns)


def main(run: str, readme: str = str(ROOT / "README.md"), *arms: str) -> None:
    text = Path(readme).read_text(encoding="utf-8")
    recipe = next((read_json(path)["recipe"] for path in sorted(Path(run).glob("seed-*/run.json"))), "")
    begin, end = (f"<!-- results of {recipe} -->", f"<!-- end of {recipe} -->") if f"<!-- results of {recipe} -->" in text else (BEGIN, END)
    if text.count(begin) != 1 or text.count(end) != 1: sys.exit(f"{readme}: needs the lines {begin} and {end}, once each")
    made = matrix(Path(run)) if (Path(run) / "pooled/numbers.jsonl").exists() and recipe.startswith("compare") else table(Path(run), arms)
    before, after = text.split(begin)[0], text.split(end)[1]
    Path(readme).write_text(f"{before}{begin}\n{made}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__": main(*sys.argv[1:])
