"""Self-attention whose way to look at what it remembers is a subclass's own; all else is as in Attention."""

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention
from formery.parts.context import Context, Visibility
from formery.parts.kernels import attend
from formery.parts.state import LayerState

Kind = TypeVar("Kind", bound="Mixing")


class Mixing(Attention):
    """Attention that reads its decode state by `mix`; a pass without a state is plain attention."""

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        query = self.query(hidden).view(batch, time, self.heads, self.dim)
        key = self.key(hidden).view(batch, time, self.groups, self.dim)
        value = self.value(hidden).view(batch, time, self.groups, self.dim)
        query = query if self.query_norm is None else self.query_norm(query)
        key = key if self.key_norm is None else self.key_norm(key)
        bias = None
        if self.position is not None:
            query, key = self.position.rotate(query, context), self.position.rotate(key, context)
            bias = self.position.bias(self.heads, context)
        query, visibility = query.transpose(1, 2), context.visibility(self.mask, self.heads)
        own = context.remembered(self)
        if own is None:
            dropout = self.dropout if self.training else 0.0
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
            mixed = attend(query, keys, values, visibility, bias, self.scale, self.soft_cap, dropout)
        else:
            mixed = self.mix(query, key, value, own, visibility, bias)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    @abstractmethod
    def mix(
        self,
        query: Float[Tensor, "batch head time dim"],
        key: Float[Tensor, "batch time group dim"],
        value: Float[Tensor, "batch time group dim"],
        own: LayerState,
        visibility: Visibility,
        bias: Float[Tensor, "#batch head time slot"] | None,
    ) -> Float[Tensor, "batch head time dim"]:
        """Puts this pass's keys and values into `own`, and attends to all that it then holds."""


def recast(part: Attention, kind: type[Kind], **own: Any) -> Kind:
    """A part of that kind with the very weights of `part`. own: arguments that `kind` has besides.

    Raises FormeryError where `part` attends in a way of its own, which would be lost.
    """
    if type(part) is not Attention:
        raise FormeryError(
            f"a {type(part).__name__} attends in a way of its own, so it cannot become a {kind.__name__}."
        )
    given = {name: getattr(part, name) for name in Attention.parameters_of_constructor()}
    with torch.device("meta"):  # its own weights are never used
        made = kind(**given, **own)
    for name, child in part.named_children():
        setattr(made, name, child)
    if "replaced" in part.__dict__:
        made.__dict__["replaced"] = set(part.__dict__["replaced"])
    return made.train(part.training)
