"Some hundreds of the damaged inputs of `fuzz.py`, by fixed seeds."
import pytest
from fuzz import FUZZERS, fuzz

N = {"conversations": 300, "ifeval": 150}


@pytest.mark.parametrize("kind", FUZZERS)
def test_damaged_inputs_are_accounted_for_or_refused_in_one_line(kind):
    assert not fuzz(kind, N.get(kind, 100))
