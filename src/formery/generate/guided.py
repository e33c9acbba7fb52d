"""Drafters that are small networks trained on the frozen target: guides, and how their guesses become drafts.

A parallel guide makes all its guesses at once, each without knowing the others (here); a serial one makes one after
the other, each from those before it (`serial`, and with attention to the whole text `attending`). Greedily the
likeliest guesses are named, as a chain or as the tree of the `nodes` likeliest; sampling, they are drawn from the
guide's distribution, which is transformed as the target's is, siblings without replacement, in a tree whose shape does
not depend on what was drawn.
"""

import heapq
import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.generate.draft import Draft, Row, Verdict, stream_of
from formery.generate.sampler import draw, probabilities
from formery.generate.settings import Settings
from formery.generate.target import Target, device_of
from formery.models.guide import Guide

Level = list[tuple[int, float]]  # tokens and their chances, the likeliest first


class Guided:
    """What both kinds share: the vector at the token before each row's last one, and the shape of drafts.

    draft: the guide. length: how deep a draft may be. width: how many guesses may follow a token. nodes: how many
    tokens a draft has at most, by default those of a chain.
    """

    def __init__(self, draft: Guide, length: int, width: int, nodes: int | None):
        nodes = length if nodes is None else nodes
        if length < 1 or width < 1 or nodes < length:
            raise FormeryError(
                f"a draft needs length >= 1, width >= 1 and at least as many nodes as its length, "
                f"not length {length}, width {width}, nodes {nodes}."
            )
        self.draft, self.length, self.width, self.nodes = draft, length, width, nodes

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        check_guide(target, self.draft)
        self.target, self.settings = target, settings
        self.random = [stream_of(settings.seed, row.index, "draft") for row in rows]
        weight = next(self.draft.parameters())
        self.last: Float[Tensor, "batch width"] = torch.zeros(
            len(rows), self.draft.width, dtype=weight.dtype, device=weight.device
        )
        if target.hidden is not None:
            for i, row in enumerate(rows):
                if len(row.prefix) > 1:
                    self.last[i] = target.hidden[i, len(row.prefix) - 2]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        self.last = torch.stack([told(verdict)[-1] for verdict in verdicts]).to(self.last)

    def select(self, rows: Sequence[int]) -> None:
        self.last = self.last[list(rows)]
        self.random = [self.random[row] for row in rows]

    def logits(self, vectors: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocabulary"]:
        """The target's own output on the guide's vectors, not quite exact: they are guesses."""
        return self.target.model.guessed(vectors, self.target.state)


def told(verdict: Verdict) -> Float[Tensor, "accepted+1 width"]:
    """The target's vectors at the row's last token and at the guesses that stand."""
    assert verdict.hidden is not None
    return verdict.hidden


class ParallelGuided(Guided):
    """Drafts with a guide of the form `draft(vector, token) -> vectors`, one for each depth.

    `guesses(last, rows)` gives the vectors of each depth; a paper's own drafter says how.
    """

    def guesses(self, rows: Sequence[Row]) -> Float[Tensor, "batch depth width"]:
        """The guide's vectors, one for each depth, from the target's vector at the token before the last."""
        vectors: Tensor = self.draft(self.last)
        return vectors

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        logits = self.logits(self.guesses(rows)[:, : self.length])
        if self.settings.temperature > 0:
            return [
                drawn_levels(row, logits[i, : rooms[i]], self.settings, self.random[i], self.width, self.nodes)
                for i, row in enumerate(rows)
            ]
        chances, tokens = likeliest(logits, self.width)
        return [
            best_first(
                [list(zip(*pair, strict=True)) for pair in zip(tokens[i], chances[i], strict=True)][:room], self.nodes
            )
            for i, room in enumerate(rooms)
        ]


def likeliest(
    logits: Float[Tensor, "batch time vocabulary"], width: int
) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
    """The chances and the tokens of the likeliest at each place."""
    chances = logits.softmax(-1)
    # One alone is found far faster than the best few.
    chances, tokens = chances.max(-1, keepdim=True) if width == 1 else chances.topk(min(width, logits.shape[-1]), -1)
    return chances.tolist(), tokens.tolist()


def drawn(
    left: Float[Tensor, "vocabulary"], count: int, chance: random.Random
) -> list[tuple[int, Float[Tensor, "vocabulary"]]]:
    """Tokens drawn without replacement, each with the distribution that it was drawn from."""
    found = []
    for number in range(count):
        token = draw(left, chance.random())
        found.append((token, left))
        if number + 1 < count:
            left = left.index_fill(0, torch.tensor([token], device=left.device), 0.0)
            total = float(left.sum())
            if total <= 0:
                break
            left = left / total
    return found


def best_first(levels: Sequence[Level], nodes: int) -> Draft:
    """The tree of the likeliest guesses, where each depth's are independent of the ones before: `Π chances` decides."""
    if all(len(level) == 1 for level in levels):
        return Draft([level[0][0] for level in levels], None, None, [level[0][1] for level in levels])
    draft = Draft([], None, [], [])
    # Of each: minus the chance of the whole line, depth, parent, rank among siblings, the chance of the line above.
    heap = [(-levels[0][0][1], 0, -1, 0, 1.0)] if levels else []
    while heap and len(draft.tokens) < nodes:
        reached, depth, parent, rank, above = heapq.heappop(heap)
        token, chance = levels[depth][rank]
        draft.tokens.append(token)
        draft.parents.append(parent)  # type: ignore[union-attr]
        draft.chances.append(chance)  # type: ignore[union-attr]
        if rank + 1 < len(levels[depth]):
            heapq.heappush(heap, (-above * levels[depth][rank + 1][1], depth, parent, rank + 1, above))
        if depth + 1 < len(levels):
            place = len(draft.tokens) - 1
            heapq.heappush(heap, (reached * levels[depth + 1][0][1], depth + 1, place, 0, -reached))
    if draft.parents == list(range(-1, len(draft.tokens) - 1)):
        draft.parents = None
    return draft


def nodes_of(draft: Draft, reached: Sequence[float], nodes: int) -> Draft:
    """The likeliest tokens of a tree, by the chance of the whole line to each; as a chain where they are one."""
    order = sorted(range(len(reached)), key=lambda place: (-reached[place], place))[:nodes]
    kept = draft.only(sorted(order))
    if kept.parents == list(range(-1, len(kept.tokens) - 1)):
        kept.parents = None
    return kept


def drawn_levels(
    row: Row,
    logits: Float[Tensor, "depth vocabulary"],
    settings: Settings,
    chance: random.Random,
    width: int,
    nodes: int,
) -> Draft:
    """`width` lines of drawn guesses, where each depth's are independent of the ones before."""
    draft = Draft([], [], [])
    lines: list[tuple[int, list[int]]] = [(-1, [])]
    for depth, here in enumerate(logits):
        after = []
        for place, written in lines:
            left = probabilities(here, row.tokens + written, settings, not row.output and depth == 0)
            for token, drawn_from in drawn(left, width if depth == 0 else 1, chance):
                if len(draft.tokens) < nodes:
                    draft.tokens.append(token)
                    draft.parents.append(place)  # type: ignore[union-attr]
                    draft.probabilities.append(drawn_from)  # type: ignore[union-attr]
                    after.append((len(draft.tokens) - 1, [*written, token]))
        lines = after
    return draft


def check_guide(target: Target, guide: Guide) -> None:
    """Raises FormeryError where the guide was made for a model of another shape."""
    model = target.model
    width = model.embedding.width
    if (guide.width, guide.vocabulary) != (width, model.vocabulary):
        raise FormeryError(
            f"the guide is for a model of width {guide.width} and {guide.vocabulary} tokens, not of width {width} and "
            f"{model.vocabulary}: take one that was trained on this model."
        )
    assert device_of(model) == next(guide.parameters()).device
