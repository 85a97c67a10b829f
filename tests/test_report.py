"The report on a whole synthetic run: every file of the contract, missing pieces, hostile text, equal bytes."
import json
import random
import re
from html.parser import HTMLParser

import pytest

from s3ft_nb.core.files import InputError, write_json, write_rows
from s3ft_nb.core.records import Message, Response, Score, OldVerdict
from s3ft_nb.report.figures import draw_all, picture
from s3ft_nb.report.metrics import collect
from s3ft_nb.report.page import render, write_report
from s3ft_nb.report.tables import Table, tables_of, to_csv, to_latex, to_markdown

LABELS = ["good", "bad_context", "bad_system", "all_bad", "not_applicable"]
TYPES = ["persona", "symbolism", "literary manner", "tone", "audience", "orthography", "format", "narrative frame", "element", "rule"]
RATES = {"base": (0.80, 0.45), "unfiltered": (0.68, 0.97), "random": (0.66, 0.96), "s3ft": (0.86, 0.99)}  # turn 1, kept per turn
ASKED = ["Can you tell me about tea?", "And in winter?", "Which is cheapest?", "How long does it keep?", "Who grows it?", "Anything else?"]


def replies_of(arm, history, n_dialogues, n_turns, rng):
    "Replies and verdicts of one arm under one history."
    start, keep = RATES.get(arm, (0.5, 0.9))
    for d in range(n_dialogues):
        kind, luck = TYPES[d % len(TYPES)], rng.uniform(0.85, 1.15)
        for turn in range(1, n_turns + 1):
            good = rng.random() < min(1, luck * start * keep ** (turn - 1))
            ids = dict(arm=arm, history=history, dialogue_id=f"d{d}", conversation_id=f"c{d // 2}", system_prompt_id=f"p{d}")
            ids |= dict(type=kind, turn=turn)
            text = "Ahoy! Green tea, steeped two minutes, arr." if good else "Green tea is steeped for two minutes."
            asked, setting = ASKED[(turn - 1) % 6], f"Answer like the captain of ship {d}; every reply says ahoy."
            said = dict(system_prompt=setting, prompt=[Message(role="user", content=asked)], response=text)
            reply, applies = Response(id=f"{arm}-{history}-{d}-{turn}", **ids, **said), turn != 3 or d % 7 != 0
            yield reply, OldVerdict(response_id=reply.id, **ids, adherence=int(good), judge="checks", applicable=applies)


def build_run(folder, arms=tuple(RATES), n_dialogues=40, n_turns=6, n_samples=600, seed=0):
    "A run folder as the chain leaves it, with invented content."
    rng, verdicts = random.Random(seed), []
    for arm in arms:
        for history in ("own", "original"):
            rows = list(replies_of(arm, history, n_dialogues, n_turns, rng))
            write_rows(folder / f"rollout-{arm}" / f"{history}.jsonl", [reply for reply, _ in rows])
            verdicts += [verdict for _, verdict in rows]
        if arm != "base": write_json(folder / f"train-{arm}" / "training.json", training(0.35, 10, rng))
    write_rows(folder / "adherence" / "verdicts.jsonl", verdicts)
    build_filter(folder, n_samples, rng)
    trained, played = [f"train-{arm}" for arm in arms if arm != "base"], [f"rollout-{arm}" for arm in arms]
    steps = ["world", "pool", "restyle", "annotations", "discriminator", "select", *trained, *played, "adherence"]
    for step in steps:
        write_json(folder / step / "done.json", {"seconds": round(rng.uniform(1, 90), 2), "peak_rss_gib": round(rng.uniform(0.8, 2.6), 3)})
    books = {"stage": "restyle", "rows_in": n_samples + 12, "rows_out": n_samples, "reasons": {"empty": 7, "cut_off": 5}}
    write_json(folder / "restyle" / "ledger.json", books | {"notes": {}, "dropped": []})
    params = {"train-s3ft": {"seed": seed, "learning_rate": 2e-4, "quantization": "nf4"}, "restyle": {"seed": seed}}
    versions = {"s3ft_nb": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"}
    said = {"recipe": "s3ft-micro", "steps": steps, "seed": seed, "settings": [], "params": params, "versions": versions}
    write_json(folder / "run.json", said)
    return folder


def training(end, every, rng):
    "A training record whose loss falls to `end`."
    loss = [{"step": every * i, "loss": end + 2.2 * 0.8**i + rng.uniform(-0.04, 0.04), "learning_rate": 1e-4} for i in range(1, 31)]
    return {"loss": loss, "n_rows": 400, "tokens": 50_000, "supervised_tokens": 9_000, "seconds": 80.2}


def build_filter(folder, n, rng):
    "Samples, labels, scores, discriminator and selection of an invented run."
    labels, samples, scores, good = [], [], [], 0.7
    for i in range(n):
        truth = rng.choices(LABELS, [0.62, 0.05, 0.2, 0.03, 0.1])[0]
        p = min(0.999, max(0.001, rng.betavariate(7, 1) if truth == "good" else rng.betavariate(1, 4)))
        rest = (1 - p) / 4
        scores.append(Score(sample_id=f"s{i}", probabilities={label: p if label == "good" else rest for label in LABELS}))
        samples.append({"id": f"s{i}", "type": TYPES[i % 10]})
        if i % 3 == 0: labels.append({"sample_id": f"s{i}", "label": truth, "use": "test" if i % 2 else "train"})
    candidates = [(sample, score) for sample, score in zip(samples, scores) if int(sample["id"][1:]) % 3]
    kept = [sample for sample, score in candidates if score.probabilities["good"] >= good]
    files = {"restyle/train": samples, "annotations/labels": labels, "discriminator/scores": scores, "select/s3ft": kept}
    files["select/unfiltered"] = [sample for sample, _ in candidates]
    for name, rows in files.items(): write_rows(folder / f"{name}.jsonl", rows)
    write_json(folder / "annotations" / "agreement.json", {"alpha": 0.74, "low": 0.69, "high": 0.78, "n_samples": len(labels)})
    confusion = [[88, 2, 5, 0, 1], [3, 6, 1, 1, 0], [6, 0, 33, 1, 0], [0, 1, 2, 3, 0], [1, 0, 0, 0, 17]]
    intervals = {"accuracy": {"low": 0.81, "high": 0.9}, "precision_good": {"low": 0.87, "high": 0.94}}
    figures = {"n_train": 150, "n_test": 171, "accuracy": 0.86, "macro_f1": 0.79, "precision_good": 0.9, "recall_good": 0.92, "ece": 0.03}
    write_json(folder / "select" / "discriminator.json", figures | {"intervals": intervals, "labels": LABELS, "confusion": confusion})
    write_json(folder / "discriminator" / "training.json", training(0.2, 5, rng))
    count = lambda rows, kind: sum(row["type"] == kind for row in rows)
    yields = [{"type": kind, "n": count(files["select/unfiltered"], kind), "kept": count(kept, kind)} for kind in TYPES]
    yields.append({"type": "all", "n": len(candidates), "kept": len(kept)})
    chosen = {"threshold": good, "stated_precision": 0.9, "reached": True, "lower": 0.91}
    write_json(folder / "select" / "select.json", chosen | {"yields": yields})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("runs") / "s3ft-micro")


