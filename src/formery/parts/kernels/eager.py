"""The reference: every step written out; the one kernel that can return the weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Visibility


def eager(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    visibility: Visibility,
    bias: Float[Tensor, "#batch head time slot"] | None,
    scale: float,
    soft_cap: float | None,
    dropout: float,
) -> tuple[Float[Tensor, "batch head time value"], Float[Tensor, "batch head time slot"]]:
    """`softmax(soft_cap · tanh(scale · query · keyᵀ / soft_cap) + bias) · value`, and the softmax.

    Softmax runs in at least float32. head / group query heads share each key and value head.
    """
    batch, heads, time, _ = query.shape
    groups, slots = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, groups, heads // groups * time, -1)
    scores = (grouped @ key.transpose(-1, -2) * scale).reshape(batch, heads, time, slots)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if visibility.allowed is not None or visibility.causal:
        scores = scores.masked_fill(~visibility.tensor(time, slots, scores.device), float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    used = torch.nn.functional.dropout(weights, dropout) if dropout else weights
    mixed = used.reshape(batch, groups, heads // groups * time, slots) @ value
    return mixed.reshape(batch, heads, time, -1), weights
