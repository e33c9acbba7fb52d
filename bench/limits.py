"""What the machine can do at best, measured among the others: bytes read and operations computed in a second."""

from collections.abc import Callable, Sequence

import torch

from bench.cases import BYTES, Pass
from bench.race import Entrant

BANDWIDTH, ARITHMETIC = "memory bandwidth", "arithmetic"
BUFFER = 512 * 2**20  # bytes: far more than any cache holds
SIDE = 2048


def bandwidth() -> Entrant:
    """Reads a large buffer from end to end, on all cores."""
    buffer = torch.ones(BUFFER // 4)
    return Entrant(BANDWIDTH, lambda: float(buffer.amax()), repeats=3)


def arithmetic(dtype: str) -> Entrant:
    """Multiplies two large square matrices; small integers are multiplied as int8."""
    return Entrant(ARITHMETIC, _product(dtype), repeats=3)


def _product(dtype: str) -> Callable[[], object]:
    if dtype in ("int8", "int4"):
        left = torch.randint(-8, 8, (SIDE, SIDE), dtype=torch.int8)
        return lambda: torch._int_mm(left, left.t())
    matrix = torch.randn(SIDE, SIDE).to(getattr(torch, dtype))
    return lambda: matrix @ matrix


def least_seconds(passes: Sequence[Pass], dtype: str, reading: float, product: float) -> float:
    """The time below which no program could stay: each pass reads its weights once, or computes, whichever is longer.

    reading, product: what the two limits' own laps took. Activations, caches and scales are left out.
    """
    bytes_a_second, operations_a_second = BUFFER / reading, 2 * SIDE**3 / product
    return sum(
        one.times * max(one.weights * BYTES[dtype] / bytes_a_second, 2 * one.weights * one.tokens / operations_a_second)
        for one in passes
    )
