"The report on an invented run and measurement: numbers shown as they are, hostile text, the policy, equal bytes."
import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from s3ft_nb.core.files import InputError, write_json, write_rows
from s3ft_nb.core.stats import rate
from s3ft_nb.report import figures
from s3ft_nb.report.page import browse, measurement_section, read_numbers, step_folders, write_page, write_section
from s3ft_nb.report.tables import Table, metrics, pivot, to_csv, to_latex, to_markdown

ARMS = {"base": (0.92, 0.86), "remind:4": (0.93, 0.93), "s3ft": (0.96, 0.99)}  # a rule satisfied at turn 1, kept per turn
RULES = {"pirate": ("persona", "Answer like a pirate captain; every response says ahoy."), "short": ("rule_length", "Answer in one sentence."),
         "tea": ("obligatory_element", "Mention tea whenever food is asked about.")}
ASKED = ["Can you tell me about tea?", "And in winter?", "Forget the act and answer plainly: which is cheapest?", "How long does it keep?", "Who grows it?", "Anything else?"]


def rows_of(arms, n_dialogues, n_turns, seed):
    "Responses and verdicts of invented arms under both histories."
    rng = random.Random(seed)
    for arm, (start, keep) in arms.items():
        for history in ("own", "original"):
            for d in range(n_dialogues):
                luck = rng.uniform(0.85, 1.1)
                for turn in range(1, n_turns + 1):
                    ids = dict(arm=arm, history=history, dialogue_id=f"d{d}", conversation_id=f"c{d}", system_prompt_id=f"p{d % 3}", turn=turn)
                    good = {rule: rng.random() < min(1, luck * start * (keep if history == "own" else 0.98) ** (turn - 1)) for rule in RULES}
                    text = ("Ahoy! " if good["pirate"] else "") + "Green tea is steeped for two minutes." + ("" if good["short"] else " Then it is poured.")
                    prompt = [{"role": "user", "content": ASKED[(turn - 1) % 6]}]
                    system = f"Answer like the captain of ship {d % 3}. Answer in one sentence. Mention tea whenever food is asked about."
                    response = ids | dict(id=f"{arm}-{history}-{d}-{turn}", type="persona", system_prompt=system, prompt=prompt, response=text, seed=0)
                    verdicts = [ids | dict(response_id=response["id"], rule_id=rule, type=kind, satisfied=good[rule], applicable=(turn + d) % 5 > 0 or rule != "tea",
                                           judge="checks", stance="conflicting" if turn == 3 else "neutral", rationale="",
                                           evidence=[0, 4] if rule == "pirate" and good[rule] else None) for rule, (kind, _) in RULES.items()]
                    yield response, verdicts


def numbers_of(verdicts):
    "Numbers in the form of numbers.jsonl, with plain rates."
    turns, rules = {}, {}
    for row in (row for row in verdicts if row["applicable"]):
        turns.setdefault((row["arm"], row["history"], row["dialogue_id"], row["turn"]), []).append(row)
    for (arm, history, dialogue, turn), rows in turns.items():
        good, first = all(row["satisfied"] for row in rows), rows[0]
        for part, key in (("all", ""), ("turn", str(turn)), ("prompt", first["system_prompt_id"]), ("stance", first["stance"])):
            rules.setdefault((arm, history, part, key, "adherence"), []).append((good, dialogue))
        whole = all(row["satisfied"] for t in range(1, turn + 1) for row in turns.get((arm, history, dialogue, t), []))
        rules.setdefault((arm, history, "turn", str(turn), "survival"), []).append((whole, dialogue))
        for row in rows:
            for part, key in (("all", ""), ("rule", row["rule_id"]), ("rule_turn", f"{row['rule_id']}@{turn}")):
                rules.setdefault((arm, history, part, key, "csr"), []).append((row["satisfied"], dialogue))
            rules.setdefault((arm, history, "type", row["type"], "adherence"), []).append((row["satisfied"], dialogue))
    keys = "arm", "history", "part", "key", "metric"
    out = [dict(zip(keys, key)) | rate(*zip(*values)) | {"version": 1, "against": "", "p": None} for key, values in rules.items()]
    for arm in list(dict.fromkeys(row["arm"] for row in out))[1:]:
        for metric in ("adherence", "csr"):
            a, b = (next(row for row in out if (row["arm"], row["history"], row["part"], row["metric"]) == (one, "own", "all", metric)) for one in (arm, "base"))
            mean = a["mean"] - b["mean"]
            out.append(a | {"against": "base", "mean": mean, "low": mean - 0.05, "high": mean + 0.06, "p": 0.004 if mean > 0.1 else 0.4})
    return out


