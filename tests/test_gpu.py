"`s3ft check-gpu`: the whole check with a tiny model on the CPU, a section that fails, and a machine without a GPU."
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import read_json
from s3ft_nb.lm import gpu
from s3ft_nb.lm.gpu import Bench, check_gpu, make_model

TITLES = ["models, tiny", "equalities, tiny", "SFT, tiny, none", "DPO, tiny, none", "forest, tiny, none", "engine, tiny, none", "fp16, tiny, none"]


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    "The whole check on the CPU: (folder, what it returned)."
    out = tmp_path_factory.mktemp("gpu")
    return out, check_gpu(out, tiny=True, device="cpu")


def test_whole_check(checked):
    out, found = checked
    assert list(found["sections"]) == TITLES and found["differ"] == []
    rows = {title: section["rows"] for title, section in found["sections"].items()}
    assert [row["what"] for title in TITLES for row in rows[title] if "failed" in row] == []
    assert all(row["ok"] and row["figure"] <= row["bound"] for row in rows[TITLES[1]]) and len(rows[TITLES[1]]) == 6
    for title in TITLES[2:5]: assert all(row["tokens/s"] > 0 and row["s per step"] > 0 and math.isfinite(row["loss"]) for row in rows[title])
    for title in TITLES[2:4]: assert "TRL's" in rows[title][-1]["what"]
    plain, forest = rows["forest, tiny, none"]
    assert forest["loss differs by"] < 1e-4 and forest["times as fast"] == plain["s per step"] / forest["s per step"]
    assert [row["loss"] for row in rows["DPO, tiny, none"]] == pytest.approx([math.log(2)] * 2, abs=1e-3)  # a new adapter
    assert rows["engine, tiny, none"][-1]["same responses"] == "9 of 9"
    full, half, gap = rows["fp16, tiny, none"]
    assert "float16" in half["what"] and gap["ok"] and gap["figure"] == abs(full["loss"] - half["loss"]) <= gap["bound"]
    assert read_json(out / "gpu.json") == json.loads(json.dumps(found))
    assert not (out / "models").exists()


def test_page_has_every_section_and_row(checked):
    out, found = checked
    page = (out / "gpu.md").read_text()
    for title, section in found["sections"].items():
        assert f"## {title}\n" in page
        for row in section["rows"]: assert f"| {row['what']} |" in page
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes"): assert f"{name} {found[name]}" in page


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("bench"), "cpu", "tiny", 600)
    make_model(made.folder / "tiny", "cpu", made.plan["models"]["tiny"])
    return made


def test_model_is_left_as_it_was_loaded(bench):
    lm = bench.load("tiny", "none", "float32")
    weights, kinds = {name: value.clone() for name, value in lm.model.state_dict().items()}, [type(one) for one in lm.model.modules()]
    gpu.train_rates(bench, "tiny", "none", "float32")
    bench.row("fails", lambda: gpu.adapted(lm) and 1 / 0)
    assert [type(one) for one in lm.model.modules()] == kinds and not hasattr(lm.model, "peft_config")
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    assert bench.load("tiny", "none", "float32") is lm


def test_an_equality_that_does_not_hold_is_seen(bench, monkeypatch):
    right = gpu.forest_loss
    monkeypatch.setattr(gpu, "forest_loss", lambda *args: 1.001 * right(*args))
    monkeypatch.setattr(gpu, "play_turns", lambda *args: ["Aye.", f"{args[-1]}"])  # the last is whether histories are kept
    rows = gpu.equalities(bench, "tiny")
    assert [row["what"] for row in rows if not row["ok"]] == ["forest and rows, loss and gradient", "histories kept and read again"]
    assert rows[0]["figure"] == pytest.approx(1e-3, rel=0.01) and rows[2]["figure"] == 1


def test_failing_section_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    "Also the rows of a section fail alone, nothing begins when the time is over, and an equality that does not hold is named."
    def full(bench, *model): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more.")
    monkeypatch.setitem(gpu.SECTIONS, "SFT", full)
    monkeypatch.setitem(gpu.SECTIONS, "equalities", lambda bench, name: [bench.row("one", lambda: {"ok": True}), {"what": "two", "ok": False}])
    for name in ("DPO", "forest", "fp16"): monkeypatch.setitem(gpu.SECTIONS, name, lambda bench, *model: [bench.row("a", lambda: {"figure": 1.0})])
    def late(bench, *model):
        bench.until = 0.0
        return [bench.row("late", dict)]
    monkeypatch.setitem(gpu.SECTIONS, "engine", late)
    found = check_gpu(tmp_path, tiny=True, device="cpu")
    rows = [section["rows"] for section in found["sections"].values()]
    assert list(found["sections"]) == TITLES and found["differ"] == ["two"]
    assert rows[2] == [{"what": TITLES[2], "failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. And more."}]
    assert rows[3] == [{"what": "a", "figure": 1.0}] and rows[6] == [{"what": "a", "failed": "no time left"}]
    assert "Not the same: two" in (tmp_path / "gpu.md").read_text() and "out of memory" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("differ, code, words", [([], 0, "all the same"), (["this device and the CPU"], 1, "not the same: this device and the CPU")])
def test_exit_code_says_whether_equalities_hold(tmp_path, monkeypatch, differ, code, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_gpu", lambda out, tiny: {"differ": differ})
    done = CliRunner().invoke(app, ["check-gpu", "--out", str(tmp_path), "--tiny"])
    assert (done.exit_code, done.stdout.strip()) == (code, f"{tmp_path / 'gpu.md'}: {words}")


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["check-gpu", "--out", str(tmp_path / "out"), "--tiny"])
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert "PyTorch finds no GPU" in done.stderr and "nvidia-smi" in done.stderr
