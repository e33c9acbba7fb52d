"""What is new in the catalogue since a day: papers that came in, and claims that were checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Literal

from formery.catalog.entries import Entry, papers
from formery.errors import FormeryError

DAYS = 30  # that are looked back, unless a day is given


@dataclass(frozen=True)
class Event:
    """Something that happened to a paper on a day: it came in, or its claim was checked."""

    kind: Literal["new", "checked"]
    entry: Entry
    date: str


def day(text: str | None, today: date | None = None) -> date:
    """A day written as YYYY-MM-DD, `DAYS` ago without one; FormeryError for anything else."""
    today = today or datetime.now(UTC).date()
    if text is None:
        return today - timedelta(days=DAYS)
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise FormeryError(f"{text!r} is no day: write it as YYYY-MM-DD, such as {today.isoformat()}.") from error


def news(since: date, entries: Sequence[Entry] | None = None) -> list[Event]:
    """What happened since that day, the latest first; a paper that came in and was checked on one day is told once."""
    events = []
    for entry in papers() if entries is None else entries:
        if entry.status == "checked":
            events.append(Event("checked", entry, entry.date))
        if entry.card.added and entry.card.added != entry.date:
            events.append(Event("new", entry, entry.card.added))
    recent = [event for event in events if event.date >= since.isoformat()]
    return sorted(recent, key=lambda event: (event.date, event.kind == "checked"), reverse=True)
