"""Which worker looks at which keys in one step of decoding: three ways to deal out attention, carried out by threads.

A head's keys are cut into tiles of equal size. A schedule gives each worker spans of tiles; whatever it is, the partial
softmaxes of a head's spans merge into plain attention (`parts/kernels/partial.py`).
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.kernels.partial import Partial, merged, partial


@dataclass(frozen=True)
class Span:
    """The tiles first, …, last - 1 of the keys of one row and one key head."""

    row: int
    head: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


Schedule = list[list[Span]]
Deal = Callable[[Sequence[int], int, int], Schedule]
"""Of the tiles of each row, the key heads and the workers: the spans of each worker."""


def tiles(lengths: Iterable[int], tile: int) -> list[int]:
    """How many tiles rows of these lengths have."""
    return [-(-length // tile) for length in lengths]


def check_deal(workers: int, tile: int) -> None:
    """FormeryError where work cannot be dealt so."""
    if workers < 1 or tile < 1:
        raise FormeryError(
            f"attention is dealt to at least 1 worker in tiles of 1 key or more, not {workers} and {tile}."
        )


def stream_k(counts: Sequence[int], heads: int, workers: int) -> Schedule:
    """All tiles in one line, row by row and head by head, cut into pieces that differ by one tile at most.

    As Osama, Merrill, Cecka, Garland and Owens deal out products of matrices ("Stream-K", 2023).
    """
    total, begun = sum(counts) * heads, 0
    bounds = [worker * total // workers for worker in range(workers + 1)]
    schedule: Schedule = [[] for _ in range(workers)]
    worker = 0
    for row, count in enumerate(counts):
        for head in range(heads):
            at = begun
            while at < begun + count:
                while bounds[worker + 1] <= at:
                    worker += 1
                last = min(begun + count, bounds[worker + 1])
                schedule[worker].append(Span(row, head, at - begun, last - begun))
                at = last
            begun += count
    return schedule


def per_head(counts: Sequence[int], heads: int, workers: int) -> Schedule:
    """Each head of each row whole, to the worker that is free first, as FlashAttention-2 does (Dao, 2023)."""
    return _in_turn([Span(row, head, 0, n) for row, n in enumerate(counts) for head in range(heads) if n], workers)


def fixed_split(counts: Sequence[int], heads: int, workers: int) -> Schedule:
    """Every head in as many pieces of one size, to the worker that is free first, as FlashDecoding does.

    (Dao, Haziza, Massa and Sizov, 2023.) In how many follows the rule of the flash-attention package: one where heads
    nearly suffice for all workers, else the fewest whose last round is filled at least 85 % as well as the best.
    """
    longest = max(counts, default=0)
    size = -(-longest // _splits(len(counts) * heads, workers, longest)) if longest else 1
    spans = [
        Span(row, head, first, min(first + size, count))
        for row, count in enumerate(counts)
        for head in range(heads)
        for first in range(0, count, size)
    ]
    return _in_turn(spans, workers)


def _splits(pieces: int, workers: int, longest: int) -> int:
    if pieces >= 0.8 * workers:
        return 1
    most = min(128, workers, longest)
    useful = [n for n in range(1, most + 1) if n == 1 or -(-longest // n) != -(-longest // (n - 1))]
    filled = {n: pieces * n / workers / -(-pieces * n // workers) for n in useful}
    return next(n for n in useful if filled[n] >= 0.85 * max(filled.values()))


def _in_turn(spans: Iterable[Span], workers: int) -> Schedule:
    schedule: Schedule = [[] for _ in range(workers)]
    free = [(0, worker) for worker in range(workers)]
    for span in spans:
        busy, worker = heapq.heappop(free)
        schedule[worker].append(span)
        heapq.heappush(free, (busy + len(span), worker))
    return schedule


def makespan(schedule: Schedule, overhead: float) -> float:
    """When the last worker is done, in the time of one tile.

    overhead: what it takes to begin a span, and to merge two partial softmaxes; the heads are merged side by side.
    """
    parts: dict[tuple[int, int], int] = {}
    for span in (span for spans in schedule for span in spans):
        parts[span.row, span.head] = parts.get((span.row, span.head), 0) + 1
    busy = max(sum(len(span) + overhead for span in spans) for spans in schedule)
    return busy + overhead * (max(parts.values(), default=1) - 1)


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "attention")


def dealt(
    deal: Deal,
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    lengths: Sequence[int],
    workers: int,
    tile: int,
    allowed: Bool[Tensor, "#batch #head #time slot"] | None = None,
    bias: Float[Tensor, "#batch #head #time slot"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Tensor, "batch head time value"]:
    """Attention to the first lengths[row] slots of each row, dealt out in tiles of so many keys to so many threads.

    A thread takes as many threads of PyTorch's as that is given: one, if workers are to be all there are. Raises
    FormeryError for workers or a tile below 1.
    """
    check_deal(workers, tile)
    groups = key.shape[1]
    shared = query.shape[1] // groups
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def look(span: Span) -> Partial:
        rows, heads = slice(span.row, span.row + 1), slice(span.head * shared, (span.head + 1) * shared)
        slots = slice(span.first * tile, min(span.last * tile, lengths[span.row]))

        def cut(whole: Tensor | None) -> Tensor | None:
            if whole is None:
                return None
            one = whole[rows] if whole.shape[0] > 1 else whole
            return (one[:, heads] if whole.shape[1] > 1 else one)[..., slots]

        keys, values = (one[rows, span.head : span.head + 1, slots] for one in (key, value))
        return partial(query[rows, heads], keys, values, cut(allowed), cut(bias), scale, soft_cap)

    def work(spans: list[Span]) -> list[tuple[Span, Partial]]:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # which are each thread's own
            return [(span, look(span)) for span in spans]

    schedule = deal(tiles(lengths, tile), groups, workers)
    found = map(work, schedule) if workers == 1 else _pool(workers).map(work, schedule)
    heads: dict[tuple[int, int], list[tuple[int, Partial]]] = {}
    for span, part in (one for some in found for one in some):
        heads.setdefault((span.row, span.head), []).append((span.first, part))
    answer = query.new_zeros(*query.shape[:-1], value.shape[-1])
    for (row, head), parts in heads.items():
        whole = merged(part for _, part in sorted(parts, key=lambda one: one[0]))
        answer[row, head * shared : (head + 1) * shared] = whole.value[0].to(answer.dtype)
    return answer