@pytest.fixture(scope="module")
def metrics(run):
    return write_report(run, note="Everything here is invented.", draws=100)


def test_metrics_hold_what_the_issue_names(run, metrics):
    "Done-when 2, key by key."
    stored = json.loads((run / "report" / "metrics.json").read_text())
    assert stored == json.loads(json.dumps(metrics))
    assert list(stored["arms"]) == ["base", "unfiltered", "random", "s3ft"]
    for arm in stored["arms"].values():
        for summary in (arm["adherence"], arm["adherence"]["own_history"], arm["adherence"]["original_history"]):
            assert {"mean", "low", "high", "n", "by_turn", "by_type"} <= summary.keys()
            assert summary["low"] <= summary["mean"] <= summary["high"]
            assert [row["turn"] for row in summary["by_turn"]] == [1, 2, 3, 4, 5, 6]
            assert {"turn", "mean", "low", "high", "n"} <= summary["by_turn"][0].keys()
    named = {"n_train", "n_test", "accuracy", "macro_f1", "precision_good", "recall_good", "ece", "threshold", "stated_precision", "confusion"}
    assert named <= stored["discriminator"].keys() and stored["discriminator"]["threshold"] == 0.7
    assert stored["agreement"]["alpha"] == 0.74
    assert {"restyled", "annotated", "kept"} <= stored["rows"].keys() and stored["rows"]["restyled"] == 600
    assert stored["seconds"]["total"] == pytest.approx(sum(v for k, v in stored["seconds"].items() if k != "total"))
    assert stored["peak_rss_gib"] < 3 and stored["seed"] == 0 and stored["versions"]["torch"]
    assert stored["headline_condition"] == "own_history" and stored["missing"] == []
    assert len(stored["figures"]) == 12 and len(stored["tables"]) % 3 == 0
    for name in stored["figures"] + stored["tables"]: assert (run / "report" / name).stat().st_size


def test_same_run_same_bytes(run, metrics, tmp_path):
    "No clock, no order of sets, no random ids in any file."
    write_report(run, tmp_path / "again", note="Everything here is invented.", draws=100)
    for path in sorted(p for p in (run / "report").rglob("*") if p.is_file()):
        assert (tmp_path / "again" / path.relative_to(run / "report")).read_bytes() == path.read_bytes(), path.name


class Page(HTMLParser):
    "Collects what an accessible page needs, and what a self-contained page must not have."

    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "link"): self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag


def page_of(run):
    page = Page()
    page.feed((run / "report" / "index.html").read_text(encoding="utf-8"))
    return page


def test_page_stands_alone_and_is_accessible(run, metrics):
    page = page_of(run)
    assert not page.open  # every tag closed, in order
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 6 and all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in images)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert all(href.startswith("#") or (run / "report" / href).is_file() for href in links)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and all(href[1:] in ids for href in links if href.startswith("#"))
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert sum(tag == "h1" for tag, _ in page.tags) == 1 and dict(page.tags)["html"]["lang"] == "en"


