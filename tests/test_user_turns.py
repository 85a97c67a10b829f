"The bundled user turns are whole."

import pytest

from s3ft_nb.core.files import read_rows, resource


@pytest.mark.parametrize("name, kinds", [("en", (220, 36, 44)), ("zh", (180, 30, 36)), ("micro", (420, 24, 24))])
def test_user_turns_are_whole(name, kinds):
    threads = read_rows(resource("data", "user-turns", f"{name}.jsonl"))
    assert all(sorted(row) == ["id", "kind", "language", "set", "topic", "turns"] for row in threads)
    assert tuple(sum(len(row["turns"]) for row in threads if row["kind"] == kind) for kind in ("neutral", "aligned", "conflicting")) == kinds
    said = [turn for row in threads for turn in row["turns"]]
    assert all(3 <= len(turn) <= 120 and turn == turn.strip() for turn in said) and len({row["id"] for row in threads}) == len(threads)
    if name != "micro": assert len(set(said)) == len(said)  # in the micro world a follow-up fits many threads
