"The command line: exit codes, one clear line, nothing written."
import json
import os
import subprocess
import sys

import pytest
from tiny import small_notebook, tiny_model
from typer.testing import CliRunner

from s3ft_nb.cli import app
from s3ft_nb.core.files import resource, write_bytes, write_json

CELL = 'out = ""  # Folder\nn = 3  # rows\nrate = 0.5  # in [0, 1]\nlanguage = "en"  # en or zh\ntypes = ["a"]  # Types\nmodel = ""  # Model'
RECIPE = 'name = "one"\ndescription = "One step."\n[params]\nn = 4\n[steps.count]\nnotebook = "count.ipynb"\n'


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "count.ipynb", small_notebook(CELL, "from pathlib import Path\nPath(out, 'index.html').write_text(str(n))"))
    return str(write_bytes(tmp_path / "one.toml", RECIPE.encode()))


def s3ft(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


BAD = [
    (["--set", "m=1"], "--set m: unknown parameter 'm'"),
    (["--set", "langage=zh"], "did you mean language?"),
    (["--set", "n=many"], "--set n: must be of type int, got 'many' (like 3)"),
    (["--set", "n=1.5"], "must be of type int"),
    (["--set", "rate=true"], "must be of type float"),
    (["--set", "types=a"], "must be of type list"),
    (["--set", "types=[1]"], "must be of type str, got 1"),
    (["--set", "n"], "is not key=value"),
    (["--set", "cuont.n=1"], "unknown step 'cuont' (did you mean count?)"),
    (["--set", "out=/tmp"], "choose the run folder with --out"),
    (["--set", "model=./none"], "no such file or folder: ./none"),
    (["n=1", "m=2"], "unknown parameter 'm'"),
    (["other-recipe"], "one recipe at a time"),
    (["--only", "cuont"], "--only: unknown step 'cuont'"),
    (["--only", "count", "--from", "count"], "cannot be combined"),
    (["--from", "count", "--fresh"], "cannot be combined"),
]


@pytest.mark.parametrize("words, line", BAD)
def test_bad_usage_is_one_line_and_exit_code_2(recipe, tmp_path, words, line):
    before = sorted(tmp_path.rglob("*"))
    refused = s3ft("run", recipe, "--out", tmp_path / "run", *words)
    assert refused.exit_code == 2
    assert line in refused.stderr and len(refused.stderr.strip().splitlines()) == 1
    if "--fresh" not in words: assert sorted(tmp_path.rglob("*")) == before


BROKEN = [
    (("n = 4", "n = oops"), "one.toml:4: broken TOML"),
    (("n = 4", "m = 4"), "one.toml: params: unknown parameter 'm'"),
    (("n = 4", 'n = "4"'), "one.toml: params.n: must be of type int, got '4'"),
    (("count.ipynb", "none.ipynb"), "steps.count.notebook: unknown notebook 'none.ipynb'"),
    (("[steps.count]", '[steps.count]\nlanguage = "{step:world}"'), "count.language: unknown step 'world'"),
    (("[steps.count]", '[steps.count]\nlanguage = "{step:count}"'), "need each other in a circle: count"),
    (("[steps.count]", "[steps.count]\nmemory = 3"), "steps.count.memory: unknown parameter 'memory'"),
    (("[steps.count]", '[steps."../count"]'), "steps: cannot be called '../count'"),
    (("[params]", 'extends = "none"\n[params]'), "unknown recipe 'none'"),
    (("[params]", 'extends = "one"\n[params]'), "one.toml: extends: extends itself"),
    (("[steps.count]", "[steps.count]\neach = { n = [] }"), "steps.count.each.n: must be a list of values"),
    (("[params]", 'required = ["model"]\n[params]'), "recipe one needs model (add --set model=...)"),
    ((RECIPE, ""), "one.toml: name: cannot be called ''"),
]


@pytest.mark.parametrize("change, line", BROKEN)
def test_broken_recipe(recipe, tmp_path, change, line):
    write_bytes(tmp_path / "one.toml", RECIPE.replace(*change).encode())
    for verb in ("run", "plan"):
        refused = s3ft(verb, recipe, "--out", tmp_path / "run")
        assert refused.exit_code == 2 and line in refused.stderr and refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_named_in_the_file_that_has_it(recipe, tmp_path):
    write_bytes(tmp_path / "two.toml", b'name = "two"\nextends = "one"\n[steps.count]\nrate = 0.25\n')
    plan = json.loads(s3ft("plan", tmp_path / "two.toml", "--json").stdout)
    assert [(row["step"], row["params"]["n"], row["params"]["rate"]) for row in plan["steps"]] == [("count", 4, 0.25)]
    write_bytes(tmp_path / "one.toml", RECIPE.replace("n = 4", 'n = "4"').encode())
    assert "one.toml: params.n: must be of type int" in s3ft("plan", tmp_path / "two.toml").stderr
    write_bytes(tmp_path / "two.toml", b'name = "two"\nextends = "one"\n[steps.count]\nrate = "x"\n')
    write_bytes(tmp_path / "one.toml", RECIPE.encode())
    assert "two.toml: steps.count.rate: must be of type float" in s3ft("plan", tmp_path / "two.toml").stderr


def test_unknown_recipe_lists_the_known_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = s3ft("run", "no-such-thing-at-all")
    assert refused.exit_code == 2 and "unknown recipe 'no-such-thing-at-all' (known: " in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_broken_parameters_cell(recipe, tmp_path):
    write_json(tmp_path / "count.ipynb", small_notebook(CELL + "\ntotal = n * 2"))
    refused = s3ft("run", recipe)
    assert refused.exit_code == 2 and "count.ipynb: parameters cell holds 'total = n * 2'" in refused.stderr


def test_run_prints_where_the_report_is(recipe, tmp_path):
    done = s3ft("run", recipe, "n=5")
    assert done.exit_code == 0, done.stderr
    page = tmp_path / "runs" / "one" / "count" / "index.html"
    assert done.stdout == f"results: {page}\n" and page.read_text() == "5"
    plan = s3ft("plan", recipe, "n=5", "--json")
    assert json.loads(plan.stdout)["steps"][0]["state"] == "done"
    assert json.loads(s3ft("plan", recipe, "--json").stdout)["steps"][0]["state"] == "to do"
    other = s3ft("run", write_bytes(tmp_path / "two.toml", RECIPE.replace('"one"', '"two"').encode()), "--out", page.parent.parent)
    assert other.exit_code == 2 and "holds a run of one" in other.stderr


def test_failed_step_exits_with_1(recipe, tmp_path):
    write_json(tmp_path / "count.ipynb", small_notebook(CELL, "1 / 0"))
    failed = s3ft("run", recipe)
    assert failed.exit_code == 1 and "ZeroDivisionError: division by zero" in failed.stderr
    assert (tmp_path / "runs" / "one" / "count" / "notebook.ipynb").exists()


def test_help_is_quick_and_imports_nothing_heavy():
    code = ("import sys; from typer.testing import CliRunner; from s3ft_nb.cli import app; [CliRunner().invoke(app, [*verb, '--help']) for verb in ([], ['measure'], ['annotate', 'agree'])];"
            "print([name for name in ('torch', 'transformers', 'papermill', 'psutil', 'matplotlib') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_convert_refuses_with_file_and_line(tmp_path):
    bad = write_bytes(tmp_path / "bad.jsonl", b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messages": \n')
    refused = s3ft("convert", bad, tmp_path / "out.jsonl")
    assert refused.exit_code == 2 and "bad.jsonl:2" in refused.stderr and not (tmp_path / "out.jsonl").exists()


def test_doctor_asks_for_decisions_and_keeps_them(tmp_path):
    model = str(tiny_model(tmp_path / "gemma", "gemma"))
    asked = s3ft("doctor", model)
    assert asked.exit_code == 1 and "system: the system prompt is refused" in asked.stdout
    facts = json.loads(s3ft("doctor", model, "--json").stdout)
    assert facts["system_role"] == "refused" and facts["policy"]["system"] == "first_user" and facts["trainable"]
    assert s3ft("doctor", model, "--system", "every_user").exit_code == 0
    assert s3ft("doctor", model, "--system", "somewhere").exit_code == 2
    assert s3ft("doctor", model, "--system", "native").exit_code == 1  # it cannot be had
    kept = s3ft("doctor", model, "--system", "every_user", "--save", tmp_path / "mine")
    assert kept.exit_code == 0 and "Talk like a sailor.\n\nAnd the sun?" in kept.stdout
    again = s3ft("doctor", tmp_path / "mine")
    assert again.exit_code == 0 and "system='every_user'" in again.stdout
    assert s3ft("doctor", model, "--save", tmp_path / "mine").exit_code == 2  # something is there
    assert s3ft("doctor", tmp_path / "nowhere").exit_code == 2


def test_doctor_on_rubbish_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tiny_model(tmp_path / "broken", "llama")
    (broken / "chat_template.jinja").write_text("{% for m in messages %}")
    for folder, said in ((tmp_path / "empty", "cannot load the tokenizer"), (broken, "refuses these messages")):
        refused = s3ft("doctor", folder)
        assert refused.exit_code in (1, 2) and said in refused.output and "Traceback" not in refused.output


@pytest.mark.parametrize("words", ["plan", "--help", "doctor micro-base --json", "recipes", "doctor micro-base"])
def test_a_reader_that_leaves_is_no_error(words):
    shell = subprocess.run(["bash", "-c", f"{sys.executable} -c 'from s3ft_nb.cli import app; app()' {words} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert shell.stderr == "" and shell.stdout.strip() in ("0", "141", "1" if words == "--help" else "")


def test_names_and_terminals_of_any_encoding(tmp_path):
    name = tmp_path / b"talk\xff.toml".decode(errors="surrogateescape")
    name.write_text(RECIPE.replace("One step.", "\\u001b]0;title\\u0007 \\u202eeno 一步"))
    write_json(tmp_path / "count.ipynb", small_notebook(CELL))
    for encoding in ("utf-8", "ascii", "latin-1"):
        found = subprocess.run([sys.executable, "-c", "from s3ft_nb.cli import app; app()", "plan", name, "--out", tmp_path / "a"],
                               capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert found.returncode == 0 and b"Traceback" not in found.stderr, found.stderr
        assert b"\x1b" not in found.stdout and "\u202e".encode() not in found.stdout and rb"\u001b]0;title\u0007" in found.stdout


def test_micro_base_is_the_bundled_model_in_every_verb(tmp_path, monkeypatch):
    from s3ft_nb.lm.model import context_length, load, model_hash, token_counter
    monkeypatch.chdir(tmp_path)
    bundled = str(resource("data", "micro-base"))
    assert s3ft("doctor", "micro-base").stdout == s3ft("doctor", bundled).stdout
    assert s3ft("doctor", "micro-base", "--save", tmp_path / "mine").exit_code == 0 and (tmp_path / "mine" / "config.json").exists()
    assert model_hash("micro-base") == model_hash(bundled) and context_length("micro-base") == context_length(bundled)
    assert token_counter("micro-base")([{"role": "user", "content": "Hi"}]) and load("micro-base", "none", device="cpu").name == "micro-base"
    costs = [[row["seconds"] for row in json.loads(s3ft("plan", "s3ft-smoke", f"model={name}", "--json").stdout)["steps"]] for name in ("micro-base", bundled)]
    assert costs[0] == costs[1]


def test_a_run_says_first_what_it_will_do(recipe, tmp_path):
    done = s3ft("run", recipe)
    assert done.stderr.splitlines()[0] == f"one: 1 of 1 steps in {tmp_path / 'runs' / 'one'}, about 3 s on a CPU, 3 s on a small GPU"
    assert "one: 0 of 1 steps" in s3ft("run", recipe).stderr and "nothing to do" in s3ft("run", recipe).stderr


TWO = RECIPE + '[steps.after]\nnotebook = "after.ipynb"\nlanguage = "{step:count}/facts.json"\n'


def test_how_long_a_step_took_is_no_result(recipe, tmp_path):
    write_json(tmp_path / "count.ipynb", small_notebook(CELL, "import json, time\nfrom pathlib import Path\nfacts = {'n': n, 'log': [{'train_runtime': time.time()}], 'finished': time.ctime()}\n"
                                                            "Path(out, 'facts.json').write_text(json.dumps(facts))"))
    write_json(tmp_path / "after.ipynb", small_notebook(CELL, "from pathlib import Path\nPath(out, 'n').write_text('')"))
    path = write_bytes(tmp_path / "two.toml", TWO.replace('"one"', '"two"').encode())
    assert s3ft("run", path).exit_code == 0
    before = (tmp_path / "runs/two/count/facts.json").read_bytes()
    assert "[2/2] after is done, skipped" in s3ft("run", path, "--from", "count").stderr
    assert (tmp_path / "runs/two/count/facts.json").read_bytes() != before
    assert "[2/2] after done" in s3ft("run", path, "count.n=9").stderr


@pytest.mark.parametrize("how", ["absolute", "up", "link", "base"])
def test_a_recipe_runs_notebooks_of_its_own_folder_only(recipe, tmp_path, how):
    write_json(tmp_path / "away" / "there.ipynb", small_notebook(CELL, "open('ran', 'w')"))
    (tmp_path / "home").mkdir()
    name = {"absolute": str(tmp_path / "away/there.ipynb"), "up": "../away/there.ipynb", "link": "here.ipynb", "base": "there.ipynb"}[how]
    if how == "link": (tmp_path / "home/here.ipynb").symlink_to(tmp_path / "away/there.ipynb")
    text, own = RECIPE.replace("count.ipynb", name), tmp_path / "home/own.toml"
    if how == "base":
        write_bytes(tmp_path / "away/base.toml", text.encode())
        text = f'name = "own"\nextends = "{tmp_path}/away/base.toml"\n'
    refused = s3ft("run", write_bytes(own, text.encode()))
    assert refused.exit_code == 2 and "outside of the recipe's folder (read that notebook" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_a_plan_reads_the_file_of_conversations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talks = [{"messages": [{"role": "user", "content": f"How deep is harbour {i}?"}, {"role": "assistant", "content": "Nine fathoms."}]} for i in range(30)]
    path = write_bytes(tmp_path / "talks.jsonl", "".join(json.dumps(row) + "\n" for row in talks).encode())
    words = ["s3ft-smoke", f"conversations.conversations={path}", "conversations.n_conversations=200", "conversations.n_eval_conversations=50"]
    plan = json.loads(s3ft("plan", *words, "--json").stdout)
    assert "holds 30 usable conversations of the 250 asked for: about 24 are left to train on and 6 to measure with" in plan["warnings"][0]
    assert next(row["rows"] for row in plan["steps"] if row["step"] == "conversations") == 30
    assert "warning: conversations: " in s3ft("plan", *words).stdout
    assert json.loads(s3ft("plan", "s3ft-smoke", "--json").stdout)["warnings"] == []
