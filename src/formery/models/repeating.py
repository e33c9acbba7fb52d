"""A decoder that reads each token several times and predicts from the last copy."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.parts import (
    Attention,
    Context,
    Embedding,
    GatedMLP,
    Layer,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    State,
    TiedOutput,
)
from formery.parts.copies import Recent, RepeatedAttention, Repetition
from formery.parts.native import using
from formery.parts.native.stack import plainly, run


class Repeating(Decoder):
    """A decoder that reads each token several times, after a rule that all of its attention follows."""

    def __init__(
        self,
        embedding: Embedding,
        layers: Sequence[Part],
        norm: Part | None,
        output: Part,
        rule: Repetition,
        max_length: int | None = None,
    ):
        super().__init__(embedding, layers, norm, output, max_length)
        self.rule = rule
        for part in self.layers.modules():
            if isinstance(part, Attention) and not (isinstance(part, RepeatedAttention) and part.mask == rule):
                raise ValueError("attention in a model that repeats tokens must follow the rule of the model")

    def context(self, *_: Any, **__: Any) -> Context:
        """Raises FormeryError: a pass over some of the layers would leave out the copies."""
        raise FormeryError("this model reads each token several times, so no method can run some of its layers alone.")

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        lengths = state.lengths
        return self._passed(tokens, super().context(tokens.shape[1], state, positions, visible), lengths, 0)

    def prefill(
        self, tokens: Int[Tensor, "batch time"], state: State, positions: Int[Tensor, "batch time"] | None = None
    ) -> None:
        """As `read`, of tokens whose predictions nobody asks for: leaves out copies that no later token depends on."""
        lengths = state.lengths
        context = super().context(tokens.shape[1], state, positions)
        pairs = zip(state.lengths, lengths, strict=True)
        first = max(0, min(self.rule.wanted(length) - before for length, before in pairs))
        self._passed(tokens, context, lengths, first)

    def _run(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        return self._passed(tokens, context, [0] * len(tokens), 0)

    def _passed(
        self, tokens: Int[Tensor, "batch time"], context: Context, lengths: Sequence[int], first: int
    ) -> Float[Tensor, "batch predicting width"]:
        """The normed vectors of the last copies of the tokens from number `first` on; lengths: before this pass."""
        again = self.rule.repeats - 1
        with using(self.compiled):
            entered = self.embedding(tokens, context)
            entered = torch.cat((entered, entered[:, first:].repeat_interleave(again, 1)), 1)
            flat = self._flat(context, lengths, first)
            if torch.is_grad_enabled():
                hidden = plainly(self.layers, self.norm, entered, flat)
            else:
                known = None if flat.state is None else flat.state.pieces
                hidden = run(self.layers, self.norm, entered, flat, known)
        return hidden[:, tokens.shape[1] + again - 1 :: again] if again else hidden

    def _flat(self, context: Context, lengths: Sequence[int], first: int) -> Context:
        """The pass over originals and copies that a pass over tokens comes to."""
        at, state, repeats = context.positions, context.state, self.rule.repeats
        numbers = torch.arange(1, repeats, device=at.device)
        copies = (at[:, first:, None] * repeats + numbers).masked_fill(at[:, first:, None] < 0, -1).flatten(1)
        queries = torch.cat((_originals(at, repeats), copies), 1)
        if state is None:
            return Context(queries, visible=self._seen(context, first, 0), even=context.even)
        recent, earlier = state.layers.get((self.rule, 0)), 0
        keys = copies
        if isinstance(recent, Recent):
            recent.begin(copies, lengths, first)
            keys, earlier = recent.positions, recent.earlier
        keys = torch.cat((_originals(context.key_positions, repeats), keys), 1)
        return Context(queries, keys, self._seen(context, first, earlier), state=state)

    def _seen(self, context: Context, first: int, earlier: int) -> Bool[Tensor, "batch read seen"] | None:
        """Which originals and copies each original and copy sees where tokens see only some tokens.

        earlier: how many columns are copies of earlier passes, which all see.
        """
        if context.visible is None:
            return None
        (batch, time), device = context.positions.shape, context.positions.device
        copied = torch.arange(first, time, device=device).repeat_interleave(self.rule.repeats - 1)
        rows = context.visible[:, torch.cat((torch.arange(time, device=device), copied))]
        start = [0] * batch if context.state is None else context.state.slots.start
        places = torch.tensor(start, device=device)[:, None, None] + copied
        return torch.cat((rows, rows.new_ones(*rows.shape[:2], earlier), rows.take_along_dim(places, 2)), 2)


def _originals(positions: Int[Tensor, "batch token"], repeats: int) -> Int[Tensor, "batch token"]:
    return (positions * repeats).masked_fill(positions < 0, -1)


def repeating_model(
    vocabulary: int, width: int, layers: int, heads: int, hidden: int, max_length: int, rule: Repetition
) -> Repeating:
    """As `language_model`, with each token read several times."""
    embedding, position = Embedding(vocabulary, width), Rotary()

    def layer() -> Layer:
        attention = RepeatedAttention(width, heads, position=position, mask=rule)
        return Layer([PreNorm(RMSNorm(width), one) for one in (attention, GatedMLP(width, hidden))])

    stack = [layer() for _ in range(layers)]
    return Repeating(embedding, stack, RMSNorm(width), TiedOutput(embedding), rule, max_length)
