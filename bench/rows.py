"""From seconds to rows: rates, spreads, and ratios within rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from bench.cases import Case
from bench.limits import least_seconds
from bench.race import Entrant
from bench.systems import OURS, REFERENCE

LOSSES = {"float32": 1e-4, "bfloat16": 1e-2}  # how far apart, relatively, the first losses of equal models may lie


@dataclass(frozen=True)
class Row:
    """What one system did in one case.

    width: of the calls that were timed, where single calls were. spread: the slowest and the fastest round. Every
    ratio is of rates, above 1 where this system is faster, the median over the rounds of the ratio in the same
    round; None where the other did not run. best_peer: the fastest system that is not ours. ratio_to_limit: the
    share of what the machine could do at best. ratio_to_one_token: this call's time over that of a call of one
    token. agrees: whether the tokens (in training, the first losses) are those of transformers in the same dtype;
    for int8 and int4, of transformers in float32. seconds: of each round.
    """

    work: str
    model: str
    dtype: str
    batch: int
    width: int | None
    system: str
    detail: str
    tokens_per_second: float
    spread: tuple[float, float]
    best_peer: str | None
    ratio_to_best_peer: float | None
    ratio_to_best_peer_spread: tuple[float, float] | None
    ratio_to_transformers: float | None
    ratio_to_limit: float
    limit_tokens_per_second: float
    ratio_to_one_token: float | None
    agrees: bool | None
    first_difference: dict[str, Any] | None
    seconds: list[float]


Laps = dict[str, list[float]]


def rows_of(
    case: Case,
    entrants: Sequence[Entrant],
    laps: Sequence[list[float]],
    reading: Sequence[float],
    product: Sequence[float],
) -> list[Row]:
    """A row for each entrant; `reading` and `product` are the laps of the machine's limits."""
    pairs = list(zip(entrants, laps, strict=True))
    ones = {entrant.system: seconds for entrant, seconds in pairs if entrant.width == 1}
    rows = []
    for width in dict.fromkeys(entrant.width for entrant in entrants):
        here = [(entrant, seconds) for entrant, seconds in pairs if entrant.width == width]
        passes = case.passes(width)
        limit = [least_seconds(passes, case.dtype, *both) for both in zip(reading, product, strict=True)]
        rows += _compared(case, here, limit, ones)
    return rows


def _compared(case: Case, here: list[tuple[Entrant, list[float]]], limit: list[float], ones: Laps) -> list[Row]:
    """Rows of those that did the same."""
    timed: Laps = {entrant.system: seconds for entrant, seconds in here}
    peer = best_peer(timed)
    reference = next((entrant for entrant, _ in here if entrant.system == REFERENCE), None)
    rows = []
    for entrant, seconds in here:
        tokens = case.tokens(entrant.width)
        rates = [tokens / one for one in seconds]
        to_peer = ratios(seconds, timed.get(peer or ""))
        difference = None if reference is None else first_difference(case, entrant.output, reference.output)
        rows.append(
            Row(
                case.work, case.shape.name, case.dtype, case.batch, entrant.width, entrant.system, entrant.detail,
                tokens_per_second=short(median(rates)),
                spread=(short(min(rates)), short(max(rates))),
                best_peer=peer,
                ratio_to_best_peer=middle(to_peer),
                ratio_to_best_peer_spread=None if to_peer is None else (short(min(to_peer)), short(max(to_peer))),
                ratio_to_transformers=middle(ratios(seconds, timed.get(REFERENCE))),
                ratio_to_limit=short(median(ratios(seconds, limit) or [])),
                limit_tokens_per_second=short(tokens / median(limit)),
                ratio_to_one_token=middle(ratios(ones.get(entrant.system, []), seconds)) if entrant.width else None,
                agrees=None if reference is None else difference is None,
                first_difference=difference,
                seconds=[short(one) for one in seconds],
            )
        )  # fmt: skip
    return rows


def best_peer(timed: Laps) -> str | None:
    """The system with the least median time that is not ours."""
    peers = {system: median(seconds) for system, seconds in timed.items() if system != OURS}
    return min(peers, key=peers.__getitem__) if peers else None


def ratios(seconds: Sequence[float], others: Sequence[float] | None) -> list[float] | None:
    """How many times as fast as the other, in each round."""
    return [other / own for own, other in zip(seconds, others, strict=True)] if others and seconds else None


def first_difference(case: Case, own: Any, reference: Any) -> dict[str, Any] | None:
    """Where two outputs part: row, place, and both tokens there; in training, both losses."""
    if case.work == "train":
        near = abs(own - reference) <= LOSSES[case.dtype] * abs(reference)
        return None if near else {"loss": own, "reference": reference}
    for row, (mine, theirs) in enumerate(zip(own, reference, strict=True)):
        for place, (token, other) in enumerate(zip(mine, theirs, strict=True)):
            if token != other:
                return {"row": row, "place": place, "token": token, "reference": other}
    return None


def middle(values: Sequence[float] | None) -> float | None:
    """The median, if there is anything."""
    return None if values is None else short(median(values))


def short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")