HOSTILE = '</title></style><script>alert("x")</script>{{ 7 * 7 }} | & % $\\frac$ # _ { } ~ ^ \\input{/etc/passwd} 樣子 \u202e'


def test_hostile_text_stays_text(tmp_path):
    "Arm, type, prompt and reply come from users and models."
    keys = dict(history="own", dialogue_id="d", conversation_id="c", system_prompt_id="p", type=HOSTILE, turn=1)
    reply = Response(id="r", arm="base", **keys, system_prompt=HOSTILE, prompt=[Message(role="user", content=HOSTILE)], response=HOSTILE)
    write_rows(tmp_path / "rollout-base" / "own.jsonl", [reply])
    write_rows(tmp_path / "adherence" / "verdicts.jsonl", [OldVerdict(response_id="r", arm="base", **keys, adherence=1, judge="checks")])
    write_report(tmp_path, note=HOSTILE, draws=20)
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in text and "49" not in re.sub(r"base64,[^\"]*", "", text).replace("&#34;", "")
    page = page_of(tmp_path)
    assert not page.open
    latex = (tmp_path / "report" / "tables" / "by_type_own.tex").read_text(encoding="utf-8")
    assert "\\input" not in latex and "{{ 7" not in latex


@pytest.mark.parametrize("write", [to_csv, to_markdown, to_latex])
def test_one_line_per_row(write):
    "A line break or separator inside a cell never makes a new row or column."
    table = Table("t", "T", "n", {"a": "A", "b": "B"}, [{"a": 'x|y & "z",\nw', "b": 1}])
    plain = Table("t", "T", "n", {"a": "A", "b": "B"}, [{"a": "x", "b": 1}])
    extra = 1 if write is to_csv else 0  # quoted, as CSV has it
    assert write(table).count("\n") == write(plain).count("\n") + extra
    cells = lambda table: [line.count(" & ") for line in to_latex(table).splitlines()]
    assert cells(table) == cells(plain)


PIECES = ["select/discriminator.json", "select/select.json", "annotations/labels.jsonl", "annotations/agreement.json", "restyle/train.jsonl",
          "run.json", "train-s3ft/training.json", "rollout-base/own.jsonl", "discriminator/scores.jsonl", "adherence/verdicts.jsonl"]


@pytest.mark.parametrize("gone", PIECES)
def test_missing_pieces_are_shown_as_missing(tmp_path, gone):
    run = build_run(tmp_path / "run", arms=("base", "s3ft"), n_dialogues=6, n_turns=2, n_samples=60)
    (run / gone).unlink()
    metrics = collect(run, draws=20)
    assert metrics["missing"] == ([gone] if not gone.startswith("rollout") else [])
    for table in tables_of(metrics): to_csv(table), to_markdown(table), to_latex(table)
    assert gone in render(metrics, tables_of(metrics), {}) or gone.startswith("rollout")


def test_other_arms_and_one_turn(tmp_path):
    "Arms are whatever the run holds; one turn draws a point, and no ratio is invented."
    run = build_run(tmp_path / "run", arms=("base", "reminders", "rnr"), n_dialogues=4, n_turns=1, n_samples=20)
    metrics = collect(run, draws=20)
    assert list(metrics["arms"]) == ["base", "reminders", "rnr"] and metrics["main"] == "rnr"
    assert metrics["arms"]["rnr"]["adherence"]["retention"]["mean"] is None
    assert "drift" in draw_all(metrics, tmp_path / "figures")
    picture(metrics, tmp_path / "picture.png", arms=("base", "rnr"))


def test_no_decided_verdict(tmp_path):
    "Verdicts that are all unknown give no number and no crash."
    keys = dict(history="own", dialogue_id="d", conversation_id="c", system_prompt_id="p", type="tone", turn=1)
    write_rows(tmp_path / "adherence" / "verdicts.jsonl", [OldVerdict(response_id="r", arm="base", **keys, adherence=None, judge="discriminator")])
    metrics = write_report(tmp_path, draws=20)
    assert metrics["arms"]["base"]["adherence"]["mean"] is None and metrics["arms"]["base"]["adherence"]["unknown"] == 1


def test_bad_input_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="holds no results of a run"): write_report(tmp_path)
    assert not (tmp_path / "report").exists()
    (tmp_path / "adherence").mkdir()
    (tmp_path / "adherence" / "verdicts.jsonl").write_text('{"response_id": "r"}\n')
    with pytest.raises(InputError, match=r"verdicts\.jsonl:1: arm: missing"): write_report(tmp_path)


if __name__ == "__main__":  # a page to look at: python tests/test_report.py FOLDER
    import sys
    from pathlib import Path

    home = build_run(Path(sys.argv[1]), n_dialogues=120, n_samples=3000)
    note = "Everything on this page is invented: tests/test_report.py made it to see what a page looks like."
    picture(write_report(home, note=note), home / "picture.png")
