"""Tiny randomly initialised chat models on disk, each with its own tokenizer and chat template.

Three architectures with three habits: `llama` has a system role, `qwen3` puts an empty think block before a
response when thinking is off, `gemma` raises on a system message and wants alternating roles.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LINES = [
    "You are a patient teacher. Answer every question like an old sailor who misses the sea.",
    "What should I cook in winter? A soup of beans, carrots and a little pepper keeps you warm.",
    "And in summer? Then a salad with bread and cheese is enough, and cold tea with lemon.",
    "The reply follows the setting. The reply does not fit the conversation. Answer with one letter.",
    "How far is the moon? About three hundred and eighty thousand kilometres away from here.",
]

LLAMA_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|/head|>\\n' + message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n' }}
{%- endif %}"""

QWEN3_TEMPLATE = """{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last and loop.index0 > ns.last_user %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

GEMMA_TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else 'user' %}
    {{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\\n' }}
{%- endif %}"""

# kind -> (special tokens, added tokens that are not special, template, role of each special token)
DIALECTS = {
    "llama": (
        ["<|bos|>", "<|eot|>", "<|head|>", "<|/head|>"],
        [],
        LLAMA_TEMPLATE,
        {"bos_token": "<|bos|>", "eos_token": "<|eot|>"},
    ),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>"],
        QWEN3_TEMPLATE,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    ),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        [],
        GEMMA_TEMPLATE,
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
}


def tiny_tokenizer(
    kind: str = "llama",  # One of `DIALECTS`
    vocab_size: int = 512,  # Tokens, special ones included
    lines: list = LINES,  # What the merges are learnt from
) -> PreTrainedTokenizerFast:  # Byte-level BPE with the dialect's template
    "A byte-level BPE tokenizer trained on a few lines."
    special, plain, template, roles = DIALECTS[kind]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = vocab_size - len(plain)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False, **roles)
    tokenizer.add_tokens(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def tiny_config(
    kind: str,  # One of `DIALECTS`
    tokenizer: PreTrainedTokenizerFast,  # For the special ids
    vocab_size: int,  # Rows of the embedding
    hidden: int,  # Width; a multiple of 64
    layers: int,  # Transformer blocks
):  # A transformers config
    "The config of the architecture behind `kind`."
    shape = dict(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if kind == "llama":
        return LlamaConfig(**shape)
    if kind == "qwen3":
        return Qwen3Config(**shape)
    return Gemma2Config(**shape, sliding_window=64, query_pre_attn_scalar=32)


def tiny_model(
    folder,  # Where the model is written; an existing one is used as it is
    kind: str = "llama",  # One of `DIALECTS`
    hidden: int = 64,  # Width; a multiple of 64, so that the CPU kernel for NF4 takes it
    layers: int = 2,  # Transformer blocks
    vocab_size: int = 512,  # Tokens
    seed: int = 0,  # Of the weights
) -> Path:  # `folder`, ready for `from_pretrained`
    "Write a tiny random model with its tokenizer and chat template."
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    tokenizer = tiny_tokenizer(kind, vocab_size)
    config = tiny_config(kind, tokenizer, vocab_size, hidden, layers)
    maker = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "gemma": Gemma2ForCausalLM}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = maker(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_dialogues(
    n: int = 8,  # Dialogues
    n_turns: int = 2,  # User turns in each
    system: bool = True,  # Whether a system message leads
) -> list:  # Lists of messages that end with a user message
    "Short dialogues to feed a tiny model."
    rows = []
    for i in range(n):
        messages = [{"role": "system", "content": f"Talk like sailor number {i}."}] if system else []
        for turn in range(n_turns):
            messages.append({"role": "user", "content": f"Question {turn} of {i}: {LINES[(i + turn) % len(LINES)]}"})
            messages.append({"role": "assistant", "content": f"Answer {turn}."})
        rows.append(messages[:-1])
    return rows


if __name__ == "__main__":
    import sys

    for name in DIALECTS:
        path = tiny_model(Path(sys.argv[1]) / name, name)
        print(path, json.loads((path / "config.json").read_text())["architectures"])


def small_notebook(*sources):
    "A chain notebook from the sources of its cells, the first of which holds the parameters."
    cells = [{"cell_type": "code", "id": f"c{i}", "metadata": {} if i else {"tags": ["parameters"]},
              "execution_count": None, "outputs": [], "source": text} for i, text in enumerate(sources)]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
