"""Drafting with a thinner form of the target itself: some of its parts, or slices of them, in its own decode state.

The thinner form attends to the keys and values that the target has left. Those that it writes for its guesses lie where
the target's own will lie; they are taken back before the target reads the guesses, which then writes over them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.generate.draft import Draft, Row, Verdict, as_batch, stream_of
from formery.generate.sampler import draw, penalised, probabilities
from formery.generate.settings import Settings
from formery.generate.target import Target, device_of
from formery.models import Decoder, Model
from formery.parts import Context, Layer, State
from formery.parts.native import using
from formery.parts.native.stack import chosen, run


class Thin:
    """Residual parts of a decoder, or others in their place, run inside of its decode state.

    parts: in the order in which they run. norm: behind them, if any.
    """

    def __init__(self, decoder: Decoder, state: State, parts: Sequence[nn.Module], norm: nn.Module | None):
        self.decoder, self.parts, self.norm = decoder, nn.ModuleList(parts), norm
        self.parts.training = decoder.training
        with using(decoder.compiled):
            self.pieces = chosen(state.pieces, self.parts, norm, decoder.embedding.width)

    def __call__(
        self, hidden: Float[Tensor, "batch time width"], context: Context
    ) -> Float[Tensor, "batch time width"]:
        with using(self.decoder.compiled):
            return run(self.parts, self.norm, hidden, context, self.pieces)


class SelfDrafter:
    """Drafts a chain token by token; `thin` says by which form of the target.

    length: how long a draft may be. confidence: a guess after which the form gave its likeliest token less than that
    chance is the last one. inside: the target must have read all of the text whenever a draft is asked for.
    """

    inside = True

    def __init__(self, length: int, confidence: float = 0.0):
        if length < 1 or not 0 <= confidence <= 1:
            raise FormeryError(
                f"a draft needs length >= 1 and a confidence from 0 to 1, not length {length}, confidence {confidence}."
            )
        self.length, self.confidence = length, confidence

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.target, self.settings, self.decoder = target, settings, decoder_in(target.model)
        self.random = [stream_of(settings.seed, row.index, "draft") for row in rows]

    def thin(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """The normed vectors that the thinner form makes of embeddings."""
        raise NotImplementedError

    def read(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch time width"]:
        """What the thinner form makes of these tokens behind those that were read; rows may be of unequal width."""
        state = self.target.state
        tokens, positions = as_batch(rows, state.slots.lengths, device_of(self.decoder))
        lengths = state.lengths
        context = self.decoder.context(tokens.shape[1], state, positions)
        with self.target.packing, using(self.decoder.compiled):
            hidden = self.thin(self.decoder.embedding(tokens, context), context)
        if positions is not None:
            state.rollback([length + len(row) for length, row in zip(lengths, rows, strict=True)])
        return hidden

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        state, sampling = self.target.state, self.settings.temperature > 0
        before = state.lengths
        lengths = [min(self.length, room) for room in rooms]
        drafts = [Draft([], [], None, None) if sampling else Draft([], None, None, []) for _ in rows]
        unread = [[row.tokens[-1]] if length > 0 else [] for row, length in zip(rows, lengths, strict=True)]
        while any(unread):
            logits = self.target.model.logits(self.read(unread), state)[:, 0]
            sure = self._drawn(rows, drafts, unread, logits) if sampling else self._named(rows, drafts, unread, logits)
            unread = [
                draft.tokens[-1:] if one and chance >= self.confidence and len(draft.tokens) < length else []
                for draft, one, chance, length in zip(drafts, unread, sure, lengths, strict=True)
            ]
        self.close(rows, drafts)
        state.rollback(before)
        return drafts

    def close(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> None:
        """Called when the drafts are made, before what was read for them is taken back."""

    def _named(
        self,
        rows: Sequence[Row],
        drafts: Sequence[Draft],
        going: Sequence[object],
        logits: Float[Tensor, "batch vocabulary"],
    ) -> list[float]:
        """Adds the likeliest token to each draft that goes on; the chances of these."""
        if self.settings.changes_logits:
            logits = torch.stack(
                [
                    penalised(one, row.tokens + draft.tokens, self.settings, not row.output and not draft.tokens)
                    for row, draft, one in zip(rows, drafts, logits, strict=True)
                ]
            )
        most = logits.softmax(-1).max(-1)
        chances: list[float] = most.values.tolist()
        for draft, one, token, chance in zip(drafts, going, most.indices.tolist(), chances, strict=True):
            if one:
                draft.tokens.append(token)
                draft.chances.append(chance)  # type: ignore[union-attr]
        return chances

    def _drawn(
        self,
        rows: Sequence[Row],
        drafts: Sequence[Draft],
        going: Sequence[object],
        logits: Float[Tensor, "batch vocabulary"],
    ) -> list[float]:
        """Adds a token that is drawn to each draft that goes on; the chances of the likeliest ones.

        Whether a draft goes on is thus decided by what was written before, not by what was drawn here.
        """
        sure = []
        for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            sure.append(0.0)
            if going[i]:
                first = not row.output and not draft.tokens
                chances = probabilities(logits[i], row.tokens + draft.tokens, self.settings, first)
                draft.probabilities.append(chances)  # type: ignore[union-attr]
                draft.tokens.append(draw(chances, self.random[i].random()))
                sure[-1] = float(chances.max())
        return sure

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """Nothing to learn."""

    def select(self, rows: Sequence[int]) -> None:
        self.random = [self.random[row] for row in rows]


def decoder_in(model: Model) -> Decoder:
    """The part that writes; FormeryError where it has no layers of which some could draft for all."""
    decoder = getattr(model, "decoder", model)
    if not isinstance(decoder, Decoder) or len(sublayers(decoder)) < 2:
        raise FormeryError("this model has too few layers to draft for itself: take one with two or more.")
    return decoder


def sublayers(decoder: Decoder) -> list[nn.Module]:
    """The residual parts of all layers, the first layer's first."""
    return [part for layer in decoder.layers for part in (layer.sublayers if type(layer) is Layer else [layer])]
