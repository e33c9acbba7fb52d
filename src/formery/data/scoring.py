"""What a text costs under a language model: every token scored once, each with a long context before it."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError

LanguageModel = Callable[[Int[Tensor, "batch time"]], Float[Tensor, "batch time vocabulary"]]
TOKENS_PER_CALL = 2048


def windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Overlapping pieces of `ids` and, for each, the index of its first token that none before has scored.

    A piece has at most `length` + 1 tokens, of which the last is only predicted; after the first piece,
    every scored token sees at least `length` - `stride` + 1 tokens before it.
    """
    end = min(length + 1, len(ids))
    yield ids[:end], 1
    while end < len(ids):
        new = min(end + stride, len(ids))
        begin = max(0, new - length - 1)
        yield ids[begin:new], end - begin
        end = new


def negative_log_likelihood(
    model: LanguageModel, documents: Iterable[list[int]], length: int = 1024
) -> float:
    """Sum of -ln p(token | the tokens before it) over the documents but for their first tokens; in nats.

    A model whose `max_length` is less than `length` gets windows of that many tokens; windows overlap by
    half. Windows of one length go together, so that no padding can change a result.
    """
    length = min(length, getattr(model, "max_length", None) or length)
    pieces = [
        piece for ids in documents if len(ids) > 1 for piece in windows(ids, length, max(1, length // 2))
    ]
    pieces.sort(key=lambda piece: (len(piece[0]), piece[1]))
    module = model if isinstance(model, nn.Module) else None
    device = next((parameter.device for parameter in module.parameters()), None) if module else None
    training = module is not None and module.training
    total = 0.0
    try:
        if module:
            module.eval()
        with torch.inference_mode():
            for (size, first), group in groupby(pieces, key=lambda piece: (len(piece[0]), piece[1])):
                rows = torch.tensor([tokens for tokens, _ in group], device=device)
                for batch in rows.split(max(1, TOKENS_PER_CALL // size)):
                    logits = model(batch[:, :-1])[:, first - 1 :]
                    losses = cross_entropy(
                        logits.flatten(0, 1).float(), batch[:, first:].flatten(), reduction="none"
                    )
                    total += losses.double().sum().item()
    finally:
        if module and training:
            module.train()
    if not math.isfinite(total):
        raise FormeryError(
            "the model gives logits that are not finite, so that the text has no likelihood under it."
        )
    return total


def text_cost(model: LanguageModel, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Sum of -ln p(text) in nats, each text on its own after <bos>.

    Without a <bos> nothing predicts a text's first token: it costs ln(vocabulary size).
    """
    documents = [ids for ids in tokenizer.encode_batch(texts) if ids]
    if not documents:
        raise FormeryError("there is no text to score; raise the limit.")
    if tokenizer.bos is not None:
        return negative_log_likelihood(model, [[tokenizer.bos, *ids] for ids in documents])
    return negative_log_likelihood(model, documents) + len(documents) * math.log(tokenizer.vocabulary_size)
