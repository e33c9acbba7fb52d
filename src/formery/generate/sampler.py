"""From logits to a token: the settings' transformations, and drawing from a distribution."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.generate.settings import Settings

Rule = Callable[[Tensor, Tensor | None, int, float], Tensor | None]


def penalised(
    logits: Float[Tensor, "vocabulary"], history: Sequence[int], settings: Settings, first: bool = False
) -> Float[Tensor, "vocabulary"]:
    """Logits of tokens in `history` divided (if positive) or multiplied by the penalty (Keskar et al., 2019).

    Those of suppressed tokens become -inf. first: whether the token to come is the first that is written.
    Raises FormeryError where no token is left.
    """
    if settings.repetition_penalty != 1.0 and history:
        seen = torch.tensor(sorted(set(history)), device=logits.device)
        old = logits[seen]
        new = torch.where(old > 0, old / settings.repetition_penalty, old * settings.repetition_penalty)
        logits = logits.index_copy(0, seen, new)
    suppressed = settings.suppressed | settings.suppressed_first if first else settings.suppressed
    if suppressed:
        tokens = sorted(token for token in suppressed if token < len(logits))
        if len(tokens) == len(logits):
            raise FormeryError("all tokens are suppressed, so that none can be written: suppress fewer.")
        logits = logits.index_fill(0, torch.tensor(tokens, dtype=torch.long, device=logits.device), -torch.inf)
    return logits


def probabilities(
    logits: Float[Tensor, "vocabulary"], history: Sequence[int], settings: Settings, first: bool = False
) -> Float[Tensor, "vocabulary"]:
    """The distribution that is sampled from, in float64: penalty, temperature, top-k, top-p, min-p, in that order."""
    scores = penalised(logits.double(), history, settings, first)
    if settings.temperature == 0:
        return torch.nn.functional.one_hot(scores.argmax(), len(scores)).double()
    scores = (scores - scores.max()) / settings.temperature
    if settings.top_k is not None and settings.top_k < len(scores):
        least = scores.topk(settings.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, index = scores.softmax(-1).sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        scores = scores.index_fill(0, index[before >= settings.top_p], -torch.inf)
    chances = scores.softmax(-1)
    if settings.min_p is not None:
        chances = chances.masked_fill(chances < settings.min_p * chances.max(), 0)
        chances = chances / chances.sum()
    return chances


def draw(chances: Float[Tensor, "vocabulary"], uniform: float) -> int:
    """The token in whose share of [0, 1) the number `uniform` falls; `chances` need not sum to one."""
    cumulative = chances.cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return min(token, int(chances.nonzero()[-1]))


def modified_rejection(
    target: Float[Tensor, "vocabulary"], draft: Float[Tensor, "vocabulary"] | None, token: int, uniform: float
) -> Float[Tensor, "vocabulary"] | None:
    """None accepts the drafted token; otherwise what to draw its replacement from.

    Accepts with probability `min(1, target[token] / draft[token])`; the replacement comes from
    `max(0, target - draft)`, so that what comes out is distributed as `target` (Chen et al., 2023, algorithm 2).
    draft: None where the token was not drawn but named; its distribution is then the token alone.
    """
    if draft is None:
        draft = torch.nn.functional.one_hot(torch.tensor(token, device=target.device), len(target)).to(target)
    if uniform * draft[token] < target[token]:
        return None
    rest = (target - draft).clamp(min=0)
    return rest if float(rest.sum()) > 0 else target
