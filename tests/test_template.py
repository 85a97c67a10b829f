"""The template room against every chat template at hand: random dialogues, forged control tokens, a table of verdicts."""

import json
import os
import random
import re
import sys
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

sys.path.insert(0, str(Path(__file__).parent))
from templates import FILES, FIXTURES, SHIPPED, tokenizer_of, verdicts
from tiny import LINES

from s3ft_nb.core.records import is_blank
from s3ft_nb.core.stage import Ledger
from s3ft_nb.core.files import InputError
from s3ft_nb.lm.doctor import recommend, set_policy, verdict
from s3ft_nb.lm.labels import closing_ids, encode, encode_within, shown_row, stop_ids
from s3ft_nb.lm.labels import check_labels, encode_rows
from s3ft_nb.lm.template import Policy, TemplateLimit, chat_template, control_tokens, fold, in_use, ordered_messages, prompt_ids, split_reasoning, with_policy

TABLE = json.loads((FIXTURES / "verdicts.json").read_text(encoding="utf-8"))
USABLE = [name for name, one in TABLE.items() if one["trainable"]]


@cache
def ready(name):
    "The tokenizer with the recommended policy written into its template."
    tokenizer = tokenizer_of(name)
    set_policy(tokenizer)
    return tokenizer


def runs_of(tokenizer, row):
    "Decoded text of every stretch of supervised tokens."
    runs, open = [], False
    for label in row["labels"]:
        if label == -100: open = False
        elif open: runs[-1].append(label)
        else: runs, open = [*runs, [label]], True
    return [tokenizer.decode(run) for run in runs]


# ---- random dialogues

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25)
odd = st.sampled_from([".", "0", "𝕏", "\u202eabc", "a\u0301", "👩‍👩‍👧", "  x  ", "مرحبا", "你好。", "{{ messages }}", "{% raw %}", "user", "assistant", "\ufdd0", "a\n\n\nb", "\x00b"])
forged = st.sampled_from(["<|im_end|>", "</s>", "[INST]", "<think>", "</think>", "<end_of_turn>", "<|eot_id|>", "<|im_start|>system\n", "/nothink", "<tool_response>"])
long = st.builds(lambda word, n: f"{word} " * n, st.sampled_from(["moon", "月亮", "tide-"]), st.integers(100, 400))
words = st.lists(st.one_of(text, text, odd, forged), min_size=1, max_size=4).map("".join).filter(lambda text: not is_blank(text))
content = st.one_of(words, words, words, long)


@st.composite
def dialogues(draw):
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 8))):
        messages += [{"role": role, "content": draw(words)} for role in ("user", "assistant")]
    messages[draw(st.integers(0, len(messages) - 1))]["content"] = draw(content)
    return messages


def reasons(messages):
    "Whether a reply looks like reasoning: what becomes of it has tests of its own."
    try:
        return any(split_reasoning(one["content"].strip())[0] is not None for one in messages if one["role"] == "assistant")
    except InputError:
        return True


@pytest.mark.parametrize("name", USABLE)
@settings(max_examples=int(os.environ.get("S3FT_EXAMPLES", 12)), deadline=None, derandomize=True)
@given(messages=dialogues())
def test_labels_are_the_responses_and_every_text_is_there(name, messages):
    tokenizer, facts = ready(name), TABLE[name]
    train_on = "all" if facts["prefix_stable"] else "last"
    if reasons(messages): return
    row = encode(tokenizer, messages, train_on)
    responses = [one["content"].strip() for one in messages if one["role"] == "assistant"]
    learnt = responses if train_on == "all" else responses[-1:]
    runs = runs_of(tokenizer, row)
    assert len(runs) == len(learnt)
    for run, response in zip(runs, learnt):  # white space that the template itself puts around a response is its end's or its beginning's
        at = run.find(response)
        assert not run[:at].strip() and run[at + len(response) :].strip() == facts["end_of_turn"]["text"]
    shown, at = tokenizer.decode(row["input_ids"]), 0
    system = facts["policy"]["system"]
    for one in [*fold(messages[:-1], system), messages[-1]]:
        at = shown.index(one["content"].strip(), at) + len(one["content"].strip())
    if train_on == "last": assert row["input_ids"][: row["labels"].count(-100)] == prompt_ids(tokenizer, messages[:-1])


# ---- forgery


