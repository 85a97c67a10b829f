"A method that does nothing, added as one room, one notebook and one recipe, touching no other file."
import json

import pytest

from s3ft_nb.core.files import read_rows, write_json
from s3ft_nb.run.plan import make_plan
from s3ft_nb.run.recipe import small_notebook
from s3ft_nb.run.runner import run_recipe

ROOM = '''
def unchanged(conversations, prompt):
    "Training rows with the responses as they are."
    system = {"role": "system", "content": prompt}
    for row in conversations:
        messages = [message.model_dump() for message in row.messages if message.role != "system"][:2]
        yield {"id": row.id, "messages": [system, messages[0]], "response": messages[1]["content"]}
'''
NOTEBOOK = ('out = ""  # Folder of this step\nconversations_from = ""  # Folder of the conversations\nprompts = ""  # File of system prompts', """
from pathlib import Path
from nothing import unchanged
from s3ft_nb.core.files import read_rows, write_rows
from s3ft_nb.core.records import Conversation, SystemPrompt
conversations = read_rows(Path(conversations_from) / "train.jsonl", Conversation)
write_rows(Path(out) / "rows.jsonl", list(unchanged(conversations, read_rows(prompts, SystemPrompt)[0].text)))
""")
RECIPE = '''
name = "nothing"
extends = "micro"
[steps]
world = { n_conversations = 16, n_eval_conversations = 8, eval_turns = 3, n_prompts = 2, n_eval_prompts = 2 }
conversations = { n_conversations = 16, n_eval_conversations = 8 }
measure = { dialogues = 4, turns = 2, guard = 0 }
[steps.nothing]
notebook = "nothing.ipynb"
conversations_from = "{step:conversations}"
prompts = "{step:world}/prompts.jsonl"
[steps.train]
notebook = "shared/train.ipynb"
each = { arm = ["nothing"] }
rows = "{step:nothing}/rows.jsonl"
num_train_epochs = 1.0
'''


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "nothing.py").write_text(ROOM)
    write_json(tmp_path / "nothing.ipynb", small_notebook(*NOTEBOOK))
    (tmp_path / "nothing.toml").write_text(RECIPE)
    return tmp_path / "nothing.toml"


def test_its_arm_is_measured_and_reported(recipe, tmp_path):
    steps = {row["step"]: row for row in make_plan(recipe, out=tmp_path / "run")["steps"]}
    assert list(steps) == ["world", "conversations", "nothing", "train-nothing", "measure", "report"]
    assert steps["measure"]["params"]["adapter"] == ["nothing={step:train-nothing}/adapter"]
    assert "{step:nothing}" in steps["report"]["params"]["folders"]


@pytest.mark.slow
def test_it_runs(recipe, tmp_path):
    run = run_recipe(recipe, out=tmp_path / "run")
    assert {row["arm"] for row in read_rows(run / "report" / "numbers.jsonl") if row["metric"] == "adherence"} == {"base", "nothing"}
    assert json.loads((run / "run.json").read_text())["finished"]
