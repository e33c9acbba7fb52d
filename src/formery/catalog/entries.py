"""The papers that are here, each with a status derived from its code, its record, and whether they agree."""

from dataclasses import dataclass
from typing import Literal

from formery.evidence.paper import PAPERS, Paper, paper
from formery.evidence.record import Record, read, stale
from formery.evidence.verdict import Verdict
from formery.generate import METHODS, Method
from formery.methods import discover

Status = Literal["runs", "checked", "stale"]


@dataclass(frozen=True)
class Entry:
    """A paper and where it stands.

    status: "runs" (its code is here), "checked" (and there is a record of that code), "stale" (the code, or a
    model that the record was made with, has changed since). record: the last one, if any. methods: what its
    code registers.
    """

    paper: Paper
    status: Status
    record: Record | None
    methods: tuple[Method, ...]

    @property
    def verdict(self) -> Verdict | None:
        """The verdict of the record; that of older code where it is stale."""
        return None if self.record is None else self.record.verdict

    def to_json(self) -> dict[str, str | None]:
        """What a list shows, as plain data."""
        return {
            "slug": self.paper.slug,
            "title": self.paper.title,
            "part": self.paper.part,
            "status": self.status,
            "verdict": self.verdict,
        }


def papers() -> list[Entry]:
    """All papers, by part and slug."""
    discover()
    return [standing(one) for one in sorted(PAPERS.values(), key=lambda one: (one.part, one.slug))]


def entry(slug: str) -> Entry:
    """The paper of that slug; raises FormeryError, with the nearest slugs, when there is none."""
    discover()
    return standing(paper(slug))


def standing(paper: Paper) -> Entry:
    """A paper with its record and its methods."""
    record = read(paper.slug)
    status: Status = "runs" if record is None else "stale" if stale(record, paper) else "checked"
    methods = tuple(method for method in METHODS.values() if method.paper == paper.slug)
    return Entry(paper, status, record, methods)