def attempts(name, n, seed):
    "Dialogues in which one message or all try to write what the template writes."
    rng, tokenizer = random.Random(f"{name}{seed}"), ready(name)
    tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]
    plain = ["hi", " ", "\n", "|", "<", ">", "im_end", "system", "\u200b", "＜", "\ufdd0", "user\n", "end_of_turn"]

    def piece():
        token = rng.choice(tokens)
        cut = rng.randrange(1, len(token)) if len(token) > 1 else 0
        return rng.choice([token, token, token.upper(), token[:cut] + token + token[cut:], token[:cut] + " " + token[cut:], token + "\n" + rng.choice(tokens), rng.choice(plain)])

    for _ in range(n):
        roles = ["system"] * rng.randrange(2) + ["user", "assistant"] * rng.randrange(1, 4)
        aim = rng.choice([None, *range(len(roles))])
        say = lambda i: "x" + "".join(piece() for _ in range(rng.randrange(1, 6))) if aim in (None, i) else "fine"
        yield [{"role": role, "content": say(i)} for i, role in enumerate(roles)]


def test_ten_thousand_forgeries_make_no_control_token():
    tried = 0
    for name in USABLE:
        tokenizer = ready(name)
        _, control = control_tokens(tokenizer, in_use(tokenizer)[1])
        count = lambda messages: [id for id in encode(tokenizer, messages)["input_ids"] if id in control]
        honest = {}
        for messages in attempts(name, 10_000 // len(USABLE) + 1, seed=0):
            roles = tuple(one["role"] for one in messages)
            if reasons(messages): continue  # what becomes of reasoning has tests of its own
            if roles not in honest: honest[roles] = count([one | {"content": "fine"} for one in messages])
            tried += 1
            assert count(messages) == honest[roles], messages
    assert tried >= 9_000


# ---- the table of verdicts


def test_verdicts_are_those_of_the_table():
    found = json.loads(json.dumps(verdicts()))
    assert list(found) == list(TABLE), "templates came or went"
    for name, one in found.items(): assert one == TABLE[name], f"{name} changed: read the difference, then run python tests/templates.py"


def raw(name, messages, generate=False):
    return render_jinja_template([messages], chat_template=FILES[name].read_text(), add_generation_prompt=generate, bos_token="<s>", eos_token="</s>")[0][0]


def cannot_mask(name):
    try: return get_training_chat_template(tokenizer_of(name)) is None and not re.search(r"\{%-? *generation", FILES[name].read_text())
    except ValueError: return True


def rewrites_history(name):
    "Prefix differencing on the template as it comes: the prompt of the first turn against the conversation that goes on."
    talk = [{"role": role, "content": f"word{i}"} for i, role in enumerate(("user", "assistant", "user"))]
    if TABLE[name]["policy"]["content"] == "parts": talk = [one | {"content": [{"type": "text", "text": one["content"]}]} for one in talk]
    return not raw(name, talk).startswith(raw(name, talk[:1], True))


# name: (counted by others, found by us, why it differs)
COUNTS = json.loads((FIXTURES / "counts.json").read_text(encoding="utf-8"))


def test_counts_agree_with_the_published_ones_or_say_why():
    facts = {name: TABLE[name] for name in SHIPPED}
    found = {
        "templates": sorted(SHIPPED),
        "no_assistant_only_loss": [name for name in SHIPPED if cannot_mask(name)],
        "hidden_text": [name for name, one in facts.items() if any(one["hidden_text"].values())],
        "date": [name for name, one in facts.items() if one["date_dependent"]],
        "not_prefix_stable_as_they_come": [name for name in SHIPPED if rewrites_history(name)],
        "not_prefix_stable_under_our_policy": [name for name, one in facts.items() if not one["prefix_stable"]],
        "system_refused": [name for name, one in facts.items() if one["system_role"] == "refused"],
    }
    assert {name: one["found"] for name, one in COUNTS.items()} == found
    for name, one in COUNTS.items(): assert one["published"] in (None, len(one["found"])) or one["why"], name


# ---- policies


@settings(max_examples=60, deadline=None, derandomize=True)
@given(messages=dialogues(), system=st.sampled_from(["native", "first_user", "every_user"]))
def test_the_stored_template_folds_as_the_servers_messages_are_folded(messages, system):
    tokenizer, prompt = tokenizer_of("yi"), ordered_messages(messages[:-1])
    if reasons(messages): return
    assert prompt_ids(tokenizer, prompt, Policy(system)) == prompt_ids(tokenizer, fold(prompt, system), Policy())


@pytest.mark.parametrize("name", SHIPPED)
def test_writing_a_policy_into_a_template_changes_nothing_else(name):
    source = FILES[name].read_text()
    talk = [{"role": role, "content": f"word{i}"} for i, role in enumerate(("user", "assistant", "user"))]
    wrapped = with_policy(source, Policy(reasoning="keep", content=TABLE[name]["policy"]["content"]))
    given = talk if TABLE[name]["policy"]["content"] == "text" else [one | {"content": [{"type": "text", "text": one["content"]}]} for one in talk]
    show = lambda template, messages: render_jinja_template([messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", enable_thinking=True, thinking=True)[0][0]
    if TABLE[name]["date_dependent"]: source = with_policy(source, Policy(reasoning="keep")).split("{# s3ft_nb begin #}")[0] + "\n" + source
    assert show(wrapped, talk) == show(source, given)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "glm4moe"])
def test_inference_without_us_renders_what_training_rendered(name):
    "Whoever uses the stored template, with whatever switch for reasoning, gets the prompt that was trained."
    tokenizer = ready(name)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for switch in ({}, {"enable_thinking": True}):
        shown = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **switch)
        assert shown == tokenizer.decode(prompt_ids(tokenizer, talk))


