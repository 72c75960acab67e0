"""A tiny e5: a random BertModel with a WordPiece vocabulary of whole words; and e5's recipe written by hand."""

from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = 'query passage : " fox red a the den river stone moon lamp bird cold green old house tree wind'.split()


def make_tiny_e5(folder: Path) -> Path:
    """As on the hub the original checkpoint: model and tokenizer, without sentence-transformers files."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=300,
        initializer_range=0.5,  # the usual 0.02 makes all texts nearly the same
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def mean_pooled(folder: Path, texts: list[str]) -> np.ndarray:
    """(texts, dimension): the mean of the last hidden states over all tokens of a text, then length 1; one by one."""
    model, tokenizer = BertModel.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]  # (tokens, hidden)
        mean = states.sum(0) / len(states)
        rows.append((mean / mean.norm()).numpy())
    return np.array(rows)
