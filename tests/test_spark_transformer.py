"""The statistical cut-off and the parts that choose by it."""

from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.methods.feedforward.spark_study import (
    LAYERS,
    VARIANTS,
    WIDTH,
    activity,
    multiplications,
    spark_feed_forward,
    stack,
)
from formery.models import Decoder
from formery.parts import MLP, Alibi, Context, GatedMLP, Rotary
from formery.parts.part import build
from formery.parts.spark import SparkAttention, SparkFeedForward, ThresholdedMLP, cutoff, largest, soft_threshold


def tiny(keys: int | None = 3, layers: int = 2) -> Decoder:
    made = stack(32, 2, layers, lambda: SparkFeedForward(32, 96, 12), keys, vocabulary=61)
    nn.init.normal_(made.embedding.weight, std=0.3)
    return made.eval()


def context(time: int, batch: int = 1) -> Context:
    return Context(torch.arange(time).expand(batch, time), even=True)


def test_the_cutoff_is_the_formula() -> None:
    scores = torch.randn(7, 40, dtype=torch.double)
    for active in (1, 5, 39):
        quantile = NormalDist().inv_cdf(1 - active / 40)
        wanted = scores.mean(-1) + scores.std(-1, correction=0) * quantile
        assert torch.allclose(cutoff(scores, active)[:, 0], wanted, atol=1e-10)
        assert torch.allclose(soft_threshold(scores, active), (scores - wanted[:, None]).clamp(min=0), atol=1e-10)
    assert torch.equal(soft_threshold(scores, 40), scores)


def test_of_some_entries_only_these_count() -> None:
    scores, seen = torch.randn(6, 30, dtype=torch.double), torch.rand(6, 30) < 0.6
    seen[0], seen[1] = torch.arange(30) < 4, torch.arange(30) < 5
    found, chosen = cutoff(scores, 4, seen), largest(scores, 4, seen)
    for row in range(6):
        own = scores[row, seen[row]]
        if len(own) <= 4:
            assert found[row] == -torch.inf and torch.equal(chosen[row], seen[row])
            continue
        wanted = own.mean() + own.std(correction=0) * NormalDist().inv_cdf(1 - 4 / len(own))
        assert torch.allclose(found[row, 0], wanted, atol=1e-10)
        assert torch.equal(chosen[row], seen[row] & (scores[row] >= wanted))
    assert torch.equal(largest(scores + 100 * ~seen, 4, seen), chosen)


def test_one_always_stays() -> None:
    uniform = torch.linspace(0, 1, 1000)[None]
    seen = torch.ones(1, 1000, dtype=torch.bool)
    assert float(cutoff(uniform, 1)) > 1
    assert largest(uniform, 1, seen).nonzero().tolist() == [[0, 999]]
    assert largest(torch.zeros(1, 9), 2, seen[:, :9]).any()


def test_gaussian_scores_leave_about_as_many_as_asked() -> None:
    scores = torch.randn(64, 4096)
    for active in (40, 328, 2048):
        kept = soft_threshold(scores, active) > 0
        assert abs(float(kept.double().sum(-1).mean()) / active - 1) < 0.03
        exact = scores.topk(active).indices
        assert float(kept.gather(-1, exact).double().mean()) > 0.9


