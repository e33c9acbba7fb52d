"""A feed-forward that holds smaller ones: its first hidden units."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from formery.parts.codes import Codes
from formery.parts.context import Context
from formery.parts.feedforward import MLP, GatedMLP
from formery.parts.linear import Linear
from formery.parts.part import Part
from formery.parts.part import activation as function


class Nested(Part):
    """`down[:, :m] · hidden[:m]`, where m of the hidden units are taken (Devvrit et al., 2024: "MatFormer").

    sizes: hidden units of each nested feed-forward, in rising order, the last one all of them. taken: how many are used
    now, None for all. With them `inner` computes what a feed-forward of that size would.
    """

    def __init__(self, inner: Part, sizes: Sequence[int], taken: int | None = None):
        super().__init__()
        if not isinstance(inner, MLP | GatedMLP):
            raise ValueError(f"{type(inner).__name__} is no feed-forward whose hidden units could be taken")
        if not sizes or list(sizes) != sorted({*sizes}) or sizes[0] < 1 or sizes[-1] != inner.hidden:
            raise ValueError(f"sizes must rise from 1 or more to the {inner.hidden} hidden units, not {list(sizes)}")
        if taken is not None and not 1 <= taken <= inner.hidden:
            raise ValueError(f"{taken} of {inner.hidden} hidden units cannot be taken")
        self.inner, self.sizes, self.taken = inner, list(sizes), taken

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        inner, taken = self.inner, self.taken
        assert isinstance(inner, MLP | GatedMLP)
        if taken is None or taken == inner.hidden:
            return cast(Tensor, inner(hidden, context))
        if not torch.is_grad_enabled():
            return cast(Tensor, self.alone()(hidden, context))
        first = inner.gate if isinstance(inner, GatedMLP) else inner.up
        units = function(inner.activation)(_first_outputs(first, hidden, taken))
        if isinstance(inner, GatedMLP):
            units = units * _first_outputs(inner.up, hidden, taken)
        return linear(units, _whole(inner.down.weight)[:, :taken], inner.down.shift)

    def alone(self) -> MLP | GatedMLP:
        """The feed-forward that is used now."""
        assert isinstance(self.inner, MLP | GatedMLP)
        return self.inner if self.taken is None else first_units(self.inner, self.taken)


def first_units(part: MLP | GatedMLP, count: int) -> MLP | GatedMLP:
    """A feed-forward of the first hidden units, for decoding: its weights are those of `part`, or copies of them.

    Raises ValueError where these are codes.
    """
    if count == part.hidden:
        return part
    with torch.device("meta"):
        small = type(part)(part.width, count, part.activation, part.bias)
    maps = ["up", "gate"] if isinstance(part, GatedMLP) else ["up"]
    for name in maps:
        own, whole = getattr(small, name), getattr(part, name)
        own.weight = _frozen(_whole(whole.weight)[:count])
        own.shift = None if whole.shift is None else _frozen(whole.shift[:count])
    small.down.weight = _frozen(_whole(part.down.weight)[:, :count])
    small.down.shift = None if part.down.shift is None else _frozen(part.down.shift)
    return small.train(part.training)


def _first_outputs(part: Linear, hidden: Tensor, count: int) -> Tensor:
    return linear(hidden, _whole(part.weight)[:count], None if part.shift is None else part.shift[:count])


def _whole(weight: nn.Parameter | Codes) -> Tensor:
    if isinstance(weight, Codes):
        raise ValueError("the weights are codes, of which no slices can be taken: load the model without quantising it")
    return weight


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().contiguous(), requires_grad=False)
