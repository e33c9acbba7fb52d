"""Rules for what tokens attend to: brute force, what may never be chosen, a budget for everything, rows, rollback."""

from collections.abc import Callable

import pytest
import torch
from generation import decoder
from torch import Tensor

from formery.data.batching import pad
from formery.errors import FormeryError
from formery.generate import generate
from formery.models import Decoder
from formery.models.phased import Phased, phased
from formery.parts import Alibi, Attention, Position, RelativeBuckets, Rotary, Visibility, build
from formery.parts.asking import Asked, Chosen
from formery.parts.reading import Blocks, CoveringLines, Lines, Near, Shared
from formery.parts.selection import Kept, KeptUnevenly, Largest, Pages, Recent, Rule
from formery.parts.selective import Observing, Selective

WRITING: list[Callable[[int], Rule]] = [
    Largest,
    Recent,
    lambda budget: Pages(budget, 4),
    lambda budget: Kept(budget, 3, 1),
    lambda budget: KeptUnevenly(budget, 3, 1),
]
READING: list[Callable[[float], Shared]] = [
    lambda share: Near(share, 2),
    lambda share: Blocks(share, 4),
    lambda share: Lines(share, 5),
    lambda share: CoveringLines(share, 5),
]
POSITIONS: list[Callable[[], Position]] = [Rotary, Alibi, lambda: RelativeBuckets(4)]
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (30, 17, 5, 1)]


def made(position: Position | None = None) -> Decoder:
    """A model with grouped heads, run by PyTorch."""
    model = decoder(position or Rotary(), layers=3, key_value_heads=2).eval()
    model.compiled = False
    return model


def ruled(model: Decoder, reading: Rule | None = None, writing: Rule | None = None) -> Phased:
    return phased(model, lambda part, _: Observing(part, reading, writing, 3, 3))


