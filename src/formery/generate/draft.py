"""What a drafter is: something that guesses the next tokens of each row, cheaply."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from formery.generate.settings import Settings
from formery.models import Model, Source


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
    """Guessed tokens of one row; probabilities: what each was drawn from, None where it was not drawn but named."""

    tokens: list[int] = field(default_factory=list)
    probabilities: list[Float[Tensor, "vocabulary"]] | None = None


@dataclass
class Verdict:
    """What the target said of a draft.

    accepted: how many of the drafted tokens stand. emitted: the tokens now written. choices: the target's likeliest
    token after each token that was fed, also after rejected ones. guarded: how many near ties were decided apart.
    """

    accepted: int
    emitted: list[int]
    choices: list[int]
    guarded: int = 0


class Drafter(Protocol):
    """Guesses tokens; the loop of `draft_and_verify` asks, checks and tells."""

    def begin(self, model: Model, rows: Sequence[Row], settings: Settings) -> None:
        """A new batch begins; nothing has been written yet."""

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        """A draft for each row, of at most rooms[i] tokens; an empty draft is a plain step."""

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        """What became of the drafts; the rows' outputs already hold the emitted tokens."""

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""


class NoDraft:
    """Guesses nothing: decoding token by token."""

    def begin(self, model: Model, rows: Sequence[Row], settings: Settings) -> None:
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
