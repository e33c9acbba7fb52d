"""Attention layers that read the keys and values of an earlier one, and keep none of their own."""

from typing import NoReturn

from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention
from formery.parts.context import Context
from formery.parts.kernels import attend
from formery.parts.linear import Linear
from formery.parts.mask import Mask, causal
from formery.parts.part import Part
from formery.parts.position import Position
from formery.parts.state import KeyValues

Shared = tuple[Float[Tensor, "batch group slot key"], Float[Tensor, "batch group slot value"]]


class OwningAttention(Attention):
    """Self-attention whose keys and values later layers read too; it computes what `Attention` does, bit for bit."""

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        key = self.key(hidden).view(batch, time, self.groups, self.dim)
        value = self.value(hidden).view(batch, time, self.groups, self.dim)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.position is not None:
            key = self.position.rotate(key, context)
        own = context.remembered(self)
        if own is None:
            context.turns[self] += 1
            made = key.transpose(1, 2), value.transpose(1, 2)
            shared: Shared = context.once((self, context.turns[self]), lambda: made)
        else:
            assert isinstance(own, KeyValues)
            shared = own.append(key, value)
        return looked_up(self, hidden, shared, context)

    def shared(self, context: Context) -> Shared:
        """The keys and values of its latest run in this pass, those of earlier passes before them.

        Raises FormeryError where it has not run: a layer that reads them can then not run either.
        """
        turn = context.turns[self]
        if turn == 0:
            _absent()
        if context.state is None:
            return context.once((self, turn), _absent)
        own = context.state.of(self, turn - 1)
        assert isinstance(own, KeyValues)
        filled = own.slots.filled
        return own.keys[:, :filled].transpose(1, 2), own.values[:, :filled].transpose(1, 2)


class SharedAttention(Part):
    """Self-attention over the keys and values of an earlier layer, its `owner`: queries and an output are its own.

    Nothing of it is remembered while decoding. The owner is described and trained where it stands; here it is only
    looked at. position: must turn queries as the owner turned its keys. The other arguments are those of Attention;
    the number and the width of key and value heads are the owner's.
    """

    def __init__(
        self,
        owner: OwningAttention,
        width: int,
        heads: int,
        position: Position | None = None,
        mask: Mask = causal,
        bias: bool = False,
        output_bias: bool | None = None,
        query_norm: Part | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        if heads < 1 or heads % owner.groups:
            raise ValueError(f"{heads} heads cannot share {owner.groups} key and value heads evenly")
        # Kept beside the inner parts: its weights and its memory belong to the layer that it stands in.
        self.__dict__["owner"] = owner
        self.width, self.heads, self.position, self.mask = width, heads, position, mask
        self.bias, self.output_bias, self.query_norm = bias, output_bias, query_norm
        self.scale, self.soft_cap, self.dropout = scale, soft_cap, dropout
        self.dim = owner.dim
        self.query = Linear(width, heads * self.dim, bias)
        self.output = Linear(heads * self.dim, width, bias if output_bias is None else output_bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return looked_up(self, hidden, self.__dict__["owner"].shared(context), context)


def looked_up(
    part: OwningAttention | SharedAttention, hidden: Float[Tensor, "batch time width"], shared: Shared, context: Context
) -> Float[Tensor, "batch time width"]:
    """`output · softmax(scale · query · keysᵀ + bias) · values`, the queries being made of `hidden`."""
    batch, time, _ = hidden.shape
    query = part.query(hidden).view(batch, time, part.heads, part.dim)
    if part.query_norm is not None:
        query = part.query_norm(query)
    bias = None
    if part.position is not None:
        query = part.position.rotate(query, context)
        bias = part.position.bias(part.heads, context)
    keys, values = shared
    dropout = part.dropout if part.training else 0.0
    visibility = context.visibility(part.mask, part.heads)
    mixed = attend(query.transpose(1, 2), keys, values, visibility, bias, part.scale, part.soft_cap, dropout)
    made: Tensor = part.output(mixed.transpose(1, 2).reshape(batch, time, -1))
    return made


def _absent() -> NoReturn:
    raise FormeryError(
        "a layer reads the keys and values of one that did not run in this pass: run the layer that owns them too."
    )
