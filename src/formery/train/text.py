"""Text as recipes feed it to a model: documents joined, pairs framed."""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.tokenizer import Tokenizer


def joined(tokenizer: Tokenizer, texts: Iterable[str]) -> Int[Tensor, "total"]:
    """All documents as one long text, each between <bos> and <eos>."""
    return torch.tensor(
        [token for row in tokenizer.encode_batch(list(texts)) for token in framed(tokenizer, row)]
    )


def pairs_of(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Sources ending in <eos>, targets between <bos> and <eos>."""
    sources, targets = zip(*pairs, strict=True)
    return [
        (framed(tokenizer, source)[1:], framed(tokenizer, target))
        for source, target in zip(
            tokenizer.encode_batch(sources), tokenizer.encode_batch(targets), strict=True
        )
    ]


def framed(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """The tokens between <bos> and <eos>."""
    assert tokenizer.bos is not None and tokenizer.eos is not None
    return [tokenizer.bos, *tokens, tokenizer.eos]
