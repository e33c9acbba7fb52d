"""Drafting with a guide that attends to the whole text and has heads: one pass, then all depths at once."""

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from formery.generate.attending import AttendingGuided, Growing
from formery.generate.draft import Draft, Row
from formery.generate.guided import ParallelGuided, best_first, drawn_levels, likeliest
from formery.models.guide import Attending, Heads


class Headed(Attending):
    """An attending guide of whose vectors `heads` makes the guesses of all depths."""

    heads: Heads


class HeadedGuided(AttendingGuided, ParallelGuided):
    """Reads what has come since the last draft, and drafts what the heads make of the vector at the row's last token.

    Guesses of one depth do not know those of another: a chain, or with `width` above 1 the tree of the likeliest.
    """

    draft: Headed

    def guesses(self, rows: Sequence[Row]) -> Float[Tensor, "batch depth width"]:
        found: Tensor = self.draft.heads(self.caught_up(rows))
        return found

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return ParallelGuided.propose(self, rows, rooms)


def hang(one: Growing, place: int, logits: Float[Tensor, "depth vocabulary"], width: int, nodes: int) -> list[int]:
    """Guesses of several depths that do not know each other, behind the token at that place; gives their places.

    Named ones are the tree of the `nodes` likeliest. Drawn ones are one line behind a token, `width` lines behind the
    row's last, and never make the draft larger than `nodes`.
    """
    draft, written = one.draft, [one.draft.tokens[above] for above in one.draft.line(place)]
    if draft.probabilities is not None:
        row = replace(one.row, output=one.row.output + written)
        room = nodes - len(draft.tokens)
        new = drawn_levels(row, logits, one.settings, one.chance, width if place < 0 else 1, max(0, room))
        draft.probabilities += new.probabilities or []
    else:
        chances, tokens = likeliest(logits[None], width)
        levels = [list(zip(*pair, strict=True)) for pair in zip(tokens[0], chances[0], strict=True)]
        new = best_first(levels, nodes)
    start, above = len(draft.tokens), 1.0 if place < 0 else one.reached[place]
    draft.tokens += new.tokens
    for number, chance in enumerate(new.chances or [1.0] * len(new.tokens)):
        parent = new.parent(number)
        draft.parents.append(place if parent < 0 else start + parent)  # type: ignore[union-attr]
        draft.chances.append(chance)  # type: ignore[union-attr]
        one.reached.append(chance * (above if parent < 0 else one.reached[start + parent]))
    return list(range(start, len(draft.tokens)))
