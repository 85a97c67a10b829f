"""Every chat template at hand, each with a small tokenizer that knows its control tokens.

Run as a program it writes the table of verdicts, `fixtures/verdicts.json`.
"""

import json
import re
from functools import cache
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from s3ft_nb.core.files import resource
from s3ft_nb.lm.doctor import verdict

FIXTURES = Path(__file__).parent / "fixtures"
SHIPPED = {
    file.stem: file
    for file in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not file.stem.endswith("_training")
}
OWN = {file.stem: file for file in sorted((FIXTURES / "templates").glob("*.jinja"))}
FILES = SHIPPED | OWN

USUAL = ("llama3", "qwen3", "gemma3", "mistral_v7", "gptoss", "glm4moe")  # For benchmarks

# Where a template leaves the tokens to its tokenizer, or hides them from the pattern below.
TOKENS = {
    "mistral_v2": ["[INST]", "[/INST]"],
    "mistral_v3": ["[INST]", "[/INST]"],
    "mistral_v7": ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
    "glm4moe": ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"],
    "phi3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi3_5": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
TOKEN = re.compile(r"<\|[\w/]+\|?>|<\w+\|>|<｜[^｜\s]+｜>|<(?:start|end)_of_\w+>")
TEXT = re.compile(r"</?(?:think|tool_call|tool_response|tools)>")  # Added to vocabularies without being special


@cache
def base_tokenizer(large):
    "Bytes and a few merges, or the bundled vocabulary."
    if large: return without_added(resource("data", "micro-base", "tokenizer.json"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = ["You are a patient teacher. How far is the moon? About three hundred thousand kilometres."]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return bpe.to_str()


def without_added(path):
    "A tokenizer without the tokens that were added to it."
    plain = json.loads(Path(path).read_text(encoding="utf-8"))
    plain["added_tokens"] = []
    return json.dumps(plain)


def tokenizer_of(name, large=False):
    "A tokenizer for the template of this name."
    source = FILES[name].read_text(encoding="utf-8")
    bpe = Tokenizer.from_str(base_tokenizer(large))
    special = dict.fromkeys(["<s>", "</s>", *TOKENS.get(name, []), *sorted(set(TOKEN.findall(source)))])
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in sorted(set(TEXT.findall(source)))])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(special)[2:]
    )
    tokenizer.chat_template = source
    return tokenizer


def verdicts():
    "The table."
    return {name: verdict(tokenizer_of(name)) for name in FILES}


if __name__ == "__main__":
    text = json.dumps(verdicts(), indent=1, ensure_ascii=False)
    (FIXTURES / "verdicts.json").write_text(text + "\n", encoding="utf-8")
