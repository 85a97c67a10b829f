"The chain stops where people must label, says how to go on, and goes on."
import re
import shlex
import subprocess
import sys

from s3ft_nb.annotation.task import simulate
from s3ft_nb.core.records import Message, Sample
from s3ft_nb.core.files import read_rows, write_bytes, write_rows

RECIPE = """
name = "gate"
description = "Draw, annotate, settle."
[steps.sample]
notebook = "s3ft/03_sample.ipynb"
restyle_from = "{folder}"
n_train = 12
n_threshold = 6
n_test = 6
language = "zh"
[steps.annotators]
notebook = "s3ft/04_self_annotation.ipynb"
sample_from = "{{step:sample}}"
labels_by = "people"
[steps.annotations]
notebook = "s3ft/05_annotations.ipynb"
sample_from = "{{step:sample}}"
annotations_from = "{{step:annotators}}"
"""


def test_the_run_stops_for_people_and_goes_on(tmp_path):
    sample = lambda i: Sample(id=f"s{i}", group=f"g{i}", conversation_id=f"c{i}", turn=1, system_prompt_id="p", type="style", system_prompt="用诗句说话。",
                              prompt=[Message(role="user", content="你好吗？")], original="很好。", response=f"风清月朗，{i}。", split="train")
    write_rows(tmp_path / "rows" / "train.jsonl", [sample(i) for i in range(40)])
    write_rows(tmp_path / "rows" / "eval.jsonl", [sample(i) for i in range(40, 60)])
    recipe = write_bytes(tmp_path / "gate.toml", RECIPE.format(folder=tmp_path / "rows").encode())
    run = lambda *words: subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", *words], capture_output=True, text=True, cwd=tmp_path)

    stopped = run("run", str(recipe), "--out", "my run", "--set", "seed=3")
    assert stopped.returncode == 3 and "Traceback" not in stopped.stderr, stopped.stderr
    page = tmp_path / "my run" / "sample" / "annotate.html"
    assert str(page) in stopped.stderr and '<html lang="zh">' in page.read_text()
    rows = read_rows(tmp_path / "my run" / "sample" / "to_annotate.jsonl", Sample)
    assert f"{len(rows)} items" in stopped.stderr
    command = stopped.stderr.strip().splitlines()[-1]
    assert command == f"s3ft run {recipe} --out 'my run' --set seed=3 --set annotators.annotations=FILE"

    truth = {row.id: "good" if i % 2 else "bad_context" for i, row in enumerate(rows)}
    for name in ("ann", "bob"): write_rows(tmp_path / "exports" / f"{name}.jsonl", simulate(truth, name, 0.1, 0))
    done = run(*shlex.split(command.replace("FILE", "exports"))[1:])
    assert done.returncode == 0, done.stderr
    numbers = read_rows(tmp_path / "my run" / "annotations" / "numbers.jsonl")
    assert [row["key"] for row in numbers if row["part"] == "pair"] == ["ann bob"]
    assert re.search(r"sample is done, skipped", done.stderr)
    assert run(*shlex.split(command.replace("annotations=FILE", "labels_by=nobody"))[1:]).returncode == 2
