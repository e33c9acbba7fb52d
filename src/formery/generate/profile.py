"""Where the time of a generation goes: drafting, each kind of part, and what is left for Python."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from formery.files import atomic_write
from formery.parts import (
    MLP,
    Attention,
    CrossAttention,
    Embedding,
    Experts,
    GatedMLP,
    Mamba2,
    Output,
    TiedOutput,
)
from formery.parts.spans import Span, Spans, watched

PARTS: dict[str, tuple[type[nn.Module], ...]] = {
    "embedding": (Embedding,),
    "attention": (Attention, CrossAttention, Mamba2),
    "feed-forward": (MLP, GatedMLP, Experts),
    "output": (Output, TiedOutput),
}
ORDER = ("draft", "embedding", "attention", "feed-forward", "norm", "output")


@dataclass
class Profile:
    """seconds: in all. spans: the stretches that were seen, those within a draft among them."""

    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def table(self) -> list[tuple[str, float, int]]:
        """Each kind of work, its seconds, and how often it was done.

        What a draft model does counts as draft. verify: what the target's calls took beside their parts. Python: what
        is left of the whole.
        """
        seconds: defaultdict[str, float] = defaultdict(float)
        times: Counter[str] = Counter()
        inside = 0.0
        for one in self.spans:
            if "draft" in one.within or (one.name in PARTS and any(name in PARTS for name in one.within)):
                continue
            times[one.name] += 1
            seconds[one.name] += one.seconds
            if one.name != "verify" and "verify" in one.within:
                inside += one.seconds
        seconds["verify"] -= inside
        rows = [(name, seconds[name], times[name]) for name in (*ORDER, "verify") if times[name]]
        return [*rows, ("Python", max(0.0, self.seconds - sum(seconds.values())), 0)]

    def save(self, path: str | Path) -> None:
        """Writes a trace that Perfetto (ui.perfetto.dev) and Chrome's own viewer open."""
        first = min((one.start for one in self.spans), default=0.0)
        events = [
            {
                "name": one.name, "ph": "X", "pid": 1, "tid": 1,
                "ts": round((one.start - first) * 1e6, 3), "dur": round(one.seconds * 1e6, 3),
            }
            for one in sorted(self.spans, key=lambda one: one.start)
        ]  # fmt: skip
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


@contextmanager
def profiled() -> Iterator[Profile]:
    """Profiles what is generated within this block; the profile is whole when the block has ended."""
    profile = Profile()
    started = time.perf_counter()
    with watched() as spans:
        begun: list[tuple[nn.Module, float]] = []
        before = register_module_forward_pre_hook(lambda part, _: _begin(part, begun, spans))
        after = register_module_forward_hook(lambda part, _, result: _end(part, begun, spans))
        try:
            yield profile
        finally:
            before.remove()
            after.remove()
            profile.seconds, profile.spans = time.perf_counter() - started, spans.found


def _kind(part: nn.Module) -> str | None:
    return next((name for name, kinds in PARTS.items() if isinstance(part, kinds)), None)


def _begin(part: nn.Module, begun: list[tuple[nn.Module, float]], spans: Spans) -> None:
    name = _kind(part)
    if name is not None:
        begun.append((part, time.perf_counter()))
        spans.open.append(name)


def _end(part: nn.Module, begun: list[tuple[nn.Module, float]], spans: Spans) -> Any:
    if begun and begun[-1][0] is part:
        start = begun.pop()[1]
        spans.add(spans.open.pop(), start, time.perf_counter() - start)
