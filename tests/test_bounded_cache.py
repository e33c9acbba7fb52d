"""Bounded caches: exact where nothing has to go, the same however tokens are fed, and what brute force keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from generation import KINDS, decoder, model
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.accounting import account, layer_bytes
from formery.generate import generate
from formery.methods.cache.a2sf import Fading
from formery.methods.cache.evict import bounded
from formery.methods.cache.tova import Tova
from formery.models.rewrite import rewritten, twin
from formery.parts import Alibi, Attention, Context, Layer, RelativeBuckets, Rotary, State
from formery.parts.bounded import Bounded
from formery.parts.eviction import Anything, Eviction, HeavyHitters, Held, Latest, Sinks
from formery.parts.part import build

RULES: list[Eviction] = [Latest(), Sinks(2), Anything(3), HeavyHitters(), Tova(), Fading(0.9), Fading(0.5, recent=0.25)]
PROMPTS = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(4)]
names = pytest.mark.parametrize("rule", RULES, ids=repr)


def tokens(rows: int, time: int) -> Tensor:
    return torch.randint(2, 97, (rows, time), generator=torch.Generator().manual_seed(rows * 100 + time))


@names
@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_as_large_as_the_context_changes_nothing(kind: str, rule: Eviction) -> None:
    target = model(kind, max_length=30)
    wanted = [one.tokens for one in generate(target, PROMPTS, "greedy", max_new_tokens=20)]
    for block, compacted in ((1, False), (7, True)):
        limited = bounded(target, rule, 30, block, compacted)
        assert [one.tokens for one in generate(limited, PROMPTS, "greedy", max_new_tokens=20)] == wanted


@pytest.mark.parametrize("rule", RULES[::2], ids=repr)
@pytest.mark.parametrize(("budget", "block", "compacted"), [(6, 1, False), (5, 4, True)])
def test_drafts_and_neighbours_change_nothing(rule: Eviction, budget: int, block: int, compacted: bool) -> None:
    limited = bounded(model("alibi", max_length=30), rule, budget, block, compacted)
    plain = [one.tokens for one in generate(limited, PROMPTS, "greedy", max_new_tokens=14)]
    alone = [generate(limited, [prompt], "greedy", max_new_tokens=14)[0].tokens for prompt in PROMPTS]
    drafted = generate(limited, PROMPTS, "parallel-jacobi-decoding", max_new_tokens=14)
    assert alone == plain
    assert [one.tokens for one in drafted] == plain
    assert 0 < sum(one.accepted for one in drafted) < sum(one.drafted for one in drafted)
    whole = generate(model("alibi", max_length=30), PROMPTS, "greedy", max_new_tokens=14)
    assert [one.tokens for one in whole] != plain


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 5), st.sampled_from(RULES)
)
def test_how_a_text_is_cut_does_not_matter(cuts: list[int], budget: int, block: int, rule: Eviction) -> None:
    limited = bounded(decoder(Rotary(), key_value_heads=2), rule, budget, block)
    text = tokens(2, sum(cuts))
    with torch.inference_mode():
        whole, state = limited(text), limited.start(2, 4)
        pieces = [limited.step(piece, state) for piece in text.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=2e-4, atol=2e-4)


Weights = Callable[[int, list[int]], Tensor]  # [slot] at a step


def brute_force(rule: Eviction, weights: Weights, time: int, budget: int) -> list[list[int]]:
    """What stays after each token, by going through the rule's own words with lists."""
    kept: list[int] = []
    notes: dict[int, float] = {}
    after = []
    for now in range(time):
        kept.append(now)
        notes[now] = 0.0
        if rule.memory is not None:
            for place, weight in zip(kept, weights(now, kept).tolist(), strict=True):
                notes[place] = rule.memory * notes[place] + weight
        while len(kept) > budget:
            at, noted = torch.tensor([[kept]]), torch.tensor([[[notes[one] for one in kept]]])
            scores = rule.scores(Held(at, noted, torch.tensor([now + 1]), budget, torch.tensor([0])))[0, 0].tolist()
            kept.pop(min(range(len(kept)), key=lambda one: (scores[one], kept[one])))
        after.append(list(kept))
    return after


