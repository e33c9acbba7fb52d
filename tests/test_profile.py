"""A profile accounts for all the time once, and its trace is one that viewers open."""

import json
from pathlib import Path

import pytest
from generation import model

from formery.generate import generate
from formery.generate.profile import Profile, profiled
from formery.parts.native import using
from formery.parts.spans import Span, span, watched, watching


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_what_a_generation_took_adds_up(kind: str, compiled: bool, tmp_path: Path) -> None:
    target = model(kind)
    with using("auto" if compiled else False), profiled() as profile:
        [one] = generate(target, [[3, 4, 5]], max_new_tokens=8, stop_tokens=[])
    rows = {name: (seconds, times) for name, seconds, times in profile.table()}
    assert {"draft", "embedding", "attention", "feed-forward", "output", "verify", "Python"} <= rows.keys()
    assert sum(seconds for seconds, _ in rows.values()) == pytest.approx(profile.seconds, rel=1e-6)
    assert all(seconds >= 0 for seconds, _ in rows.values())
    assert rows["draft"][1] == rows["verify"][1] == one.calls == 8
    profile.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == len(profile.spans)
    assert all(event["ph"] == "X" and event["dur"] >= 0 and event["ts"] >= 0 for event in events)
    assert [event["ts"] for event in events] == sorted(event["ts"] for event in events)


def test_what_a_draft_model_does_is_drafting() -> None:
    spans = [
        Span("attention", 0.0, 1.0, ("draft",)),
        Span("draft", 0.0, 2.0),
        Span("attention", 2.0, 1.0, ("verify",)),
        Span("verify", 2.0, 1.5),
    ]
    assert Profile(4.0, spans).table() == [
        ("draft", 2.0, 1),
        ("attention", 1.0, 1),
        ("verify", 0.5, 1),
        ("Python", 0.5, 0),
    ]


def test_nothing_is_noted_where_nobody_watches() -> None:
    with span("outer"):
        assert watching() is None
    with watched() as spans, span("outer"), span("inner"):
        pass
    assert [(one.name, one.within) for one in spans.found] == [("inner", ("outer",)), ("outer", ())]
    assert watching() is None


def test_hooks_are_gone_afterwards() -> None:
    target = model("rotary")
    with profiled() as profile:
        generate(target, [[3]], max_new_tokens=2, stop_tokens=[])
    before = len(profile.spans)
    generate(target, [[3]], max_new_tokens=2, stop_tokens=[])
    assert len(profile.spans) == before