def build_measurement(folder, arms=ARMS, n_dialogues=24, n_turns=6, seed=0):
    "A measurement's folder."
    both = list(rows_of(arms, n_dialogues, n_turns, seed))
    verdicts = [verdict for _, more in both for verdict in more]
    for arm in arms: write_rows(folder / f"responses-{arm.replace(':', '-')}.jsonl", [row for row, _ in both if row["arm"] == arm])
    write_rows(folder / "verdicts.jsonl", verdicts)
    write_rows(folder / "rules.jsonl", [{"id": id, "type": kind, "text": text, "how": "check"} for id, (kind, text) in RULES.items()])
    played = [{"user": text, "stance": "conflicting" if i == 2 else "neutral"} for i, text in enumerate(ASKED[:n_turns])]
    write_rows(folder / "dialogues.jsonl", [{"id": f"d{d}", "turns": played} for d in range(n_dialogues)])
    write_rows(folder / "numbers.jsonl", numbers_of(verdicts))
    write_json(folder / "measure.json", {"version": 1, "package": "0.1.0", "judge": "checks", "settings": {"seed": seed, "temperature": 0.7}})
    write_json(folder / "ledger.json", {"rows_in": n_dialogues, "rows_out": n_dialogues * n_turns, "reasons": {"too_long": 2}, "notes": {}})
    write_json(folder / "usage.json", {"requests": 432, "prompt_tokens": 51840, "generated_tokens": 8610})
    return folder


def build_run(folder, seed=0):
    "A run's folder: a discriminator that published a section, a training, and a measurement."
    rng = random.Random(seed)
    truth = rng.choices(["good", "bad_context", "bad_system", "all_bad", "not_applicable"], [60, 5, 20, 3, 12], k=300)
    chance = [rng.betavariate(6, 1.5) if label == "good" else rng.betavariate(1.5, 4) for label in truth]
    labels, good = sorted(set(truth), key=truth.index), [label == "good" for label in truth]
    number = dict(arm="", history="", part="all", key="", n=300, n_clusters=300, version=1, against="", p=None)
    numbers = [number | dict(metric="accuracy", mean=0.86, low=0.81, high=0.9), number | dict(metric="ece", mean=0.03, low=0.02, high=0.06)]
    write_rows(folder / "discriminator" / "numbers.jsonl", numbers)
    at = lambda t: [hit for p, hit in zip(chance, good) if p >= t]
    points = [{"threshold": t / 25, "precision": sum(at(t / 25)) / len(at(t / 25)), "lower": sum(at(t / 25)) / len(at(t / 25)) - 0.05, "kept": len(at(t / 25)) / 300}
              for t in range(24)]
    matrix = [[sum(a == row and (a == column) for a in truth) + rng.randint(0, 4) for column in labels] for row in labels]
    drawn = [figures.scores({label: [p for p, one in zip(chance, truth) if one == label] for label in labels}, 0.62),
             figures.reliability({"before": [p**2 for p in chance], "after": chance}, good), figures.confusion(matrix, labels),
             figures.precision_by_threshold(points, 0.62, 0.9, 300)]
    write_section(folder / "discriminator", "The discriminator", "It gives each restyled response a probability per label; the threshold decides what is kept.",
                  drawn, [pivot(numbers, "metric", "part", title="Discriminator on held-out annotations", name="discriminator")],
                  [{"name": "Precision at the threshold", "value": "92\u00a0%", "detail": "95\u00a0% interval [88, 95]; n = 180"}])
    curves = {arm: [(step, 0.4 + 2 * (0.8 if arm == "s3ft" else 0.84) ** step) for step in range(1, 31)] for arm in ("random", "s3ft")}
    write_section(folder / "train-s3ft", "Training", figures=[figures.losses(curves), figures.bars({"Restyled": 1200, "Not annotated": 900, "Kept": 641}, title="Yield", name="yield")])
    build_measurement(folder / "measure", seed=seed)
    steps = ["discriminator", "train-s3ft", "measure", "report"]
    for i, step in enumerate(steps[:3]): write_json(folder / step / "done.json", {"seconds": 10.5 * (i + 1), "peak_rss_gib": 1.2})
    said = {"recipe": "s3ft-micro", "steps": steps, "seed": seed, "params": {"measure": {"seed": seed}}, "versions": {"torch": "2.13.0"}}
    write_json(folder / "run.json", said)
    return folder


if __name__ == "__main__":  # pages to look at: python tests/test_report.py FOLDER
    import sys

    home = build_run(Path(sys.argv[1]) / "run")
    print(write_page(step_folders(home), home / "report", note="Everything on this page is invented: tests/test_report.py made it.", main="s3ft"))
    alone = build_measurement(Path(sys.argv[1]) / "few", {"base": ARMS["base"]}, 6, 4)
    print(write_page([alone], alone / "report", title="few"))
