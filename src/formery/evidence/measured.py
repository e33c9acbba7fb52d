"""What a check is given (a budget) and what it gives back (numbers with their spread, and criteria)."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formery.evidence.verdict import Criterion

Progress = Callable[[int, int, str], None]
"""Called with how many are done, of how many (0: not known yet), and what comes now."""


def quiet(done: int, total: int, what: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Spread:
    """A number that was measured several times: the median, and the smallest and largest seen."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Iterable[float]) -> Spread:
    """The spread of at least one value, in six significant digits: what a person reads is what is judged."""
    found = list(values)
    return Spread(
        significant(statistics.median(found)), significant(min(found)), significant(max(found)), len(found)
    )


def significant(value: float) -> float:
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Row:
    """What one setting did on one work, in batches of one size."""

    work: str
    setting: str
    batch: int
    numbers: dict[str, Spread]


@dataclass(frozen=True)
class Measured:
    """What a check saw.

    baseline: what the numbers compare with. models: the shipped models that it ran. notes: what a reader
    should know to read the numbers rightly.
    """

    criteria: Sequence[Criterion]
    rows: Sequence[Row]
    baseline: str
    models: Sequence[str] = ()
    notes: Sequence[str] = ()


class Units:
    """Runs the units of a check, each a name and what measures it, and tells how far it is."""

    def __init__(self, progress: Progress = quiet) -> None:
        self.progress, self.done, self.total = progress, 0, 0

    def expect(self, number: int) -> None:
        """That many more units will come."""
        self.total += number

    def measure(self, name: str, run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The unit's values, as plain JSON data."""
        self.progress(self.done, self.total, name)
        values = run()
        self.done += 1
        return values


@dataclass(frozen=True)
class Budget:
    """How much a check may do: examples of each work, tokens for each, rounds of timing, and seeds.

    units: runs what is measured; everything slow goes through it, so that it survives an interruption.
    """

    examples: int = 5
    max_new_tokens: int = 40
    rounds: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    units: Units = field(default_factory=Units, compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """The numbers alone."""
        return {
            "examples": self.examples,
            "max_new_tokens": self.max_new_tokens,
            "rounds": self.rounds,
            "seeds": list(self.seeds),
        }
