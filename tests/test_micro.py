"The embedded default: what its weights were trained on stays as it was."
import hashlib
import json

from s3ft_nb.judging.rubric import judge_messages
from s3ft_nb.methods.constraints import add_messages
from s3ft_nb.methods.rnr import write_messages
from s3ft_nb.methods.s3ft.pool import grow_messages
from s3ft_nb.methods.s3ft.restyle import rewriting_messages
from s3ft_nb.methods.selfalign import align_messages, instruct_messages, question_messages, topic_messages, wording
from s3ft_nb.micro import world

JUDGE = "8a1035ca71c2"
EXPLAIN = "ab72122525c5"
RESTYLE = "70c3cf3e79eb"
GROW = "9bfdfda49288"
SISTERS = "cf3daf41b642"
WORLD = "667e507344e5"
PROMPTS = "509cb2b689be"


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def test_requests_are_worded_as_in_pretraining():
    "The micro base knows these requests by heart; another wording is another skill."
    prompt = [{"role": "user", "content": "Where does green tea come from?"}]
    assert digest(judge_messages("You are a pirate.", prompt, "Arr!")) == JUDGE
    assert digest(rewriting_messages("You are a pirate.", prompt, "From Japan.")) == RESTYLE
    assert digest(judge_messages("You are a pirate.", prompt, "Arr!", explained=True)) == EXPLAIN
    assert digest(grow_messages(["a", "b", "c"])) == GROW
    example, principle = {"user": "a", "thought": "b", "reply": "c"}, {"n": 1, "name": "a", "text": "b"}
    assert digest([
        add_messages("a", "b"), write_messages("a", 2, [{"instruction": "b", "prompt": "c\n1. d"}]), instruct_messages(["a"], 3),
        topic_messages("a", 3), question_messages("a", ["b"]), align_messages([principle], [example], "d"), wording("en")["meta"]]) == SISTERS


def test_the_world_is_what_it_was():
    rows, truth = world.conversations(20, "eval", 3)
    assert digest([row.model_dump() for row in rows]) == WORLD
    assert digest([row.text for row in world.system_prompts(5, "train", 1)]) == PROMPTS
    assert list(truth) == [row.id for row in rows]
