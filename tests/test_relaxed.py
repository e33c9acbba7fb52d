"""Lossy acceptance: the rules are their formulas, in their limits nothing is lost, and between them more stands."""

import math
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model, noisy
from hypothesis import given
from hypothesis import strategies as st

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.generate.relaxed import NearBest, Rollback

logits = st.lists(st.floats(-6, 6).map(lambda one: round(one, 2)), min_size=2, max_size=9)


@given(logits, st.data(), st.integers(1, 4), st.floats(0, 5))
def test_near_the_best(values: list[float], data: st.DataObject, beta: int, tau: float) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    total = math.log(sum(math.exp(one) for one in values))
    logs = [one - total for one in values]
    within = max(logs) - logs[token]
    likelier = sum(one > logs[token] + 1e-12 for one in logs)
    if abs(within - tau) < 1e-5 or beta == 1 or tau == 0:
        return
    assert NearBest(beta, tau)(torch.tensor(values), token) == (within <= tau and likelier < beta)


@given(logits, st.data(), st.floats(0.7, 8))
def test_rollback(values: list[float], data: st.DataObject, rollback: float) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    cost = math.log(sum(math.exp(one) for one in values)) - values[token]
    if abs(cost - rollback) > 1e-5:
        assert Rollback(rollback)(torch.tensor(values), token) == (cost <= rollback)


@pytest.mark.parametrize("rule", [NearBest(1, 9.0), NearBest(5, 0.0), Rollback(0.0), Rollback(0.69)], ids=str)
def test_in_the_limit_nothing_but_the_best_stands(rule: Any) -> None:
    for values in torch.randn(200, 7).round(decimals=1):
        tokens = [token for token in range(7) if token != int(values.argmax())]
        assert not any(rule(values, token) for token in tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_limit_the_text_is_greedy_s(kind: str) -> None:
    target = model(kind, max_length=30)
    draft, asked = noisy(target, 0.1), Settings(max_new_tokens=20, stop_tokens=frozenset([9, 31]))
    prompts = [[row + 2, 7, row + 5][: 1 + row % 3] for row in range(5)]
    wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
    for batch in (1, 5):
        found = generate(target, prompts, "bild:rollback=0:fallback=0", batch=batch, draft=draft, **vars(asked))
        assert [(one.tokens, one.stop) for one in found] == wanted
        assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)


def test_the_more_may_stand_the_fewer_calls() -> None:
    target = model("rotary")
    prompts, draft = [[row + 2, 7] for row in range(8)], noisy(target, 0.3)
    calls = []
    for rollback in (0.0, 2.0, 4.0, math.inf):
        found = generate(target, prompts, "bild:fallback=0:length=4", rollback=rollback, draft=draft, max_new_tokens=40)
        calls.append(sum(one.calls for one in found))
    assert calls == sorted(calls, reverse=True) and calls[0] > calls[-1]
    # With infinity all guesses stand: four and one token a call.
    assert calls[-1] == 8 * 40 / 5


def test_a_draft_ends_where_the_small_model_is_unsure() -> None:
    target = model("rotary")
    prompts = [[row + 2, 7] for row in range(6)]

    def drafted(fallback: float) -> int:
        found = generate(target, prompts, "bild", fallback=fallback, draft=target, max_new_tokens=30)
        events = [event for one in found for event in one.trace]
        for one in found:
            text = list(one.prompt)
            for event in one.trace:
                for place in range(len(event.drafted)):
                    chances = target(torch.tensor([text + event.drafted[:place]]))[0, -1].softmax(-1)
                    assert chances.max().item() >= fallback - 1e-4
                text += event.emitted
        return sum(len(event.drafted) for event in events)

    counts = [drafted(fallback) for fallback in (0.0, 0.05, 0.1, 1.0)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] and counts[-1] == 0


def test_drafts_do_not_depend_on_neighbours() -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(7)]
    for temperature in (0.0, 0.7):
        asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 20, "stop_tokens": [9, 31]}
        asked |= {"draft": noisy(target, 0.2), "fallback": 0.04}
        whole = generate(target, prompts, "bild", **asked)
        for batch in (1, 3):
            parts = generate(target, prompts, "bild", batch=batch, **asked)
            assert [[event.drafted for event in one.trace] for one in parts] == [
                [event.drafted for event in one.trace] for one in whole
            ]
            assert [one.tokens for one in parts] == [one.tokens for one in whole]


@pytest.mark.parametrize(
    ("wrong", "said"), [({"fallback": 1.5}, "between 0 and 1, not 1.5"), ({"rollback": -1.0}, "0 nats or more")]
)
def test_what_cannot_be_is_refused(wrong: dict[str, float], said: str) -> None:
    target = model("rotary")
    with pytest.raises(FormeryError, match=said):
        generate(target, [[3, 4]], "bild", draft=target, max_new_tokens=4, **wrong)
    with pytest.raises(FormeryError, match="beta >= 1 and tau >= 0"):
        NearBest(0, 1.0)
