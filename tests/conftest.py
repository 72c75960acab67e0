"""A small policy with random weights and a real byte-level tokenizer, made on the spot; nothing trained, no network."""

import os
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from searchr1_lite.cli import main
from searchr1_lite.config import ROOT, Profile, load_profile
from searchr1_lite.rollouts.policy import Policy
from searchr1_lite.rollouts.protocol import INVALID_ACTION, PROMPT
from searchr1_lite.types import Hit, Passage

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    PROMPT,
    INVALID_ACTION,
    "<think> I look it up. </think>\n<search> capital of Rovana </search>\n\n<information>",
    "<search>a</search>\n\n<answer>b</answer>\n\n<think>c</think>\n\n</information>\n\n" * 4,
    '<information>Doc 1(Title: "Belmar") Belmar is the capital of Rovana.\nDoc 2(Title: "Rovana") A country.',
    "<answer> Belmar </answer>\n",
]

sys.path += [str(ROOT / folder) for folder in ("data/tiny-base", "data/tiny-instruct", "benchmarks")]


def make_tokenizer(texts: list[str] = TEXTS, vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's pre-tokenisation, in which '>' merges with the newlines after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer


@cache
def original(path: str) -> ModuleType:
    """A module of Search-R1's own code, from the checkout that the environment variable SEARCH_R1 names; skips if none.

    What its modules import and these tests do not reach (verl, requests) is replaced by empty modules.
    """
    root = os.environ.get("SEARCH_R1")
    if not root:
        pytest.skip("SEARCH_R1 names no checkout of PeterGriffinJin/Search-R1 to compare with")
    for name in (
        "verl",
        "verl.utils",
        "verl.utils.hdfs_io",
        "verl.utils.tracking",
        "requests",
        "tensordict",
        "original.tensor_helper",
    ):
        sys.modules.setdefault(name, MagicMock())
    spec = spec_from_file_location(f"original.{Path(path).stem}", Path(root) / path)
    module = module_from_spec(spec)
    sys.modules["original"] = ModuleType("original")
    spec.loader.exec_module(module)
    return module


def make_model(vocab_size: int, seed: int = 0) -> Qwen2ForCausalLM:
    """As with Qwen2.5, the model may have a few more embeddings than the tokenizer has tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return Qwen2ForCausalLM(config).eval()


def chatml(text: str) -> str:
    """A user message as Qwen's chat template wraps it."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


class OverlapRetriever:
    """Passages that share most words with the query; those that share none are not found."""

    def __init__(self, passages: list[Passage]) -> None:
        self.passages = passages
        self.calls: list[list[str]] = []

    def search(self, queries: list[str], k: int) -> list[list[Hit]]:
        self.calls.append(list(queries))
        return [self._one(set(query.lower().split()), k) for query in queries]

    def _one(self, words: set[str], k: int) -> list[Hit]:
        scored = [Hit(p, float(len(words & set(f"{p.title} {p.text}".lower().split())))) for p in self.passages]
        return sorted((hit for hit in scored if hit.score), key=lambda hit: -hit.score)[:k]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def policy(tokenizer) -> Policy:
    """Random weights: it writes noise, and no two tests share it."""
    return Policy(make_model(544), tokenizer, torch.device("cpu"))


@pytest.fixture
def retriever() -> OverlapRetriever:
    return OverlapRetriever(
        [
            Passage("1", "Belmar", "Belmar is the capital of Rovana."),
            Passage("2", "Rovana", "Rovana is a country by the sea.\nIts people speak Rovan."),
            Passage("3", "Ōtsu", "Ōtsu — a city, “old” and 静か."),
        ]
    )


@pytest.fixture
def profile() -> Profile:
    return load_profile(
        "tiny",
        max_prompt_tokens=1000,
        max_context_tokens=4000,
        max_response_tokens=20,
        max_turns=2,
        chat_template=False,
    )


def searchr1(*arguments: object) -> None:
    """The command, as typed; raises SystemExit where it does not end well."""
    try:
        main([*map(str, arguments)])
    except SystemExit as stop:
        if stop.code:
            raise
