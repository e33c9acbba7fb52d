"""How well the catalogue's search finds: by words, by meaning and by both, on queries that were judged by hand.

    nDCG@10 = DCG of the first ten / DCG of the best ten, DCG = Σ (2^grade - 1) / log2(1 + rank)
    recall@10 = answers (grade 2 or 3) among the first ten / answers, of which no more than ten can be there
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log2
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.table import WIDTH, progress
from formery.catalog import cards
from formery.catalog.ranking import ranked
from formery.errors import FormeryError

QUERIES = Path(__file__).parent / "queries.jsonl"
DEPTH, ANSWER = 10, 2
WAYS: dict[str, dict[str, bool]] = {
    "words": {},
    "meaning": {"words": False, "meaning": True},
    "both": {"meaning": True},
}


@dataclass(frozen=True)
class Query:
    """What somebody asks, the part it is about, and the grade of each paper that answers (3: just what was asked)."""

    query: str
    part: str
    relevant: Mapping[str, int]


@dataclass(frozen=True)
class Found:
    """What a way of searching found for a query."""

    way: str
    query: str
    part: str
    ndcg: float
    recall: float
    milliseconds: float
    first: list[str]


def queries(path: Path = QUERIES) -> list[Query]:
    """The judged queries; FormeryError where one is answered by a paper that is not there."""
    found = [Query(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    for one in found:
        if unknown := one.relevant.keys() - cards().keys():
            raise FormeryError(f"{one.query!r} is answered by {', '.join(sorted(unknown))}, which is no paper here.")
    return found


def ndcg(ranking: Sequence[str], relevant: Mapping[str, int]) -> float:
    """Discounted gain of the first ten over that of the best ten."""

    def gain(grades: Sequence[int]) -> float:
        return sum((2**grade - 1) / log2(1 + rank) for rank, grade in enumerate(grades[:DEPTH], 1))

    return gain([relevant.get(slug, 0) for slug in ranking]) / gain(sorted(relevant.values(), reverse=True))


def recall(ranking: Sequence[str], relevant: Mapping[str, int]) -> float:
    """The share of the answers among the first ten."""
    answers = {slug for slug, grade in relevant.items() if grade >= ANSWER}
    return len(answers & {*ranking[:DEPTH]}) / min(len(answers), DEPTH)


def measure(asked: Any) -> int:
    """Every query by every way."""
    console, told = Console(), Console(stderr=True)
    asked_for = queries()
    rows: list[Found] = []
    with progress(told, "queries") as tell:
        for number, one in enumerate(asked_for):
            tell(number, len(asked_for), one.query)
            for way, how in WAYS.items():
                ranked(one.query, **how)  # once unmeasured: indexes and weights are read
                began = perf_counter()
                found = ranked(one.query, **how)
                spent = 1000 * (perf_counter() - began)
                scores = ndcg(found, one.relevant), recall(found, one.relevant)
                rows.append(Found(way, one.query, one.part, *scores, spent, found[:DEPTH]))
    console.print(table(rows), width=console.width if console.is_terminal else WIDTH)
    if asked.json:
        report.write(asked.json, report.document([asdict(row) for row in rows], [], 1))
    return 0


def table(rows: Sequence[Found]) -> Table:
    """Means over all queries, and by part."""
    drawn = Table(title="nDCG@10 and recall@10", title_justify="left", box=None, pad_edge=False)
    drawn.add_column("part")
    drawn.add_column("queries", justify="right")
    for way in WAYS:
        drawn.add_column(f"{way}\nnDCG", justify="right")
        drawn.add_column("\nrecall", justify="right")
    parts = sorted({row.part for row in rows})
    for part in [*parts, "all"]:
        some = [row for row in rows if part in (row.part, "all")]
        cells = []
        for way in WAYS:
            own = [row for row in some if row.way == way]
            cells += [f"{mean(row.ndcg for row in own):.2f}", f"{mean(row.recall for row in own):.2f}"]
        drawn.add_row(part, str(len(some) // len(WAYS)), *cells)
    return drawn
