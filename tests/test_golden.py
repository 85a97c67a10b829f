"""What was computed from recorded rows stays: means as the first version of the package gave them, intervals as they are.

The rows are verdicts of a smoke run and of a small measurement. A change of a number here is a change of a definition:
raise the metric's version, say so in CHANGELOG.md, and write the fixture anew.
"""

import gzip
import json
from pathlib import Path

import pytest

from s3ft_nb.core.files import iter_lines
from s3ft_nb.measure.metrics import differences, numbers
from s3ft_nb.measure.verdicts import verdict_table

RECORDED = Path(__file__).parent / "fixtures/recorded"
EXPECTED = json.loads(gzip.decompress((RECORDED / "expected.json.gz").read_bytes()))
NAMES = ("arm", "history", "part", "key", "metric", "against")


@pytest.fixture(scope="module", params=list(EXPECTED))
def measured(request):
    tables = verdict_table(row for _, row in iter_lines(RECORDED / f"{request.param}.jsonl.gz"))
    rows = numbers(tables)
    for against in dict.fromkeys(arm for arm, _ in tables): rows += differences(tables, against)
    found = {}
    for row in rows: found.setdefault(tuple(row[name] for name in NAMES), row)
    return found, EXPECTED[request.param]


def test_means_are_those_of_the_first_version(measured):
    found, expected = measured
    for *key, mean in expected["old_means"]:
        row = found.get(tuple(key))
        if mean is None: assert row is None or row["mean"] is None, key
        else: assert row["mean"] == pytest.approx(mean, abs=1e-9), key


def test_intervals_are_pinned(measured):
    found, expected = measured
    for *key, low, high in expected["intervals"]:
        row = found[tuple(key)]
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-8), pytest.approx(high, abs=1e-8)), key
