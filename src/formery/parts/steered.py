"""A decoder's layers run with attention done otherwise, for methods that read keys and values of their own.

`through` runs a residual part and leaves its norms, sums and feed-forwards as they are; what stands in the place of
attention is a function. The pieces of attention itself, apart: `projected`, `placed`, `among` and `merged`.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.parts.attention import Attention
from formery.parts.context import Context, Visibility
from formery.parts.kernels import attend
from formery.parts.mask import Causal
from formery.parts.position import Rotary
from formery.parts.residual import Layer, Parallel, PostNorm, PreNorm, Sandwich

Mix = Callable[[Attention, Float[Tensor, "batch time width"]], Float[Tensor, "batch time width"]]
"""What stands in the place of an attention, given what it would read."""


def through(part: nn.Module, hidden: Float[Tensor, "batch time width"], context: Context, mix: Mix) -> Tensor:
    """A residual part (or a whole layer) in which `mix` does what attention did; without dropout."""

    def inside(inner: nn.Module, read: Tensor) -> Tensor:
        return mix(inner, read) if isinstance(inner, Attention) else inner(read, context)

    if isinstance(part, Layer):
        for sublayer in part.sublayers:
            hidden = through(sublayer, hidden, context, mix)
        return hidden
    if isinstance(part, PreNorm):
        return hidden + inside(part.inner, part.norm(hidden))
    if isinstance(part, PostNorm):
        normed: Tensor = part.norm(hidden + inside(part.inner, hidden))
        return normed
    if isinstance(part, Sandwich):
        return hidden + part.after(inside(part.inner, part.before(hidden)))
    assert isinstance(part, Parallel)
    read = [norm(hidden) for norm in part.norms] * (len(part.inners) if len(part.norms) == 1 else 1)
    return hidden + sum(inside(inner, one) for inner, one in zip(part.inners, read, strict=True))


def sublayers(layer: nn.Module) -> list[nn.Module]:
    """The residual parts of a layer, in their order."""
    return list(layer.sublayers) if isinstance(layer, Layer) else [layer]


def attends(part: nn.Module) -> bool:
    """Whether there is an attention in it."""
    return any(isinstance(one, Attention) for one in part.modules())


def steerable(layers: Iterator[nn.Module] | nn.ModuleList) -> list[Attention]:
    """The attention of each layer, in order.

    Raises FormeryError where the layers are not of the kind that `through` runs: residual, with a causal attention
    each, rotary positions, and no soft cap on scores.
    """
    found: list[Attention] = []
    for layer in layers:
        parts = sublayers(layer)
        own = [one for one in layer.modules() if isinstance(one, Attention)]
        fits = all(isinstance(one, PreNorm | PostNorm | Sandwich | Parallel) for one in parts) and len(own) == 1
        if not fits or own[0] in found:
            raise FormeryError("this takes decoders whose layers are residual and hold an attention each, none shared.")
        if not (isinstance(own[0].position, Rotary) and isinstance(own[0].mask, Causal) and own[0].soft_cap is None):
            raise FormeryError(
                "this takes decoders with rotary positions and plain causal attention, without a soft cap."
            )
        found += own
    return found


Heads = Float[Tensor, "batch time head dim"]


def projected(attention: Attention, hidden: Float[Tensor, "batch time width"]) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values, normed where the attention norms them, not yet turned."""
    batch, time, _ = hidden.shape
    query = attention.query(hidden).view(batch, time, attention.heads, attention.dim)
    key = attention.key(hidden).view(batch, time, attention.groups, attention.dim)
    value = attention.value(hidden).view(batch, time, attention.groups, attention.dim)
    if attention.query_norm is not None:
        query = attention.query_norm(query)
    if attention.key_norm is not None:
        key = attention.key_norm(key)
    return query, key, value


def placed(attention: Attention, heads: Heads, positions: Int[Tensor, "#batch time"]) -> Heads:
    """Queries or keys turned as at those positions."""
    assert attention.position is not None
    return attention.position.rotate(heads, Context(positions))


def merged(attention: Attention, mixed: Float[Tensor, "batch head time dim"]) -> Float[Tensor, "batch time width"]:
    """The heads' outputs through the last map."""
    made: Tensor = attention.output(mixed.transpose(1, 2).flatten(-2))
    return made


def scale_of(attention: Attention) -> float:
    """What scores are multiplied by."""
    scale: float | None = attention.scale
    return attention.dim**-0.5 if scale is None else scale


def among(
    attention: Attention,
    query: Heads,
    keys: Float[Tensor, "batch slot group dim"],
    values: Float[Tensor, "batch slot group dim"],
) -> Float[Tensor, "batch head time dim"]:
    """Causal attention of the last tokens of a text over all of it; queries and keys are turned already."""
    time, slots = query.shape[1], keys.shape[1]
    if time == 1:
        visibility = Visibility()
    elif time == slots:
        visibility = Visibility(causal=True)
    else:
        visibility = Visibility(causal_mask(time, slots, query.device)[None, None])
    heads = (query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
    return attend(*heads, visibility, scale=scale_of(attention))


def causal_mask(time: int, slots: int, device: torch.device, strict: bool = False) -> Bool[Tensor, "time slot"]:
    """Which slots each of the last `time` tokens of a text sees: those up to its own; strict: those before it."""
    own = torch.arange(slots - time, slots, device=device)[:, None]
    slot = torch.arange(slots, device=device)
    return slot < own if strict else slot <= own
