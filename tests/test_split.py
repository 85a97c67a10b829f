"Properties of the split: nothing is in both halves, every row is accounted for, order does not matter."
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from s3ft_nb.core.files import InputError
from s3ft_nb.core.records import Conversation, SystemPrompt
from s3ft_nb.core.split import assert_no_leak, conversation_text, families, split_conversations, split_prompts
from s3ft_nb.core.stage import Ledger
from s3ft_nb.methods.s3ft.pool import seed_prompts

texts = st.lists(st.sampled_from("sea fog oak lamp bread stone river glass".split()), min_size=1, max_size=5).map(" ".join)
splits = st.sampled_from([None, None, None, "train", "eval"])
prompt_rows = st.lists(st.tuples(texts, st.sampled_from(["tone", "format"]), splits), min_size=1, max_size=25)


@settings(max_examples=150, deadline=None)
@given(prompt_rows, st.integers(0, 9), st.sampled_from([0.1, 0.3, 0.9]), st.sampled_from([None, "tone"]))
def test_split_properties(drawn, seed, fraction, held_out):
    rows = [SystemPrompt(id=f"p{i:02d}", text=text, type=type, split=split) for i, (text, type, split) in enumerate(drawn)]
    if held_out not in {row.type for row in rows}: held_out = None
    ledger = Ledger("split")
    train, evaluation = split_prompts(rows, seed, fraction, held_out, ledger)
    ledger.reconcile(len(rows), len(train) + len(evaluation))
    assert_no_leak(train, evaluation)
    assert held_out not in {row.type for row in train}
    before = {row.id: row.split for row in rows}
    assert all(before[row.id] in (None, half) and row.split == half for half, some in (("train", train), ("eval", evaluation)) for row in some)
    kin = families(rows)
    for type in {row.type for row in rows}:
        mine, others = ({row.family for row in kin if (row.type == type) == same} for same in (True, False))
        undecided = all(row.split is None for row in kin if row.family in mine)
        if undecided and not held_out and len(mine - others) >= 2: assert any(row.type == type for row in evaluation)


def test_split_does_not_depend_on_order():
    rows = seed_prompts() + seed_prompts("zh")
    assert len({row.family for row in families(rows)}) == len(rows)  # no two seeds are near-duplicates
    sides = lambda rows: {row.id: row.split for half in split_prompts(rows, 4) for row in half}  # noqa: E731
    assert sides(rows) == sides(rows[::-1])


def test_a_pool_of_a_thousand_is_split_in_seconds():
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "ka lo mi ru te sa no pe".split() for b in "ren dul mak sor tin vel".split()]
    rows = [SystemPrompt(id=f"p{i}", text=" ".join(rng.sample(words, 8)), type=f"type{i % 10}") for i in range(1000)]
    assert [len(half) for half in split_prompts(rows, seed=0)] == [900, 100]


def talk(i, split=None):
    contents = [f"Question {i}", f"Answer {i % 7}", f"More {i}?", f"Yes {i}"]
    return Conversation(id=f"c{i}", split=split, messages=[{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), splits), min_size=2, max_size=40), st.integers(1, 20), st.integers(1, 6), st.integers(0, 5))
def test_conversation_split_properties(drawn, n_train, n_eval, seed):
    rows = [talk(text, split).model_copy(update={"id": f"id{i}"}) for i, (text, split) in enumerate(drawn)]
    ledger = Ledger("split")
    try: train, evaluation = split_conversations(rows, n_train, n_eval, seed, ledger)
    except InputError as error:
        assert "cannot fill both halves" in str(error)
        return
    ledger.reconcile(len(rows), len(train) + len(evaluation))
    assert len(train) <= n_train and len(evaluation) <= n_eval
    assert not {conversation_text(row) for row in train} & {conversation_text(row) for row in evaluation}
    before = {row.id: row.split for row in rows}
    assert all(before[row.id] in (None, row.split) for row in train + evaluation)
