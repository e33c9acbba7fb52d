"""The papers with a status that is derived from code and records, and the filters of a list."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from formery.catalog.card import PARTS, Card, card, cards
from formery.errors import FormeryError, unknown
from formery.evidence import record as records
from formery.evidence.digest import Sources, digest
from formery.evidence.kept import Kept
from formery.evidence.record import Record
from formery.evidence.verdict import Verdict

Status = Literal["entry only", "runs", "checked", "stale"]
STATUSES: tuple[Status, ...] = get_args(Status)
# A record is validated once for each of its versions: that takes longer than a whole list may.
KEPT = Kept("records", Path(records.__file__).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Entry:
    """A paper and where it stands.

    status: "entry only" (a card), "runs" (its code is here), "checked" (and there is a record of that code), "stale"
    (the code, or a model that the record was made with, has changed since). verdict: the record's; that of older code
    where it is stale. date: when it was checked, as YYYY-MM-DD.
    """

    card: Card
    status: Status
    verdict: Verdict | None = None
    date: str = ""

    @property
    def record(self) -> Record | None:
        """The last record, if there is one."""
        return records.read(self.card.slug) if self.verdict else None

    def to_json(self) -> dict[str, Any]:
        """What a list shows, as plain data."""
        names = ("slug", "name", "title", "year", "part", "domain", "kind", "training", "exact")
        return {
            **{name: getattr(self.card, name) for name in names},
            "status": self.status,
            "verdict": self.verdict,
            "checked": self.date or None,
        }


@dataclass(frozen=True)
class Wanted:
    """Which papers a list shows; what is None is not asked for.

    part, domain, status, kind: that one. lossless: its output is the plain method's. trained: whether something has to
    be trained for it; what nobody trains is neither.
    """

    part: str | None = None
    domain: str | None = None
    status: str | None = None
    kind: str | None = None
    lossless: bool | None = None
    trained: bool | None = None

    def check(self) -> "Wanted":
        """Itself; FormeryError where a value is none that a card has."""
        everyone = cards().values()
        known: dict[str, Iterable[str]] = {
            "part": PARTS,
            "domain": {one.domain for one in everyone},
            "status": STATUSES,
            "kind": {one.kind for one in everyone},
        }
        for name, values in known.items():
            asked = getattr(self, name)
            if asked is not None and asked not in values:
                raise unknown(name, asked, sorted(values))
        return self

    def __call__(self, entry: Entry) -> bool:
        one = entry.card
        kept = all(
            asked is None or asked == has
            for asked, has in (
                (self.part, one.part),
                (self.domain, one.domain),
                (self.status, entry.status),
                (self.kind, one.kind),
                (self.lossless, one.exact),
            )
        )
        return kept and (self.trained is None or one.training in (("added", "whole") if self.trained else ("none",)))


def papers() -> list[Entry]:
    """All papers, by part and slug."""
    sources = Sources()
    found = [standing(one, sources) for one in cards().values()]
    KEPT.save()
    return found


def entry(slug: str) -> Entry:
    """The paper of that slug; raises FormeryError, with the nearest slugs, when there is none."""
    return standing(card(slug))


def standing(one: Card, sources: Sources | None = None) -> Entry:
    """A paper with where it stands."""
    if not one.module:
        return Entry(one, "entry only")
    path = records.records_folder() / f"{one.slug}.json"
    if not path.is_file():
        return Entry(one, "runs")
    found = KEPT.of(path, _summary)
    agree = found["digest"] == digest(one.module, sources) and found["models"] == records.model_digests(found["models"])
    return Entry(one, "checked" if agree else "stale", found["verdict"], found["date"][:10])


def _summary(path: Path) -> dict[str, Any]:
    """What a list needs of a record."""
    found = records.read(path.stem, path.parent)
    if found is None:
        raise FormeryError(f"{path} was there a moment ago and is gone.")
    return {name: getattr(found, name) for name in ("verdict", "digest", "models", "date")}
