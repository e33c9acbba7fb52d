"""Attention and cross-attention, written out head by head in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formery.parts import (
    Alibi,
    Attention,
    Context,
    CrossAttention,
    LayerNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    block_causal,
    causal,
    everything,
    prefix,
    window,
)


def random(part: nn.Module) -> Any:
    part.requires_grad_(False)
    for parameter in part.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return part.eval()


def mapped(part: Any, x: Tensor) -> Tensor:
    y = part.weight @ x
    return y if part.shift is None else y + part.shift


def written_out(part: Attention, hidden: Tensor, positions: Tensor) -> Tensor:
    """`softmax(cap(scale · q · k) + bias) · v` of one sequence, for one head and one query at a time."""
    time = len(hidden)
    groups = part.key_value_heads or part.heads
    dim = part.head_width or part.width // part.heads
    context = Context(positions[None])
    rows: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    for t in range(time):
        for name, norm in (("query", part.query_norm), ("key", part.key_norm), ("value", None)):
            heads = mapped(getattr(part, name), hidden[t]).view(-1, dim)
            heads = torch.stack([head if norm is None else norm(head) for head in heads])
            if part.position is not None and name != "value":
                heads = part.position.rotate(heads[None, None], Context(positions[None, t : t + 1]))[0, 0]
            rows[name].append(heads)
    bias = None if part.position is None else part.position.bias(part.heads, context)
    outputs = []
    for t in range(time):
        mixed = []
        for h in range(part.heads):
            group = h // (part.heads // groups)
            weights, total = [], 0.0
            for s in range(time):
                score = float(rows["query"][t][h] @ rows["key"][s][group])
                score *= dim**-0.5 if part.scale is None else part.scale
                score = part.soft_cap * math.tanh(score / part.soft_cap) if part.soft_cap else score
                score += 0.0 if bias is None else float(bias[0, h, t, s])
                index = [torch.tensor(i) for i in (0, h, int(positions[t]), int(positions[s]))]
                weights.append(math.exp(score) if part.mask(*index) else 0.0)
                total += weights[-1]
            mixed.append(sum(weight / total * rows["value"][s][group] for s, weight in enumerate(weights)))
        outputs.append(mapped(part.output, torch.cat(mixed)))  # type: ignore[arg-type]
    return torch.stack(outputs)


@settings(max_examples=60)
@given(
    heads=st.sampled_from([(4, None), (4, 4), (4, 2), (4, 1), (6, 3), (3, 1), (1, None)]),
    head_width=st.sampled_from([None, 2, 6]),
    position=st.sampled_from(["none", "rotary", "alibi", "buckets"]),
    mask=st.sampled_from([causal, everything, causal & window(2), block_causal(2), causal & (window(2) | prefix(1))]),
    bias=st.booleans(),
    output_bias=st.sampled_from([None, True, False]),
    norms=st.sampled_from(["none", "rms", "query", "layer"]),
    scale=st.sampled_from([None, 1.0]),
    soft_cap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 2**31),
)
def test_attention_is_the_formula(
    heads: tuple[int, int | None],
    head_width: int | None,
    position: str,
    norms: str,
    seed: int,
    **options: Any,
) -> None:
    torch.manual_seed(seed)
    dim = head_width or 12 // heads[0]
    scheme = {
        "none": None,
        "rotary": Rotary(50.0),
        "alibi": Alibi(),
        "buckets": RelativeBuckets(heads[0], 8, 10),
    }
    query_norm = {"rms": RMSNorm(dim), "query": RMSNorm(dim), "layer": LayerNorm(dim)}.get(norms)
    key_norm = {"rms": RMSNorm(dim), "layer": LayerNorm(dim)}.get(norms)
    part = random(
        Attention(12, *heads, head_width, scheme[position], query_norm=query_norm, key_norm=key_norm, **options)
    )
    hidden, time = torch.randn(2, 4, 12, dtype=torch.float64), torch.arange(4)
    expected = torch.stack([written_out(part, row, time) for row in hidden])
    for even in (True, False):
        torch.testing.assert_close(part(hidden, Context(time.expand(2, 4), even=even)), expected, rtol=1e-8, atol=1e-8)
    ours = (part.query.bias, part.key.bias, part.value.bias, part.output.bias)
    bias, output_bias = options["bias"], options["output_bias"]
    assert ours == (bias, bias, bias, bias if output_bias is None else output_bias)


@pytest.mark.parametrize("memory_width", [None, 5])
@pytest.mark.parametrize(("heads", "groups"), [(4, None), (4, 2), (4, 1)])
def test_cross_attention_is_the_formula(memory_width: int | None, heads: int, groups: int | None) -> None:
    part = random(CrossAttention(12, heads, groups, memory_width=memory_width, bias=True, scale=0.7))
    hidden = torch.randn(2, 4, 12, dtype=torch.float64)
    memory = torch.randn(2, 6, memory_width or 12, dtype=torch.float64)
    positions, lengths = torch.arange(4).expand(2, 4), [6, 3]
    places = torch.tensor([[t if t < length else -1 for t in range(6)] for length in lengths])
    context = Context(positions, memory=Context(positions, places), memory_hidden=memory)
    ours = part(hidden, context)
    for b, length in enumerate(lengths):
        keys = [mapped(part.key, memory[b, s]).view(groups or heads, -1) for s in range(length)]
        values = [mapped(part.value, memory[b, s]).view(groups or heads, -1) for s in range(length)]
        for t in range(4):
            queries, mixed = mapped(part.query, hidden[b, t]).view(heads, -1), []
            for h in range(heads):
                group = h // (heads // (groups or heads))
                weights = torch.stack([queries[h] @ key[group] * 0.7 for key in keys]).softmax(0)
                mixed.append(sum(weight * value[group] for weight, value in zip(weights, values, strict=True)))
            torch.testing.assert_close(ours[b, t], mapped(part.output, torch.cat(mixed)))  # type: ignore[arg-type]


def test_a_cross_mask_holds_in_every_row() -> None:
    """Rows at different places of their targets, as when translating while listening."""
    part = random(CrossAttention(12, 2, mask=causal))
    hidden, memory = torch.randn(2, 1, 12, dtype=torch.float64), torch.randn(2, 6, 12, dtype=torch.float64)
    positions, places = torch.tensor([[1], [4]]), torch.arange(6).expand(2, 6)
    both = part(hidden, Context(positions, memory=Context(positions, places, full=True), memory_hidden=memory))
    for row, seen in ((0, 2), (1, 5)):
        at = positions[row : row + 1]
        alone = Context(
            at, memory=Context(at, places[:1, :seen], full=True), memory_hidden=memory[row : row + 1, :seen]
        )
        torch.testing.assert_close(both[row : row + 1], part(hidden[row : row + 1], alone))


@pytest.mark.parametrize("cls", [Attention, CrossAttention])
def test_dropout_only_while_training(cls: type) -> None:
    part = cls(12, 2, mask=everything, dropout=0.5)
    hidden, positions = torch.randn(1, 6, 12), torch.arange(6)[None]
    context = Context(positions, even=True, memory=Context(positions, even=True), memory_hidden=hidden)
    assert torch.equal(part.eval()(hidden, context), part(hidden, context))
    assert not torch.equal(part.train()(hidden, context), part(hidden, context))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((12, 5), "width of 12"),
        ((12, 4, 3), "evenly"),
        ((12, 0), "evenly"),
        ((12, 4, 0), "evenly"),
        ((12, 2, 4), "evenly"),
    ],
)
def test_heads_that_do_not_fit(arguments: tuple[int, ...], says: str) -> None:
    for cls in (Attention, CrossAttention):
        with pytest.raises(ValueError, match=says):
            cls(*arguments)
