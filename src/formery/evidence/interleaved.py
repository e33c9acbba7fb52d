"""Pieces of work timed against each other in rounds, so that a busy minute of the machine hits them all."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleaved(entrants: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """The seconds of each entrant in each of the rounds, after one call each to warm up.

    A round calls each of them `repeats` times, in turn, and counts the median; the order is rotated from call to call.
    """
    names = list(entrants)
    for run in entrants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            for turn in range(len(names)):
                name = names[(repeat + turn) % len(names)]
                began = time.perf_counter()
                entrants[name]()
                seconds[name].append(time.perf_counter() - began)
        for name in names:
            found[name].append(statistics.median(seconds[name]))
    return found


def speedups(own: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """The baseline's seconds over one's own, round by round."""
    return [other / mine for mine, other in zip(own, baseline, strict=True)]