def test_scores_that_are_all_alike_have_a_finite_gradient() -> None:
    scores = torch.zeros(2, 12, requires_grad=True)
    soft_threshold(scores, 3).sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_the_feed_forward_is_the_formula() -> None:
    part = SparkFeedForward(10, 24, 5, predictor=4).double()
    hidden = torch.randn(2, 3, 10, dtype=torch.double)
    scores = hidden[..., :4] @ part.score.weight.T
    units = nn.functional.gelu(soft_threshold(scores, 5), approximate="tanh")
    wanted = (units * (hidden[..., 4:] @ part.up.weight.T)) @ part.values
    assert torch.allclose(part(hidden, context(3, 2)), wanted, atol=1e-12)
    assert torch.autograd.gradcheck(part.dense, hidden.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_token_reads_the_active_rows_and_no_others(dtype: torch.dtype) -> None:
    part, hidden = SparkFeedForward(32, 96, 8).to(dtype), torch.randn(1, 1, 32, dtype=dtype)
    with torch.inference_mode():
        found, wanted = part(hidden, context(1)), part.dense(hidden)
        assert torch.allclose(found, wanted, atol=1e-6)
        inactive = soft_threshold(part.score(hidden[0, 0, :16]), 8) == 0
        assert 70 < int(inactive.sum()) < 96
    with torch.no_grad():
        for weight in (part.up.weight, part.values):
            weight[inactive] = torch.nan
    with torch.inference_mode():
        assert torch.equal(part(hidden, context(1)), found)


def test_the_weights_are_as_many_as_a_gated_ones() -> None:
    assert spark_feed_forward(32, 48).parameter_count() == GatedMLP(32, 48).parameter_count()
    counts = {stack(WIDTH, 4, LAYERS, make, keys).parameter_count() for make, keys in VARIANTS.values()}
    assert len(counts) == 1
    assert 3.4 < multiplications(2304, 9216, 1024) < 3.6


def by_hand(part: SparkAttention, hidden: Tensor) -> Tensor:
    """Query by query, key by key; one text, causal."""
    [time, _], read, dim = hidden.shape, part.read, part.dim
    here = context(time)

    def heads(linear: Any, count: int) -> Tensor:
        found = linear(hidden).view(1, time, count, dim)
        pieces = [found[..., :read], found[..., read:]]
        turned = pieces if part.position is None else [part.position.rotate(one, here) for one in pieces]
        return torch.cat(turned, -1)[0]

    query, key = heads(part.query, part.heads), heads(part.key, part.groups)
    value = part.value(hidden).view(time, part.groups, dim)
    rows = []
    for at in range(time):
        mixed = []
        for head in range(part.heads):
            group = head // (part.heads // part.groups)
            scores = key[: at + 1, group, :read] @ query[at, head, :read] / read**0.5
            if at + 1 > part.active:
                bound = scores.mean() + scores.std(correction=0) * NormalDist().inv_cdf(1 - part.active / (at + 1))
                scores = scores.masked_fill((scores < bound) & (scores < scores.max()), -torch.inf)
            gate = nn.functional.softplus(key[: at + 1, group, read:] @ query[at, head, read:] / (dim - read) ** 0.5)
            mixed.append((scores.softmax(0) * gate) @ value[: at + 1, group])
        rows.append(part.output(torch.cat(mixed)))
    return torch.stack(rows)


@pytest.mark.parametrize("position", [None, Rotary()])
def test_attention_is_the_formula(position: Any) -> None:
    part = SparkAttention(24, 4, 3, key_value_heads=2, head_width=10, predictor=4, position=position).double()
    hidden = torch.randn(1, 11, 24, dtype=torch.double)
    found = part(hidden, context(11))
    assert torch.allclose(found[0], by_hand(part, hidden[0]), atol=1e-9)
    chosen, seen = part.choice(hidden, context(11))
    assert torch.equal(chosen[..., :3, :], seen[..., :3, :].expand_as(chosen[..., :3, :]))
    assert int(chosen.sum()) < int(seen.sum()) * 4
    assert (chosen.sum(-1) >= 1).all()


def test_a_bias_on_scores_takes_part_in_the_choice() -> None:
    part = SparkAttention(16, 2, 2, position=Alibi())
    part.key.weight.data.zero_()
    chosen, _ = part.choice(torch.randn(1, 12, 16), context(12))
    assert chosen[0, 0, -1].nonzero().flatten().tolist() == list(range(12 - int(chosen[0, 0, -1].sum()), 12))


def test_cached_is_from_scratch_for_ragged_rows_and_after_a_rollback() -> None:
    made = tiny().double()
    rows = [[5, 9, 2, 40, 33, 8, 1], [7, 7, 12], [3, 50, 21, 6, 44]]
    with torch.inference_mode():
        scratch = [made(torch.tensor([row]))[0] for row in rows]
        state = made.start(3, 4)
        padded = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
        positions = torch.arange(7).expand(3, 7).masked_fill(torch.arange(7) >= torch.tensor([[7], [3], [5]]), -1)
        found = made.step(padded[:, :4], state, positions[:, :4])
        state.rollback([min(4, len(row)) for row in rows])
        for row, wanted in enumerate(scratch):
            assert torch.allclose(found[row, : min(4, len(rows[row]))], wanted[:4], atol=1e-9)
        state.rollback([2, 3, 1])
        state.select([2, 0])
        for place in range(1, 5):
            step = made.step(torch.tensor([[rows[2][place]], [rows[0][place + 1]]]), state)
            assert torch.allclose(step[0, 0], scratch[2][place], atol=1e-9)
            assert torch.allclose(step[1, 0], scratch[0][place + 1], atol=1e-9)


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    made = tiny().double()
    tokens = torch.tensor([[4, 8, 15, 16, 23], [42, 4, 8, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]])
    found = made(tokens, positions)
    assert torch.allclose(found[1, :3], made(tokens[1:, :3])[0], atol=1e-9)


def test_drafts_leave_the_text_as_it_was() -> None:
    made, asked = tiny(), vars(Settings(max_new_tokens=16))
    prompts = [[3, 4, 5, 3, 4], [7], [9, 2, 9, 2]]
    wanted = [generate(made, [prompt], "greedy", **asked)[0].tokens for prompt in prompts]
    for method in ("greedy", "aggressive-decoding:length=3"):
        assert [one.tokens for one in generate(made, prompts, method, batch=3, **asked)] == wanted


def test_it_describes_itself() -> None:
    made = tiny()
    again = build(made.describe())
    assert again.describe() == made.describe()
    assert isinstance(again, Decoder)
    again.load_state_dict(made.state_dict())
    tokens = torch.randint(61, (2, 9))
    assert torch.equal(again.eval()(tokens), made(tokens))


def test_activity_counts_what_is_active() -> None:
    found = activity(tiny(), torch.randint(61, (2, 24)))
    assert 0.05 < found["active"] < 0.25 and 0.5 < found["overlap"] <= 1
    assert 1 <= found["keys"] <= 6 and 0 <= found["beyond"] <= 1
    tokens = torch.randint(61, (2, 8))
    thresholded = activity(stack(16, 2, 1, lambda: ThresholdedMLP(16, 40, 8), None, 61), tokens)
    assert thresholded.keys() == {"active", "overlap"} and 0.1 < thresholded["active"] < 0.3
    squared = activity(stack(16, 2, 1, lambda: MLP(16, 40, "relu2"), None, 61), tokens)
    assert squared.keys() == {"active"} and 0.3 < squared["active"] < 0.7
    assert not activity(stack(16, 2, 1, lambda: GatedMLP(16, 24), None, 61), tokens)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (
        {"active": 0},
        {"active": 97},
        {"active": 8, "predictor": 32},
        {"active": 8, "activation": "sigmoid"},
    ):
        with pytest.raises(ValueError, match="active|predictor|inactive"):
            SparkFeedForward(32, 96, **wrong)
    with pytest.raises(ValueError, match="too few"):
        SparkAttention(32, 2, 0)
    description = SparkFeedForward(32, 96, 8).describe()
    with pytest.raises(FormeryError, match="cannot be active"):
        build({**description, "active": 500})
