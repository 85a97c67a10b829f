"The embedded default: what its weights were trained on stays as it was."
import hashlib
import json
import random

from s3ft_nb.core.files import read_rows, resource
from s3ft_nb.core.records import SystemPrompt
from s3ft_nb.judging.rubric import judge_messages
from s3ft_nb.methods.constraints import add_messages
from s3ft_nb.methods.rnr import write_messages
from s3ft_nb.methods.s3ft.pool import grow_messages
from s3ft_nb.methods.s3ft.restyle import rewriting_messages
from s3ft_nb.methods.selfalign import align_messages, instruct_messages, question_messages, topic_messages, wording
from s3ft_nb.micro import world
from s3ft_nb.micro.skills import SKILLS

JUDGE = "8a1035ca71c2"
EXPLAIN = "ab72122525c5"
RESTYLE = "70c3cf3e79eb"
GROW = "9bfdfda49288"
SISTERS = "cf3daf41b642"
WORLD = "667e507344e5"
PROMPTS = "283be504b6f8"


ASKS = {
    "restyle": rewriting_messages, "grow": grow_messages, "write": write_messages, "add": add_messages, "instruct": instruct_messages,
    "topics": topic_messages, "questions": question_messages, "align": align_messages, "meta": wording("en")["meta"],
}


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


def test_bundled_prompts_are_of_this_world():
    for row in read_rows(resource("data", "micro-world", "prompts.jsonl"), SystemPrompt):
        assert row.checks == world.checks_of(row.text) and (row.split == "eval") == world.for_evaluation(row.text)


def test_nothing_reserved_is_practised():
    "Texts and sets that are kept for evaluation, in every message that the base reads."
    rng = random.Random(0)
    for name, (skill, _) in SKILLS.items():
        for _ in range(150):
            row = skill(rng, ASKS)
            settings = [m.content for m, _ in row if m.role == "system" and name in ("chat", "rules")]
            settings += [part.split("\n[")[0] for m, _ in row for part in m.content.split("[Setting]\n")[1:]]
            assert not [text for text in settings if world.for_evaluation(text) or world.set_held_out(world.read_prompt(text))], name