@names
def test_a_layer_keeps_what_brute_force_keeps(rule: Eviction) -> None:
    part = Attention(16, 2, position=Rotary())
    limited, budget, time = Bounded.of(part, rule, 5), 5, 14
    hidden = torch.randn(1, time, 16, dtype=torch.float64)
    part.double()
    query, key = (one(hidden).view(time, 2, 8) for one in (part.query, part.key))
    assert part.position is not None
    query, key = (part.position.rotate(one[None], Context(torch.arange(time)[None]))[0] for one in (query, key))

    def weights(head: int | None) -> Weights:
        def of(now: int, kept: list[int]) -> Tensor:
            every = torch.stack([(key[kept, h] @ query[now, h] / 8**0.5).softmax(0) for h in range(2)])
            return every.mean(0) if head is None else every[head]

        return of

    state = State(1, time)
    layer: Any = limited.start(state)
    state.layers[limited, 0] = layer
    found: list[list[list[int]]] = []
    with torch.inference_mode():
        for now in range(time):
            state.reserve(1)
            at = state.slots.extend(None, 1)
            limited(hidden[:, now : now + 1], Context(at, state=state))
            held = layer.bands[0][1].held
            found.append([[int(one) for one in row if one >= 0] for row in held.positions[0]])
    for choice in range(len(found[0])):
        wanted = brute_force(rule, weights(choice if rule.apart else None), time, budget)
        assert [sorted(one[choice]) for one in found] == wanted


@dataclass(frozen=True)
class Wrong(Eviction):
    """Keeps what is looked at least."""

    forget: ClassVar[float | None] = 0.0

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return -held.notes


def test_brute_force_tells_a_wrong_rule() -> None:
    def of(now: int, kept: list[int]) -> Tensor:
        return torch.tensor([1.0 / (1 + one) for one in kept])

    assert brute_force(Wrong(), of, 9, 4) != brute_force(Tova(), of, 9, 4)


@pytest.mark.parametrize("position", [None, Rotary(), Alibi(), RelativeBuckets(4)], ids=lambda one: type(one).__name__)
@names
def test_heads_may_have_budgets_of_their_own(position: Any, rule: Eviction) -> None:
    target = decoder(position, key_value_heads=2, layers=2)
    text = tokens(3, 24)
    with torch.inference_mode():
        torch.testing.assert_close(bounded(target, rule, [[24, 30], 40])(text), target(text), rtol=1e-4, atol=1e-4)
        mixed = bounded(target, rule, [[3, 6], 4])
        state = mixed.start(3, 24)
        pieces = torch.cat([mixed.step(piece, state) for piece in text.split(5, 1)], 1)
        torch.testing.assert_close(pieces, mixed(text), rtol=2e-4, atol=2e-4)


def test_bytes_fall_as_the_budget() -> None:
    target = decoder(Rotary(), width=64, key_value_heads=4, layers=3)
    whole = account(target, 512, 2)
    limited = account(bounded(target, Latest(), 64, 16), 512, 2)
    slots, row = 64 + 16, 2 * 4 * 16 * 4  # keys and values of 4 heads of 16 numbers of 4 bytes
    assert whole.layers == (2 * 512 * row,) * 3
    assert limited.layers == (2 * slots * (row + 4),) * 3  # and a position of 4 bytes
    assert limited.total - sum(limited.layers) == whole.total - sum(whole.layers) == 2 * 512 * 8


def test_no_more_is_held_than_a_small_context_needs() -> None:
    target = decoder(Rotary())
    state = bounded(target, Latest(), 1000).start(1, 8)
    assert sum(layer_bytes(state)) < 2 * sum(layer_bytes(target.start(1, 8)))


def test_a_bounded_model_describes_itself_and_shares_its_weights() -> None:
    target = decoder(Rotary(), key_value_heads=2)
    limited = bounded(target, [Latest(), Sinks(1)].__getitem__, [4, [5, 6]], 2, compacted=True)
    assert build(limited.describe()).describe() == limited.describe()
    assert {id(one) for one in limited.parameters()} == {id(one) for one in target.parameters()}
    assert not any(isinstance(part, Bounded) for part in target.modules())


