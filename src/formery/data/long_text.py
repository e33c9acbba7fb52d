"""The vocabulary and the texts of models that are compared on long contexts: prose and Python's library."""

from functools import cache
from itertools import chain
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.base import Split, Work
from formery.data.code import Code
from formery.data.long import WORDS
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.data.write import WikiText

VOCABULARY = 2048


@cache
def tokenizer() -> Tokenizer:
    """The vocabulary of 2,048 byte pairs that the model `long` has."""
    # Words that facts are made of are seldom in prose; seen often enough, each is one token.
    words = " " + " ".join(WORDS)
    texts = chain(WikiText().texts("train"), Code().texts("train"), [words] * 12_000)
    return train_bpe(texts, vocabulary_size=VOCABULARY)


@cache
def prose(split: Split) -> Int[Tensor, " total"]:
    """WikiText-2, its articles joined, each between <bos> and <eos>."""
    return _joined(WikiText(), split)


@cache
def code(split: Split) -> Int[Tensor, " total"]:
    """Python's standard library, its modules joined likewise."""
    return _joined(Code(), split)


def _joined(work: Work[Any], split: Split) -> Int[Tensor, " total"]:
    made = tokenizer()
    rows = made.encode_batch(list(work.texts(split)))
    return torch.tensor([token for row in rows for token in (made.bos, *row, made.eos)])