THOUGHT = [{"role": "user", "content": "How far is the moon?"}, {"role": "assistant", "content": "<think>\nFar.\n</think>\n\nVery far."}]
PLAIN = [*THOUGHT[:1], {"role": "assistant", "content": "Very far."}]


def test_reasoning_is_refused_or_removed():
    tokenizer = tokenizer_of("qwen3")
    learnt = lambda reasoning: runs_of(tokenizer, encode(tokenizer, THOUGHT, policy=recommend(tokenizer, reasoning=reasoning)))
    with pytest.raises(InputError, match="holds reasoning"): learnt("off")
    assert learnt("strip") == ["Very far.<|im_end|>"]
    with pytest.raises(InputError, match="does not end"): encode(tokenizer, [*THOUGHT[:1], {"role": "assistant", "content": "<think>Far"}])


@pytest.mark.parametrize(
    "name, learnt",
    [
        ("qwen3", "<think>\nFar.\n</think>\n\nVery far.<|im_end|>"),
        ("qwen3_8", "Far.\n</think>\n\nVery far.<|im_end|>"),
        ("qwen3_5_think", "Far.\n</think>\n\nVery far.<|im_end|>"),  # its prompt opens the reasoning
        ("nemotron_3_nano", "Far.\n</think>\nVery far.<|im_end|>"),
        ("deepseek_r1_distill", "Far.\n</think>\n\nVery far.<｜end▁of▁sentence｜>"),  # and leaves it out of the history
        ("glm4moe", "\n<think>Far.</think>\nVery far.<|user|>"),
    ],
)
def test_reasoning_is_kept(name, learnt):
    tokenizer = tokenizer_of(name)
    facts = verdict(tokenizer, reasoning="keep")
    set_policy(tokenizer, reasoning="keep")
    assert facts["trainable"] and not facts["decisions"]
    (row,) = encode_rows(tokenizer, [{"id": "a", "messages": THOUGHT, "train_on": "last"}], 512, Ledger("t"))
    assert runs_of(tokenizer, row) == [learnt]
    check_labels(tokenizer, [{"id": "a"} | row])
    if name in ("qwen3", "glm4moe"):  # a reply without reasoning is learnt behind the block that says so
        assert runs_of(tokenizer, encode(tokenizer, PLAIN))[0].strip().startswith("Very far.")


def test_reasoning_that_is_a_message_of_its_own_is_not_trained():
    tokenizer = tokenizer_of("gptoss")
    facts = verdict(tokenizer, reasoning="keep")
    assert not facts["trainable"] and "message of its own" in facts["why_not"] and facts["decisions"]


