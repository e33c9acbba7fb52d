"""The race: everyone runs once in each round, in an order that rotates, so that a busy minute hits all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

PAUSE = 0.25  # seconds between two runs: other libraries' threads wait busily for a while when their work is done

Tell = Callable[[int, int, str], None]
"""Called with how many runs are done, of how many (0: not known yet), and what comes now."""


def nothing() -> None:
    """No preparation."""


@dataclass
class Entrant:
    """Something to be timed.

    run: the timed work. prepare: done before each, untimed. repeats: runs in a round, of which the median counts.
    width: of the calls, where single calls are timed. output: what it gave when it warmed up. detail: a remark.
    """

    system: str
    run: Callable[[], Any]
    prepare: Callable[[], None] = nothing
    repeats: int = 1
    width: int | None = None
    output: Any = None
    detail: str = ""


def order(entrants: int, number: int) -> list[int]:
    """Who runs when in that round."""
    return [(number + turn) % entrants for turn in range(entrants)]


def race(entrants: Sequence[Entrant], rounds: int, tell: Tell, pause: float = PAUSE) -> list[list[float]]:
    """Times every entrant, already warm, in each of the rounds; seconds, for each entrant and round."""
    laps: list[list[float]] = [[] for _ in entrants]
    total = rounds * len(entrants)
    for number in range(rounds):
        for turn, which in enumerate(order(len(entrants), number)):
            tell(number * len(entrants) + turn, total, entrants[which].system)
            time.sleep(pause)
            laps[which].append(lap(entrants[which]))
    return laps


def lap(entrant: Entrant) -> float:
    """The median seconds of the entrant's runs in one round."""
    times = []
    for _ in range(entrant.repeats):
        entrant.prepare()
        began = time.perf_counter()
        entrant.run()
        times.append(time.perf_counter() - began)
    return median(times)
