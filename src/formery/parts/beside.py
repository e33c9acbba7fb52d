"""Attention over keys that all queries share and, beside them, keys that each query has to itself."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def attend_beside(
    query: Float[Tensor, "batch time head dim"],
    keys: Float[Tensor, "batch slot group dim"],
    values: Float[Tensor, "batch slot group dim"],
    allowed: Bool[Tensor, "time slot"],
    own_keys: Float[Tensor, "batch time own group dim"],
    own_values: Float[Tensor, "batch time own group dim"],
    scale: float,
) -> Float[Tensor, "batch head time dim"]:
    """`softmax(scale · query · [ownᵀ, keysᵀ]) · [own values, values]`, one softmax over both; all own keys are seen.

    allowed: which of the shared keys each query sees. Softmax runs in at least float32.
    """
    batch, time, heads, dim = query.shape
    groups, own = keys.shape[2], own_keys.shape[2]
    grouped = query.view(batch, time, groups, heads // groups, dim)
    scores = torch.cat(
        (
            torch.einsum("btgrd,btogd->bgrto", grouped, own_keys),
            torch.einsum("btgrd,bsgd->bgrts", grouped, keys).masked_fill(~allowed, float("-inf")),
        ),
        -1,
    )
    kind = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores * scale).softmax(-1, dtype=kind).to(values.dtype)
    mixed = torch.einsum("bgrto,btogd->bgrtd", weights[..., :own], own_values)
    mixed = mixed + torch.einsum("bgrts,bsgd->bgrtd", weights[..., own:], values)
    return mixed.reshape(batch, heads, time, dim)
