"""What the records say of each work: every setting that was measured on it, beside its baseline."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from formery.catalog import Entry
from formery.evidence.measured import Row, Spread
from formery.evidence.record import Record

NAMES = {
    "speedup": "speed, × baseline",
    "identical": "same text as greedy",
    "calls_per_token": "calls a token",
    "accepted_per_call": "guesses kept a call",
}
SHARES = ("identical",)


@dataclass(frozen=True)
class Point:
    """A setting of a paper, measured on a work in batches of one size."""

    entry: Entry
    row: Row

    @property
    def label(self) -> str:
        """The setting as a reader names it."""
        name, _, options = self.row.setting.partition(":")
        return f"{name} {options.replace(':', ' ')}".strip()

    @property
    def own(self) -> bool:
        """Whether it is a method of the paper's, not one that it compares with."""
        return re.split("[: ]", self.row.setting)[0] in {method.name for method in self.entry.card.methods}

    @property
    def older(self) -> bool:
        """Whether the code or a model has changed since."""
        return self.entry.status == "stale"

    def get(self, name: str) -> Spread | None:
        """The number of that name, where it was measured."""
        return self.row.numbers.get(name)


def works(entries: Sequence[Entry]) -> dict[str, list[Point]]:
    """All that was measured, with older code too, by work; the fastest first."""
    found: dict[str, list[Point]] = {}
    for entry in entries:
        record = entry.record
        for row in record.rows if record else ():
            if "speedup" in row.numbers:
                found.setdefault(row.work, []).append(Point(entry, row))
    for points in found.values():
        points.sort(key=lambda one: -one.row.numbers["speedup"].median)
    return dict(sorted(found.items()))


def best(points: Sequence[Point], batch: int) -> list[Point]:
    """The fastest setting of each paper's own methods in batches of that size, drawn texts aside."""
    chosen: dict[str, Point] = {}
    for one in points:
        if one.own and one.row.batch == batch and one.get("identical") is not None:
            chosen.setdefault(one.entry.card.slug, one)
    return list(chosen.values())


def shown(name: str, spread: Spread) -> str:
    """A number with its range, as a cell shows it."""

    def text(value: float) -> str:
        return f"{100 * value:.4g} %" if name in SHARES else f"{value:.3g}"

    if spread.low == spread.high:
        return text(spread.median)
    return f"{text(spread.median)} ({text(spread.low)}–{text(spread.high)})"


def columns(record: Record) -> list[str]:
    """Which of the numbers that have a name here the record has."""
    return [name for name in NAMES if any(name in row.numbers for row in record.rows)]
