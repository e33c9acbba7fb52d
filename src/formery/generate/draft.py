"""What a drafter is: something that guesses the next tokens of each row, cheaply."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from formery.generate.settings import Settings
from formery.models import Source

if TYPE_CHECKING:
    from formery.generate.target import Target


@dataclass
class Row:
    """One sequence that is being written.

    index: of its prompt in the call. source: the prompt, as the model takes it. prefix: what the decoder reads before
    it writes: the prompt itself, or a start token where the prompt is `apart`, read by an encoder. output: what it has
    written. random: this row's own stream of numbers.
    """

    index: int
    source: Source
    prefix: list[int]
    apart: bool
    random: random.Random
    output: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """The prompt's tokens; none where it is a recording."""
        return [] if isinstance(self.source, Tensor) else list(self.source)

    @property
    def tokens(self) -> list[int]:
        """All tokens that the decoder has been given or has written."""
        return self.prefix + self.output


@dataclass
class Draft:
    """Guessed tokens of one row: a chain, or a tree.

    parents: for each token the place in `tokens` of the one before it, -1 for the row's last token; None is a chain.
    A parent comes before its children, and of siblings the one that is tried first. probabilities: what each was drawn
    from, None where it was not drawn but named; of siblings each without those before it. chances: the drafter's own
    estimate that the token follows its parent, where it has one.
    """

    tokens: list[int] = field(default_factory=list)
    probabilities: list[Float[Tensor, "vocabulary"]] | None = None
    parents: list[int] | None = None
    chances: list[float] | None = None

    def parent(self, place: int) -> int:
        """The place of the token before that one."""
        return place - 1 if self.parents is None else self.parents[place]

    def children(self, place: int) -> list[int]:
        """The places of the tokens that may follow it, in the order in which they are tried."""
        if self.parents is None:
            return [place + 1] if place + 1 < len(self.tokens) else []
        return [child for child in range(place + 1, len(self.tokens)) if self.parents[child] == place]

    def line(self, place: int) -> list[int]:
        """The places from the first guess down to that one."""
        if self.parents is None:
            return list(range(place + 1))
        found: list[int] = []
        while place >= 0:
            found.append(place)
            place = self.parents[place]
        return found[::-1]

    @property
    def depths(self) -> list[int]:
        """How many guesses lie on the way to each token, itself included."""
        if self.parents is None:
            return list(range(1, len(self.tokens) + 1))
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return found

    def only(self, places: Sequence[int]) -> "Draft":
        """The draft without its other tokens; with a token its parent must stay."""
        if len(places) == len(self.tokens):
            return self
        at = {old: new for new, old in enumerate(places)} | {-1: -1}
        return Draft(
            [self.tokens[place] for place in places],
            None if self.probabilities is None else [self.probabilities[place] for place in places],
            None if self.parents is None else [at[self.parents[place]] for place in places],
            None if self.chances is None else [self.chances[place] for place in places],
        )


@dataclass
class Verdict:
    """What the target said of a draft.

    accepted: how many of the drafted tokens stand. emitted: the tokens now written. choices: the target's likeliest
    token after each token that was fed, also after rejected ones. guarded: how many near ties were decided apart.
    path: the places of the drafted tokens that stand. draft: what was checked, which may be less than was proposed.
    hidden: the target's last vectors at the row's last token and at those that stand.
    """

    accepted: int
    emitted: list[int]
    choices: list[int]
    guarded: int = 0
    path: list[int] = field(default_factory=list)
    draft: Draft = field(default_factory=Draft)
    hidden: Float[Tensor, "accepted+1 width"] | None = None


class Drafter(Protocol):
    """Guesses tokens; the loop of `draft_and_verify` asks, checks and tells."""

    def begin(self, target: "Target", rows: Sequence[Row], settings: Settings) -> None:
        """A new batch begins; the target has read all but the last token of each row, nothing has been written yet."""

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        """A draft for each row, of at most rooms[i] tokens; an empty draft is a plain step."""

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """What became of the drafts; the rows' outputs already hold the emitted tokens."""

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""


class NoDraft:
    """Guesses nothing: decoding token by token."""

    def begin(self, target: "Target", rows: Sequence[Row], settings: Settings) -> None:
        """Nothing to prepare."""

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [Draft() for _ in rows]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """Nothing to learn."""

    def select(self, rows: Sequence[int]) -> None:
        """Nothing to drop."""


def stream_of(seed: int, index: int, purpose: str) -> random.Random:
    """Random numbers that depend on the seed, the row and the purpose, and on nothing else."""
    return random.Random(f"{seed}/{index}/{purpose}")


def as_batch(
    rows: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens as one tensor, and their positions where widths differ (-1 is padding), else None."""
    widths = [len(row) for row in rows]
    width = max(widths)
    if min(widths) == width:
        return torch.tensor([list(row) for row in rows], device=device), None
    tokens = [[*row, *[0] * (width - len(row))] for row in rows]
    positions = [
        [*range(start, start + len(row)), *[-1] * (width - len(row))] for row, start in zip(rows, starts, strict=True)
    ]
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)


def as_trees(
    drafts: Sequence[Draft], lengths: Sequence[int], used: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Positions of each row's last token and the tokens of its draft, and which slots each of them sees.

    lengths: the position of each row's last token. used: the slot that it will take. A token sees all slots before,
    the row's last token, and the guesses on the way to itself.
    """
    width = 1 + max(len(draft.tokens) for draft in drafts)
    positions = [
        [length, *(length + depth for depth in draft.depths), *[-1] * (width - 1 - len(draft.tokens))]
        for draft, length in zip(drafts, lengths, strict=True)
    ]
    visible = torch.zeros(len(drafts), width, max(used) + width, dtype=torch.bool)
    for row, (draft, start) in enumerate(zip(drafts, used, strict=True)):
        seen, own = visible[row], [[0]]
        for place in range(len(draft.tokens)):
            own.append([*own[draft.parent(place) + 1], place + 1])
        seen[:, :start] = True
        seen[
            [query for query, places in enumerate(own) for _ in places],
            [start + place for places in own for place in places],
        ] = True
    return torch.tensor(positions, device=device), visible.to(device)
