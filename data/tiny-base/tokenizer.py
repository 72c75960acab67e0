"""The tiny base's tokenizer: byte-level BPE with Qwen2.5's pre-tokenisation, special tokens and ChatML template.

`<search>`, `</answer>` and the other tags are ordinary text of three tokens each (`<`, `search`, `>`), as they are for
Qwen2.5, and `>` merges with line breaks after it. So stopping, masking and parsing meet the same difficulties here.
"""

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transcripts import need, state
from transformers import Qwen2TokenizerFast

from searchr1_lite.rollouts.protocol import INVALID_ACTION, render_prompt
from searchr1_lite.tasks.toy_world import ToyWorld

VOCABULARY = 1024
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPLIT = (  # the pre-tokenisation pattern of Qwen2 and Qwen2.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (  # Qwen2.5's, without its tool calls
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer_texts(worlds: int = 60) -> list[str]:
    """Text to learn merges from. Tags are left out and their words put in on their own, so that no tag is one token."""
    tag_parts = ["search", "answer", "think", "information", "<", "</", ">", " <", " </", ">\n", ">\n\n", "\n\n", "\n"]
    texts = tag_parts * 2000 + ["system", "user", "assistant", "system\nYou are a helpful assistant."] * 500
    for seed in range(worlds):
        world = ToyWorld(seed, size=40, names="pretraining")
        texts += [f'Doc {n % 3 + 1}(Title: "{p.title}") {p.text}\n' for n, p in enumerate(world.passages())]
        texts += [q.question for q in world.questions("train")]
        texts += [f" {need(fact)} {state(fact)} " for fact in world.facts.values()]
    plain = [render_prompt("x"), INVALID_ACTION]
    for tag in ("think", "search", "answer", "information"):
        plain = [text.replace(f"<{tag}>", " ").replace(f"</{tag}>", " ") for text in plain]
    random.Random(0).shuffle(texts)
    return texts + plain * 400


def train_tokenizer() -> Qwen2TokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(), trainer)
    fast = Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        model_max_length=2048,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
