"""A decoder that tells its layers where each prompt ends, so that they may read and write by different rules."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from formery.models.decoder import Decoder
from formery.models.rewrite import rewritten
from formery.parts import Attention, Part, State
from formery.parts.selective import PROMPT, Ends


class Phased(Decoder):
    """A decoder whose state knows how long each prompt was.

    The last token of a prompt counts as written: from it the first new token is made.
    """

    def begin(
        self, prompts: Sequence[Sequence[int] | Tensor], capacity: int, keep: bool = False
    ) -> tuple[State, list[list[int]]]:
        state, rows = super().begin(prompts, capacity, keep)
        device = self.embedding.weight.device
        state.layers[PROMPT, 0] = Ends(torch.tensor([len(row) - 1 for row in rows], device=device))
        return state, rows


def phased(model: Decoder, change: Callable[[Attention, int], Part]) -> Phased:
    """A twin of `model` that tells its layers where prompts end, and whose attentions are what `change` makes of them.

    change: as in `rewritten`. Raises FormeryError where the model has no attention.
    """
    twin = rewritten(model, Attention, change)
    made = Phased(twin.embedding, cast(list[Part], list(twin.layers)), twin.norm, twin.output, twin.max_length)
    made.tokenizer, made.conventions = model.tokenizer, model.conventions
    made.origin, made.compiled = model.origin, model.compiled
    return made.train(model.training)