def asked(
    time: int = 9, slots: int = 14, since: int = 14, padded: int = 0, bias: bool = False, observed: bool = True
) -> Asked:
    """The last `time` queries behind `slots` tokens in float64, the last `padded` slots of the second row empty."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    at = torch.arange(slots).expand(2, -1).clone()
    at[1, slots - padded :] = -1
    query = at[:, slots - time :]
    allowed = (at[:, None, None] <= query[:, None, :, None]) & (at[:, None, None] >= 0) | (query < 0)[:, None, :, None]
    return Asked(
        normal(2, 4, time, 6),
        normal(2, 2, slots, 6),
        normal(2, 2, slots, 6),
        normal(2, 4, time, slots) if bias else None,
        Visibility(allowed),
        query,
        at,
        torch.tensor([since, min(since, slots - padded)]),
        0.4,
        None,
        normal(2, 2, slots).abs() if observed else None,
    )


def weights(one: Asked) -> Tensor:
    """Attention weights [row, group, query, slot], summed over the two heads of a group, number by number."""
    found = torch.zeros(2, 2, one.query.shape[2], one.keys.shape[2], dtype=torch.float64)
    for row, head, time in torch.cartesian_prod(*map(torch.arange, one.query.shape[:3])).tolist():
        score = one.keys[row, head // 2] @ one.query[row, head, time] * one.scale
        score = score if one.bias is None else score + one.bias[row, head, time]
        found[row, head // 2, time] += score.masked_fill(~one.allowed[row, 0, time], -torch.inf).softmax(-1)
    return found


def real(one: Asked) -> Tensor:
    return (one.positions >= 0)[:, None, :, None]


@pytest.mark.parametrize("bias", [False, True])
def test_largest_are_those_of_the_weights_summed_over_the_heads_of_a_group(bias: bool) -> None:
    one = asked(padded=3, since=0, bias=bias)
    mask, found = Largest(4)(one), weights(one)
    assert mask is not None
    for row, group, time in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        if one.positions[row, time] < 0:
            continue
        allowed = one.allowed[row, group, time].nonzero()[:, 0].tolist()
        best = sorted(allowed, key=lambda slot: -float(found[row, group, time, slot]))[:4]
        assert mask[row, group, time].nonzero()[:, 0].tolist() == sorted(best)


@pytest.mark.parametrize("bias", [False, True])
def test_pages_are_those_of_the_highest_bounds_and_the_own(bias: bool) -> None:
    one = asked(padded=3, since=0, bias=bias)
    mask = Pages(8, 4)(one)
    assert mask is not None
    for row, group, time in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist():
        at = int(one.positions[row, time])
        if at < 0:
            continue
        bounds = []
        for page in range(at // 4):
            keys = one.keys[row, group, 4 * page : 4 * page + 4]
            bound = 0.0
            for head in (2 * group, 2 * group + 1):
                query = one.query[row, head, time]
                bound += float(torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()) * one.scale
                if one.bias is not None:
                    bound += float(one.bias[row, head, time, 4 * page : 4 * page + 4].max())
            bounds.append((-bound, page))
        pages = {at // 4, *(page for _, page in sorted(bounds)[:1])}
        assert mask[row, group, time].nonzero()[:, 0].tolist() == [s for s in range(at + 1) if s // 4 in pages]


def test_a_bound_is_never_below_a_score() -> None:
    one = asked(since=0, bias=True)
    bound = Pages(4, 4).bounds(one, one.key_positions // 4, 4)
    for head in range(2):  # with one head a group
        single = Asked(**{**vars(one), "query": one.query[:, head::2], "bias": one.bias[:, head::2]})  # type: ignore[index]
        scores = single.query @ one.keys.transpose(-1, -2) * one.scale + single.bias
        bound = Pages(4, 4).bounds(single, one.key_positions // 4, 4)
        assert bool((scores <= bound.repeat_interleave(4, -1)[..., :14] + 1e-9).all())


def test_recent_are_sinks_and_window() -> None:
    one = asked(since=0)
    mask = Recent(5, 2)(one)
    assert mask is not None
    for time, at in enumerate(one.positions[0].tolist()):
        assert mask[0, 0, time].nonzero()[:, 0].tolist() == sorted({0, 1, *range(max(0, at - 2), at + 1)})


@pytest.mark.parametrize("kind", [Kept, KeptUnevenly])
def test_kept_are_edges_and_what_was_looked_at_and_all_that_was_written(kind: type[Kept]) -> None:
    one = asked(since=10)
    mask = kind(5, 2, 1)(one)
    assert mask is not None and one.observed is not None
    written = one.positions[0].tolist().index(13)
    kept = [set(mask[0, group, written].nonzero()[:, 0].tolist()) for group in range(2)]
    assert all(one_kept >= {0, 8, 9, 10, 11, 12, 13} for one_kept in kept)
    inner = [(float(-one.observed[0, group, slot]), group, slot) for group in range(2) for slot in range(1, 8)]
    if kind is Kept:
        best = {(g, s) for group in range(2) for _, g, s in sorted(x for x in inner if x[1] == group)[:2]}
    else:
        best = {(g, s) for _, g, s in sorted(inner)[:4]}
    assert {(group, slot) for group in range(2) for slot in kept[group] & set(range(1, 8))} == best


def test_near_takes_the_largest_window_that_the_share_has_room_for() -> None:
    one = asked(time=14, since=14)
    mask = Near(0.5, 2)(one)
    assert mask is not None
    pairs = 0.5 * 14 * 15 / 2
    fits = [w for w in range(1, 15) if sum(14 - d for d in range(w)) + 2 * max(0, 14 - w) <= pairs]
    for time in range(14):
        expected = sorted({k for k in range(time + 1) if k < 2 or time - k < max(fits)})
        assert mask[0, 0, time].nonzero()[:, 0].tolist() == expected


def test_blocks_are_those_whose_means_score_highest() -> None:
    one = asked(time=14, since=14)
    mask = Blocks(0.7, 4)(one)
    assert mask is not None
    most = max(k for k in range(2, 5) if 4 * k - k * (k - 1) / 2 <= 0.7 * 10)
    for group in range(2):
        for block in range(4):
            query = one.query[0, 2 * group : 2 * group + 2, 4 * block : 4 * block + 4].sum(0).mean(0)
            scores = {
                other: float(query @ one.keys[0, group, 4 * other : 4 * other + 4].mean(0)) for other in range(block)
            }
            sure = {0, block}
            best = sorted(set(scores) - sure, key=lambda other: -scores[other])[: max(0, most - len(sure))]
            expected = [k for k in range(14) if k // 4 in sure | set(best) and k <= 4 * block]
            assert mask[0, group, 4 * block].nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("adaptive", [False, True])
def test_lines_are_the_heaviest_that_the_share_pays_for(adaptive: bool) -> None:
    one = asked(time=14, since=14)
    mask, found = (CoveringLines if adaptive else Lines)(0.5, 3)(one), weights(one)[0, :, 11:]
    assert mask is not None
    lines = []  # (what its group and kind cover before it, group, kind, place, cost)
    for group in range(2):
        columns = {k: float(found[group, :, k].sum()) for k in range(1, 14)}
        diagonals = {d: sum(float(found[group, q - 11, q - d]) for q in range(11, 14) if q >= d) for d in range(1, 14)}
        for kind, weight in enumerate((columns, diagonals)):
            lines.append((-1.0, group, kind, 0, 14))
            covered = 0.0
            for place, own in sorted(weight.items(), key=lambda item: -item[1]):
                lines.append((covered / sum(weight.values()), group, kind, place, 14 - place))
                covered += own
    chosen = set()
    parts = [lines] if adaptive else [[x for x in lines if x[1:3] == (g, k)] for g in range(2) for k in range(2)]
    room = 0.5 * 105 * (2 if adaptive else 0.5)
    for part in parts:
        spent = 0
        for _, group, kind, place, cost in sorted(part):
            spent += cost
            if spent <= room or place == 0:
                chosen.add((group, kind, place))
    for group, query in torch.cartesian_prod(torch.arange(2), torch.arange(14)).tolist():
        seen = [k for k in range(query + 1) if (group, 0, k) in chosen or (group, 1, query - k) in chosen]
        assert mask[0, group, query].nonzero()[:, 0].tolist() == seen


@pytest.mark.parametrize("rule", [*(make(5) for make in WRITING), *(make(0.4) for make in READING)], ids=str)
def test_what_comes_later_and_padding_are_never_chosen(rule: Rule) -> None:
    one = asked(time=14, since=10, padded=5)
    mask = rule(one)
    assert mask is not None
    assert not bool((mask & ~one.allowed & real(one)).any())
    query, key = one.positions[:, None, :, None], one.key_positions[:, None, None]
    assert not bool((mask & real(one) & ((key > query) | (key < 0))).any())


@pytest.mark.parametrize("position", POSITIONS)
def test_a_budget_for_everything_writes_the_tokens_of_full_attention(position: Callable[[], Position]) -> None:
    model = made(position())
    expected = [one.tokens for one in generate(model, PROMPTS, max_new_tokens=8)]
    for writing in WRITING:
        assert [one.tokens for one in generate(ruled(model, None, writing(64)), PROMPTS, max_new_tokens=8)] == expected
    for reading in READING:
        assert [one.tokens for one in generate(ruled(model, reading(1.0)), PROMPTS, max_new_tokens=8)] == expected


@pytest.mark.parametrize(
    "rules", [*((None, make(6)) for make in WRITING), *((make(0.3), Recent(6)) for make in READING)]
)
def test_rows_do_not_depend_on_their_neighbours_and_a_pass_from_scratch_is_the_same(
    rules: tuple[Rule | None, Rule],
) -> None:
    model = made()
    sparse = ruled(model, *rules)
    together = [one.tokens for one in generate(sparse, PROMPTS, max_new_tokens=8)]
    assert together == [generate(sparse, [one], max_new_tokens=8)[0].tokens for one in PROMPTS]
    for prompt, written in zip(PROMPTS, together, strict=True):
        whole = torch.tensor([prompt + written])
        with torch.no_grad():
            once = sparse.step(whole, sparse.begin([prompt], 64)[0])[0]
            state, _ = sparse.begin([prompt], 4)  # it grows
            if len(prompt) > 1:
                sparse.read(whole[:, : len(prompt) - 1], state)
            one_by_one = [
                sparse.step(whole[:, at : at + 1], state)[0, 0] for at in range(len(prompt) - 1, whole.shape[1])
            ]
            assert torch.allclose(once[len(prompt) - 1 :], torch.stack(one_by_one), atol=1e-4)
            state.rollback([len(prompt) + 2])
            state.select([0, 0])
            again = sparse.step(whole[:, len(prompt) + 2 :].expand(2, -1), state)
            assert torch.allclose(again[1], once[len(prompt) + 2 :], atol=1e-4)


@pytest.mark.parametrize("writing", [make(6) for make in WRITING], ids=str)
def test_rows_may_be_taken_in_another_order(writing: Rule) -> None:
    sparse = ruled(made(), None, writing)
    tokens, positions = pad([one[:-1] for one in PROMPTS[:3]], 0)
    last = torch.tensor([one[-1:] for one in PROMPTS[:3]])
    with torch.no_grad():
        state, _ = sparse.begin(PROMPTS[:3], 40)
        sparse.read(tokens, state, positions)
        state.rollback([len(one) - 1 for one in PROMPTS[:3]])
        straight = sparse.step(last, state)
        state.rollback([len(one) - 1 for one in PROMPTS[:3]])
        state.select([2, 0, 2])
        assert torch.allclose(sparse.step(last[[2, 0, 2]], state), straight[[2, 0, 2]], atol=1e-5)


@pytest.mark.parametrize("rules", [(Lines(0.5, 8), None), (None, Kept(4, 3, 1))])
def test_rules_that_look_back_over_the_prompt_need_it_in_one_pass(rules: tuple[Rule | None, Rule | None]) -> None:
    sparse, tokens = ruled(made(), *rules), torch.tensor([PROMPTS[0]])
    state, _ = sparse.begin([PROMPTS[0]], 40)

    def in_pieces() -> None:
        for piece in (tokens[:, :28], tokens[:, 28:29]):
            sparse.read(piece, state)

    with torch.no_grad(), pytest.raises(FormeryError, match="one pass"):
        in_pieces()


def test_without_a_prompt_everything_is_seen() -> None:
    model = made()
    sparse = ruled(model, Near(0.2, 1), Recent(2, 1))
    tokens = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(sparse(tokens), model(tokens))
        assert torch.equal(sparse.step(tokens, sparse.start(1, 40)), model.step(tokens, model.start(1, 40)))


def test_a_model_with_rules_is_described_and_built_again() -> None:
    sparse = phased(made(), lambda part, _: Selective(part, Blocks(0.5, 8), Pages(32)))
    twin = build(sparse.describe())
    assert isinstance(twin, Phased) and twin.describe() == sparse.describe()
    rules = {part.writing for part in twin.modules() if isinstance(part, Selective)}
    assert rules == {Pages(32)} and sum(isinstance(part, Attention) for part in twin.modules()) == 3


def test_chosen_slots_are_the_mask_of_themselves() -> None:
    one = asked(since=0)
    mask = Largest(4)(one)
    assert mask is not None
    chosen = Chosen.largest(mask.double(), one.allowed & mask, 6)
    assert torch.equal(chosen.mask(14), mask)
    assert torch.allclose(chosen.attended(one), one.only(mask), atol=1e-12)


@pytest.mark.parametrize("make", [lambda: Largest(0), lambda: Pages(-3), lambda: Near(0.0), lambda: Lines(1.5)])
def test_budgets_and_shares_that_are_none(make: Callable[[], Rule]) -> None:
    with pytest.raises(FormeryError, match="a (budget|share)"):
        make()