def test_rollback_goes_back_within_the_latest_pass() -> None:
    limited = bounded(decoder(Rotary(), key_value_heads=2), HeavyHitters(), 6, 2)
    text = tokens(2, 20)
    with torch.inference_mode():
        state = limited.start(2, 20)
        limited.step(text[:, :11], state)
        limited.step(text[:, 11:17], state)
        state.rollback([14, 12])
        found = limited.step(text[:, 17:18], state)
        for row, length in enumerate((14, 12)):
            again = torch.cat((text[row : row + 1, :length], text[row : row + 1, 17:18]), 1)
            torch.testing.assert_close(found[row], limited(again)[0, -1:], rtol=1e-4, atol=1e-4)
        with pytest.raises(FormeryError, match="goes back only within its latest pass"):
            state.rollback([3, 3])


def test_rows_can_be_taken_and_repeated() -> None:
    limited = bounded(decoder(Rotary()), Tova(), 5)
    text = tokens(3, 12)
    with torch.inference_mode():
        state = limited.start(3, 12)
        limited.step(text[:, :10], state)
        state.select([2, 0, 2])
        found = limited.step(text[[2, 0, 2], 10:11], state)
        torch.testing.assert_close(found[:, 0], limited(text[[2, 0, 2], :11])[:, -1], rtol=1e-4, atol=1e-4)


def test_compacted_positions_stay_within_the_budget() -> None:
    """What is kept stands close together: the first tokens and the latest are read as a short text of their own."""
    target = decoder(Rotary(), layers=1)
    limited = bounded(target, Sinks(2), 6, compacted=True)
    text = tokens(1, 20)
    with torch.inference_mode():
        kept = torch.cat((text[:, :2], text[:, 15:]), 1)  # 6 slots and the token itself
        torch.testing.assert_close(limited(text)[:, -1], target(kept)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("tova:budget=0", "keeps nothing"),
        ("cache-window:budget=8:by=speculative-sampling", "needs a second model"),
        ("a2sf:forgets=1.5", "between 0 and 1"),
        ("tova:by=nothing", "nothing"),
    ],
)
def test_bad_options_are_one_sentence(asked: str, said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        generate(model("rotary"), [[3]], asked, max_new_tokens=2)


def test_trees_and_budgets_that_do_not_fit_are_refused() -> None:
    target = model("rotary")
    limited = bounded(target, Latest(), 4)
    with pytest.raises(FormeryError, match="no trees"):
        limited.step(tokens(1, 3), limited.start(1, 3), visible=torch.ones(1, 3, 3, dtype=torch.bool))
    with pytest.raises(FormeryError, match="do not fit"):
        bounded(target, Latest(), [4])
    with pytest.raises(FormeryError, match="no part of the kind"):
        rewritten(target, Layer, lambda part, number: part) and rewritten(target, Bounded, lambda part, number: part)


def test_a_twin_shares_weights_and_nothing_else() -> None:
    target = model("rotary")
    copy = twin(target)
    assert copy is not target and copy.layers[0] is not target.layers[0]
    assert all(one is other for one, other in zip(copy.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("name", ["tova", "a2sf", "cache-window", "cache-sinks", "cache-random", "cache-h2o"])
def test_methods_decode_as_the_bounded_model_does(name: str) -> None:
    target = model("rotary", max_length=40)
    rules = {
        "tova": Tova(),
        "a2sf": Fading(),
        "cache-window": Latest(),
        "cache-sinks": Sinks(),
        "cache-h2o": HeavyHitters(),
    }
    found = [one.tokens for one in generate(target, PROMPTS, f"{name}:budget=5", max_new_tokens=16)]
    if name in rules:
        wanted = generate(bounded(target, rules[name], 5), PROMPTS, "greedy", max_new_tokens=16)
        assert found == [one.tokens for one in wanted]
    by = generate(target, PROMPTS, f"{name}:budget=5:by=parallel-jacobi-decoding", max_new_tokens=16)
    assert [one.tokens for one in by] == found
