"""Attention over keys that several processes have among them: exact, counted, and usable by any model."""

import math
from typing import Any

import line_runs
import pytest
import spread_runs as runs
import torch

from formery.errors import FormeryError
from formery.evidence.side_by_side import side_by_side
from formery.methods.runtime.layers import Shape, plain
from formery.methods.runtime.ring import RingAttention
from formery.methods.runtime.tree_attention import SHAPE, TreeAttention, energy, formula, gradient, spread
from formery.models import Decoder
from formery.parts import Attention, Embedding, Mamba2, PreNorm, RMSNorm, TiedOutput, build
from formery.parts.messages import Messages
from formery.parts.spread import share_of


@pytest.fixture(scope="module")
def processes() -> list[dict[str, Any]]:
    """What two real processes saw."""
    return side_by_side(2, runs.real)


def exact_and_alike(seen: list[list[dict[str, Any]]]) -> None:
    for same in zip(*seen, strict=True):
        assert all(one["error"] < 1e-6 for one in same)
        assert all(torch.equal(one["answer"], same[0]["answer"]) for one in same)


def as_the_formula_says(seen: list[list[dict[str, Any]]]) -> None:
    size = len(seen)
    for same in zip(*seen, strict=True):
        sent, steps, slots = sum(one["sent"] for one in same), max(one["steps"] for one in same), same[0]["slots"]
        if same[0]["way"] == "ring":
            assert (sent, steps) == ((size - 1) * slots * 2 * 2 * 2 * 8 * 4, size - 1)
            continue
        whole = 2 ** int(math.log2(size))
        beyond = size - whole
        assert sent == (whole * int(math.log2(whole)) + 2 * beyond) * 2 * 4 * 3 * 10 * 4
        assert steps == int(math.log2(whole)) + (2 if beyond else 0)


def test_two_processes_attend_as_one_and_send_what_the_formulae_say(processes: list[dict[str, Any]]) -> None:
    exact_and_alike([one["layers"] for one in processes])
    as_the_formula_says([one["layers"] for one in processes])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
def test_so_do_as_many_as_there_are(size: int) -> None:
    seen = runs.in_threads(size, runs.layers)
    exact_and_alike(seen)
    as_the_formula_says(seen)


def test_the_formula_of_the_check_is_what_is_sent() -> None:
    one = {"size": 4, "context": 96}
    query, keys, values = SHAPE.drawn(96, 0)

    def run(line: Any) -> dict[str, tuple[int, int]]:
        found = {}
        for name, way in (("tree", runs.along_tree), ("ring", runs.around)):
            counted = line()
            own = [x.transpose(1, 2)[:, counted.rank :: 4].contiguous().transpose(1, 2) for x in (keys, values)]
            way(runs.Share(query, *own, 96, counted))
            found[name] = counted.sent, counted.steps
        return found

    seen = runs.in_threads(4, run)
    for way in ("tree", "ring"):
        told = formula({**one, "way": way})
        assert told == {"sent": sum(rank[way][0] for rank in seen), "steps": max(rank[way][1] for rank in seen)}


@pytest.mark.parametrize("way", ["tree", "ring"])
def test_two_processes_write_the_tokens_of_one(processes: list[dict[str, Any]], way: str) -> None:
    for method, seen in processes[0][way].items():
        assert seen["spread"] == seen["alone"] == processes[1][way][method]["spread"]
        assert seen["accepted"] or method == "greedy"


@pytest.mark.parametrize("name", ["rotary", "biased", "translator"])
def test_three_write_the_tokens_of_one_by_every_kind_of_method(name: str) -> None:
    methods = ("greedy", "aggressive-decoding", "beam") if name != "translator" else ("parallel-jacobi-decoding",)
    for kind in (TreeAttention, RingAttention) if name == "rotary" else (TreeAttention,):
        for seen in runs.in_threads(3, lambda _, kind=kind: runs.texts(name, methods, kind)):
            for found in seen.values():
                assert found["spread"] == found["alone"]


def test_a_state_is_cut_back_thinned_out_settled_and_grown_over_processes(processes: list[dict[str, Any]]) -> None:
    for seen in (*(one["states"] for one in processes), *runs.in_threads(3, lambda _: runs.states())):
        for own, other in zip(seen["plain"], seen["spread"], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


def test_each_process_holds_its_share_of_the_state(processes: list[dict[str, Any]]) -> None:
    for one in processes:
        assert one["states"]["spread bytes"] == tuple(size // 2 for size in one["states"]["plain bytes"])


def test_a_group_may_be_named(processes: list[dict[str, Any]]) -> None:
    for one in processes:
        [texts] = one["group"]["texts"].values()
        assert texts["spread"] == texts["alone"]
    assert "not one of the group" in processes[1]["group"]["said"]


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_attention_is_the_gradient_of_the_energy(groups: int) -> None:
    query, keys, values = (one.double() for one in Shape(8, groups, 16).drawn(40, 1))
    source = torch.zeros(query.shape, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(energy(query, keys, values, source).sum(), source)
    assert (found - plain(query, keys, values)).abs().max() < 1e-10
    assert gradient(0) < 1e-10


def test_the_gradient_is_that_of_the_formula_away_from_zero_too() -> None:
    query, keys, values = (one.double() for one in Shape(4, 2, 8).drawn(6, 1))
    source = torch.randn(query.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: energy(query, keys, values, x), source)


@pytest.mark.parametrize("slots", range(12))
def test_shares_are_level_and_leave_out_nothing(slots: int) -> None:
    for size in range(1, 6):
        shares = [share_of(slots, rank, size) for rank in range(size)]
        assert sum(shares) == slots and max(shares) - min(shares) <= 1


def test_a_model_alone_is_as_it_was() -> None:
    model = runs.models()["rotary"]
    own = spread(model)
    tokens = torch.randint(31, (2, 9))
    torch.testing.assert_close(own(tokens), model(tokens), rtol=0, atol=0)
    assert {id(one) for one in own.parameters()} == {id(one) for one in model.parameters()}
    with torch.inference_mode():
        said = [one.step(tokens, one.start(2, 9)) for one in (own, model)]
    torch.testing.assert_close(*said, rtol=1e-12, atol=1e-12)
    again = build(own.describe())
    assert again.describe() == own.describe()
    assert {type(part) for part in again.modules() if isinstance(part, Attention)} == {TreeAttention}


def test_what_cannot_be_spread_is_told() -> None:
    embedding = Embedding(7, 8)
    layer = PreNorm(RMSNorm(8), Mamba2(8, 2, 8, 4))
    with pytest.raises(FormeryError, match="no part of the kind Attention"):
        spread(Decoder(embedding, [layer], None, TiedOutput(embedding)))
    with pytest.raises(FormeryError, match="a TreeAttention attends in a way of its own"):
        spread(spread(runs.models()["rotary"]))


def test_a_process_that_dies_ends_the_others() -> None:
    with pytest.raises(FormeryError, match=r"has died"):
        side_by_side(2, line_runs.dying)


@pytest.mark.parametrize(("why", "said"), [("a mistake", "^a mistake$"), ("a bug", "ValueError: a bug")])
def test_what_a_process_raises_is_told(why: str, said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        side_by_side(1, line_runs.failing, why)


def test_no_processes_are_told() -> None:
    with pytest.raises(FormeryError, match="at least 1 process"):
        side_by_side(0, line_runs.dying)
    assert (Messages().rank, Messages().size) == (0, 1)