def test_forty_turns_are_cut_at_a_turn_and_the_ledger_says_so():
    tokenizer, books = ready("llama3"), Ledger("train")
    talk = [{"role": "system", "content": "Talk like a sailor."}]
    for i in range(40): talk += [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
    (row,) = encode_rows(tokenizer, [{"id": "a", "messages": talk, "train_on": "last"}], 512, books)
    shown, cut = tokenizer.decode(row["input_ids"]), books.notes["turns_cut"]
    assert 0 < cut < 40 and 400 < len(row["input_ids"]) <= 512 and books.notes["history_cut"] == 1
    assert "Talk like a sailor." in shown and f"Question {cut}?" in shown and f"Question {cut - 1}?" not in shown
    assert shown.split("<|start_header_id|>user")[0].endswith("Talk like a sailor.<|eot_id|>")
    refused = Ledger("train")
    with pytest.raises(InputError, match="none of 1 rows"): encode_rows(tokenizer, [{"id": "a", "messages": talk, "train_on": "last"}], 512, refused, "refuse")
    assert refused.dropped[0]["reason"] == "too_long"


# ---- templates that cannot be trusted


def changed(template):
    tokenizer = tokenizer_of("llama3")
    tokenizer.chat_template = template
    return tokenizer


TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "Aye."}]
LINE = "{{ m.role + ': ' + m.content + eos_token }}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else m.content | upper) + eos_token }}{% endfor %}" + PROMPT, "loses or changes the user's text"),
        ("{% for m in messages %}" + LINE + "{{ m.content }}{% endfor %}" + PROMPT, "moves or repeats the user's text"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + PROMPT, "does not end the response"),
        ("{% for m in messages %}" + LINE + "{% endfor %}", "puts 'assistant: ' before the response"),
        ("{% for m in messages %}{{ 'Well: ' if messages | length > 1 }}" + LINE + "{% endfor %}" + PROMPT, "puts 'Well: assistant: ' before the response|differently"),
        ("{% for m in messages %}{{ m.role + ': ' + (m.content | replace('there', 'THERE')) + eos_token }}{% endfor %}" + PROMPT, "changes 'hi there'"),
        ("{% for m in messages %}" + LINE + "{% endfor %}{{ 'Hm.' if 'there' in messages[0].content }}" + PROMPT, "or what is around it"),
    ],
)
def test_what_cannot_be_shown_exactly_is_refused(template, said):
    with pytest.raises(InputError, match=said): encode(changed(template), TALK)


def test_every_prompt_is_checked_and_not_only_the_last():
    sly = changed("{% for m in messages %}" + LINE + "{% endfor %}{{ 'Hm. ' if 'there' in messages[-1].content }}" + PROMPT)
    talk = [*TALK, {"role": "user", "content": "and now"}, {"role": "assistant", "content": "Aye."}]
    for train_on in ("all", "last"):
        with pytest.raises(InputError, match="or what is around it"): encode(sly, talk if train_on == "all" else TALK, train_on)
    lying = changed("{% for m in messages %}{{ m.role + ': ' + (m.content | replace('Aye', 'No')) + eos_token }}{% endfor %}" + PROMPT)
    with pytest.raises(InputError, match="changes 'Aye.'"): encode(lying, talk)  # as soon as a reply is history


def test_a_row_that_ends_with_the_user_is_cut_like_any_other():
    tokenizer, books = ready("llama3"), Ledger("t")
    long = [{"role": "user", "content": "moon " * 300}, *TALK[1:], *TALK, {"role": "user", "content": "more?"}]
    row, cut, _ = encode_within(tokenizer, long, 200, "all", note=books.note)
    assert cut == 1 and runs_of(tokenizer, row) == ["Aye.<|eot_id|>"] and books.notes["responses_cut"] == 1


def test_messages_of_one_speaker_are_joined_where_the_policy_says_so():
    tokenizer = tokenizer_of("llama3")
    set_policy(tokenizer, same_role="join")
    twice, books = [TALK[0], {"role": "user", "content": "anyone?"}], Ledger("t")
    (row,) = encode_rows(tokenizer, [{"id": "a", "messages": twice, "response": "Aye."}], 512, books)
    assert "hi there\n\nanyone?" in tokenizer.decode(row["input_ids"]) and books.notes["joined_same_role"] == 1
    with pytest.raises(InputError, match="ends with the assistant"): encode_rows(tokenizer, [{"id": "a", "messages": TALK, "response": "No."}], 512, books)


def test_what_ends_a_turn_may_be_written_and_takes_no_more():
    cohere = ready("cohere2")
    ends = cohere.convert_ids_to_tokens(closing_ids(cohere, in_use(cohere)[1]))
    assert ends == ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"] and cohere.convert_tokens_to_ids(ends[0]) not in stop_ids(cohere)
    twofold = changed("{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + bos_token }}{% endfor %}" + PROMPT)
    twofold.chat_template = "{{ bos_token }}" + twofold.chat_template
    assert runs_of(twofold, encode(twofold, TALK)) == ["Aye.</s>"]


