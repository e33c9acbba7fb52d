"""PyTorch's flex attention: mask and bias become part of the kernel. Compiled on a GPU, plain on a CPU."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from formery.parts.context import Visibility


def flex(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    visibility: Visibility,
    bias: Float[Tensor, "#batch head time slot"] | None,
    scale: float,
    soft_cap: float | None,
) -> Float[Tensor, "batch head time value"]:
    """`softmax(soft_cap · tanh(scale · query · keyᵀ / soft_cap) + bias) · value` where visible."""
    batch, heads, time, _ = query.shape
    slots = key.shape[2]
    allowed = visibility.tensor(time, slots, query.device).expand(batch, heads, time, slots)
    offset = None if bias is None else bias.expand(batch, heads, time, slots)

    def change(score: Tensor, row: Tensor, head: Tensor, at: Tensor, slot: Tensor) -> Tensor:
        if soft_cap is not None:
            score = soft_cap * torch.tanh(score / soft_cap)
        return score if offset is None else score + offset[row, head, at, slot]

    def see(row: Tensor, head: Tensor, at: Tensor, slot: Tensor) -> Tensor:
        return allowed[row, head, at, slot]

    blocks = create_block_mask(see, batch, heads, time, slots, device=str(query.device))
    mixed = _function(query.is_cuda)(query, key, value, change, blocks, scale=scale, enable_gqa=key.shape[1] != heads)
    assert isinstance(mixed, Tensor)
    return mixed


@functools.cache
def _function(compiled: bool) -> Callable[..., Any]:
    return cast(Callable[..., Any], torch.compile(flex_attention) if compiled else flex_attention)
