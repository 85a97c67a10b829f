"The embedded default: what its weights were trained on stays as it was."
import hashlib
import json

from s3ft_nb.judging.rubric import judge_messages
from s3ft_nb.methods.s3ft.pool import grow_messages
from s3ft_nb.methods.s3ft.restyle import rewriting_messages
from s3ft_nb.micro import world

JUDGE = "bbe21d3ee932"
RESTYLE = "84caf696c2ed"
GROW = "9bfdfda49288"
WORLD = "667e507344e5"
PROMPTS = "509cb2b689be"


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def test_requests_are_worded_as_in_pretraining():
    "The micro base knows these requests by heart; another wording is another skill."
    prompt = [{"role": "user", "content": "Where does green tea come from?"}]
    assert digest(judge_messages("You are a pirate.", prompt, "Arr!")) == JUDGE
    assert digest(rewriting_messages("You are a pirate.", prompt, "From Japan.")) == RESTYLE
    assert digest(grow_messages(["a", "b", "c"])) == GROW


def test_the_world_is_what_it_was():
    rows, truth = world.conversations(20, "eval", 3)
    assert digest([row.model_dump() for row in rows]) == WORLD
    assert digest([row.text for row in world.system_prompts(5, "train", 1)]) == PROMPTS
    assert list(truth) == [row.id for row in rows]