def test_what_a_tokenizer_remembers_cuts_nothing():
    "Truncation and padding stored in a tokenizer's file, or left by an earlier call."
    tokenizer = tokenizer_of("llama3")
    wanted = encode(tokenizer, TALK)
    tokenizer("x" * 50, truncation=True, max_length=5)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    tokenizer.backend_tokenizer.encode_special_tokens = True
    assert encode(tokenizer, TALK) == wanted


def odd_tokenizer(kind):
    "Tokenizers with other habits than the table's."
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "prefix space": bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace(prepend_scheme="always")
    else: bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace(prepend_scheme="never")
    if kind == "normalising": bpe.normalizer = normalizers.NFKC()
    letters = sorted({*"".join(LINES), *"<|>/_[]xyz0123456789:abcdefghijklmnopqrstuvwxyzSATH \n＜＞"})
    bpe.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=letters, show_progress=False))
    habit = {"normalized": kind == "normalising", "rstrip": kind == "stripping", "lstrip": kind == "stripping"}
    bpe.add_special_tokens([AddedToken(f"<|{word}|>", special=True, **habit) for word in ("im_start", "im_end", "im")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = FILES["yi"].read_text()
    set_policy(tokenizer)
    return tokenizer


@pytest.mark.parametrize("kind", ["prefix space", "normalising", "stripping", "plain"])
def test_odd_tokenizers_are_exact_or_refuse(kind):
    tokenizer, rng, refused = odd_tokenizer(kind), random.Random(kind), 0
    _, control = control_tokens(tokenizer, in_use(tokenizer)[1])
    pieces = ["<|im_end|>", "<|im_start|>", "＜|im_end|＞", "<|im|>", "</s>", "<s>", "hi", " ", "\n", "<|im_<|im|>end|>", "user"]
    count = lambda messages: [id for id in encode(tokenizer, messages)["input_ids"] if id in control]
    for _ in range(300):
        talk = [{"role": role, "content": "x" + "".join(rng.choices(pieces, k=4)) + "y"} for role in ("user", "assistant") * 2]
        honest = count([one | {"content": "fine"} for one in talk])
        try:
            assert count(talk) == honest
            row = encode(tokenizer, talk)
            squeeze = lambda text: "".join(unicodedata.normalize("NFKC", text).split())
            assert squeeze(runs_of(tokenizer, row)[0]) == squeeze(talk[-1]["content"]) + "<|im_end|>"
        except InputError: refused += 1
    assert refused < (300 if kind == "normalising" else 1), refused


def test_a_later_turn_in_other_tokens_is_noted():
    tokenizer, books = odd_tokenizer("prefix space"), Ledger("t")
    talk = [*TALK, *TALK]
    encode(tokenizer, talk, "all", note=books.note)
    row = encode(tokenizer, talk, "all")
    same = row["input_ids"][: len(prompt_ids(tokenizer, talk[:3]))] == prompt_ids(tokenizer, talk[:3])
    assert bool(books.notes["history_in_other_tokens"]) != same


def test_tokenizer_that_writes_spaces_as_words():
    "A SentencePiece-like tokenizer: labels must not start with a space that the prompt does not lead to."
    bpe = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bpe.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(LINES + ["[INST][/INST]\n", "<|/>"], trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    assert set_policy(tokenizer).system == "first_user"
    row = encode(tokenizer, [{"role": "user", "content": "How far is the moon?"}, {"role": "assistant", "content": "Answer every question."}])
    pieces = tokenizer.convert_ids_to_tokens([id for id in row["labels"] if id != -100])
    assert pieces[-1] == "</s>" and "".join(pieces[:-1]) == "▁Answer▁every▁question."
    whole = tokenizer("<s>[INST] How far is the moon? [/INST] Answer every question.</s>", add_special_tokens=False)
    assert row["input_ids"] == whole["input_ids"]


def test_generation_stops_where_the_turn_ends():
    for name in USABLE:
        tokenizer = ready(name)
        end = tokenizer.backend_tokenizer.encode(TABLE[name]["end_of_turn"]["text"], add_special_tokens=False).ids[-1]
        assert end in stop_ids(tokenizer), name


def test_views_show_every_character():
    talk = [{"role": "system", "content": "Be <b>brief</b>."}, *TALK]
    for name in USABLE:
        tokenizer = ready(name)
        row = encode(tokenizer, talk)
        shown = shown_row(tokenizer, row, len(row["labels"])).replace("⟦", "").replace("⟧", "")
        assert "".join(shown.split()) == "".join(tokenizer.decode(row["input_ids"]).split()), name
    assert chat_template(ready("gemma")).startswith("{# s3ft_nb policy ")


# ---- thoughts in every form, and templates without end


@pytest.mark.parametrize("given", [
    "<think>Carry on.</think>\n<think>Or not.</think>\nNine.", "Carry on.\n</think>\n\nNine.", "So I carry on.</think> Nine.", "Carry on</think>Nine.",
    "[THINK]Carry on.[/THINK]Nine.", "<seed:think>Carry on.</seed:think>Nine.", "analysisCarry on.assistantfinalNine.",
    "<|start|>assistant<|channel|>commentary<|message|>Carry on.<|end|><|start|>assistant<|channel|>final<|message|>Nine.<|return|>",
])
def test_no_form_of_a_thought_is_learnt_as_the_response(given):
    tokenizer = tokenizer_of("llama3")
    talk = [{"role": "user", "content": "Four and five?"}, {"role": "assistant", "content": given}]
    with pytest.raises(InputError, match="holds reasoning"): encode(tokenizer, talk, policy=recommend(tokenizer))
    assert runs_of(tokenizer, encode(tokenizer, talk, policy=recommend(tokenizer, reasoning="strip"))) == ["Nine.<|eot_id|>"]


@pytest.mark.parametrize("given", ["Close it with `</think>`.", 'The word "</think>" closes it.', "I say </think>, you say nothing.", "assistantfinal is a word."])
def test_words_about_thoughts_are_a_response(given):
    assert split_reasoning(given) == (None, given)


def test_the_label_ends_where_the_turn_ends_and_not_with_a_thought():
    end = "{% if not (thinking | default(true)) %}<think></think>{% endif %}"
    tokenizer = changed("{% for m in messages %}<|start_header_id|>{{ m.role + ': ' + m.content + '<|eot_id|>' }}{% endfor %}"
                        "{% if add_generation_prompt %}<|start_header_id|>assistant: {% endif %}" + end)
    tokenizer.add_tokens(["<think>", "</think>"])
    assert runs_of(tokenizer, encode(tokenizer, TALK, policy=recommend(tokenizer))) == ["Aye.<|eot_id|>"]


def test_a_thought_that_is_kept_is_not_preceded_by_a_closed_one():
    turn = "{{ '<|start_header_id|>' + m.role + ': ' + ('<think>' + m.thinking + '</think>' if m.thinking else '') + m.content + '<|eot_id|>' }}"
    prompt = "{% if add_generation_prompt %}<|start_header_id|>assistant: {% if not thinking %}<think></think>{% endif %}{% endif %}"
    tokenizer = changed("{% for m in messages %}" + turn + "{% endfor %}" + prompt)
    set_policy(tokenizer, reasoning="keep")
    row = encode(tokenizer, THOUGHT)
    assert runs_of(tokenizer, row) == ["<think>Far.</think>Very far.<|eot_id|>"] and "</think><think>" not in tokenizer.decode(row["input_ids"])
    always = changed(tokenizer.chat_template.split("begin #}\n")[1].split("{# s3ft")[0].replace("{% if not thinking %}", "{% if true %}"))
    assert "closes the reasoning" in verdict(always, reasoning="keep")["why_not"]


BOMBS = {
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{{ '' }}{% endfor %}{% endfor %}",
    "doubles": "{% set n = namespace(t='ab') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "recurs": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "fills": "{{ 'ab' | center(9999999999) }}",
    "powers": "{{ 3 ** (3 ** 33) }}",
    "writes much": "{% for i in range(90000) %}{{ 'ahoy ' * 100 }}{% endfor %}",
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_without_end_is_given_up_in_one_line(bomb):
    import resource
    tokenizer, limits, began = changed(BOMBS[bomb] + FILES["yi"].read_text()), resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    with pytest.raises(TemplateLimit, match="computes powers|does not end|makes more text"): verdict(tokenizer)
    assert time.process_time() - began < 10 and resource.getrlimit(resource.RLIMIT_AS) == limits
    assert verdict(tokenizer_of("yi"))["trainable"]  # and others work after it


def test_markdown_and_keyword_arguments_are_no_powers():
    tokenizer = changed("{% macro f() %}{{ kwargs.a }}{% endmacro %}{{ f(**{'a': '**bold**'}) }}" + FILES["yi"].read_text())
    assert verdict(tokenizer)["trainable"]
