"""PyTorch's scaled dot-product attention."""

import torch
from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Visibility


def sdpa(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    visibility: Visibility,
    bias: Float[Tensor, "#batch head time slot"] | None,
    scale: float,
    dropout: float,
) -> Float[Tensor, "batch head time value"]:
    """`softmax(scale · query · keyᵀ + bias) · value` where visible."""
    batch, heads, time, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    mask: Tensor | None = visibility.allowed
    if bias is not None:
        allowed = visibility.tensor(time, slots, query.device)
        mask = bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
    causal = visibility.causal and mask is None
    if time == 1 and groups < heads:
        # One query a row: the heads of a group stand in line as if they were time, and nothing is copied.
        query = query.reshape(batch, groups, heads // groups, width)
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], groups, heads // groups, slots)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=query.shape[1] != groups
    )
    return mixed.reshape(batch, heads, time, -1)
