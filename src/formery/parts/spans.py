"""Where time goes: named stretches of it, kept while somebody watches."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """A stretch of time; start: in seconds of `time.perf_counter`. within: the names of those around it."""

    name: str
    start: float
    seconds: float
    within: tuple[str, ...] = ()


@dataclass
class Spans:
    """What was seen, in the order in which it ended."""

    found: list[Span] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def add(self, name: str, start: float, seconds: float) -> None:
        """Notes a stretch that is over, within those that are still open."""
        self.found.append(Span(name, start, seconds, tuple(self.open)))


_watching: ContextVar[Spans | None] = ContextVar("spans", default=None)


def watching() -> Spans | None:
    """Where to note stretches of time; None where nobody watches."""
    return _watching.get()


@contextmanager
def watched() -> Iterator[Spans]:
    """Within this block stretches are noted."""
    spans = Spans()
    token = _watching.set(spans)
    try:
        yield spans
    finally:
        _watching.reset(token)


@contextmanager
def span(name: str) -> Iterator[None]:
    """This block is a stretch of that name."""
    spans = _watching.get()
    if spans is None:
        yield
        return
    start = time.perf_counter()
    spans.open.append(name)
    try:
        yield
    finally:
        spans.open.pop()
        spans.add(name, start, time.perf_counter() - start)
