"Judges of pairs that follow the place of a response are found out."

import random
import warnings

import numpy as np
import pytest

from s3ft_nb.core.records import Message
from s3ft_nb.judging.pairs import judge_pairs, pair_outcome, pair_summary


class Fake:
    "A judge that picks a label by `pick(request id, messages)`."
    name = "fake"
    def __init__(self, pick=lambda id, text: 0, outside=0.02, text=""): self.pick, self.outside, self.text = pick, outside, text
    def score(self, requests, labels, progress=None):
        picks = [self.pick(one["id"], one["messages"][1]["content"]) for one in requests]
        return [{"id": one["id"], "logprobs": [-0.05 if i == pick else -5.0 for i in range(len(labels))], "outside": self.outside} for one, pick in zip(requests, picks)]
    def generate(self, requests, seed=0, progress=None): return [{"id": one["id"], "text": self.text} for one in requests]


PAIRS = [{"id": f"p{i}", "conversation_id": f"c{i // 3}", "system_prompt": "Be shy.", "prompt": [Message(role="user", content="Hi?")], "a": f"Oh, hm {i}.", "b": f"HELLO {i}!"} for i in range(60)]


@pytest.mark.parametrize("place", [0, 1])
def test_a_judge_of_places_is_found_out(place):
    rows = judge_pairs(Fake(lambda id, text: place), PAIRS)
    with pytest.warns(UserWarning, match="POSITION BIAS: the judge chose the (first|second) place in both orders 60 times"): found = pair_summary(rows)
    assert (found["tie"], found["a"], found["b"], found["win_rate"]["mean"]) == (60, 0, 0, 0.5)


def test_a_leaning_judge_is_found_out_and_a_fair_one_is_not():
    rng = random.Random(0)
    shown_first = lambda text: int(text.index("Oh, hm") > text.index("HELLO"))  # the place of response a
    leaning = Fake(lambda id, text: 0 if rng.random() < 0.5 else shown_first(text))
    fair = Fake(lambda id, text: shown_first(text) if rng.random() < 0.9 else 1 - shown_first(text))
    with pytest.warns(UserWarning, match="POSITION BIAS"): pair_summary(judge_pairs(leaning, PAIRS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pair_summary(judge_pairs(fair, PAIRS))["win_rate"]["low"] > 0.5


def test_a_merely_unsure_judge_is_rarely_called_biased():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        answers = rng.choice(["A", "B"], (60, 2))
        rows = [dict(zip(("winner", "place"), pair_outcome(*both)), conversation_id="c") for both in answers.tolist()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            alarms += pair_summary(rows)["warning"].startswith("POSITION")
    assert alarms / 400 <= 0.06
