"""Attention over one's own sequence, and over another's."""

from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Context
from formery.parts.kernels import attend
from formery.parts.linear import Linear
from formery.parts.mask import Mask, causal, everything
from formery.parts.part import Part
from formery.parts.position import Position
from formery.parts.state import KeyValues, LayerState, Memory, State


class Attention(Part):
    """Multi-head self-attention (Vaswani et al., 2017, 3.2) with any number of key and value heads.

    heads: query heads; key_value_heads: as many (multi-head), fewer (grouped) or one (multi-query).
    position: turns queries and keys, or biases scores. mask: who sees whom. query_norm, key_norm: norms of
    head_width, applied to each head before it is turned. soft_cap: scores are bounded to ±soft_cap.
    bias: on the query, key and value maps; output_bias: on the last map (as `bias` unless given).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        position: Position | None = None,
        mask: Mask = causal,
        bias: bool = False,
        output_bias: bool | None = None,
        query_norm: Part | None = None,
        key_norm: Part | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.width, self.heads, self.key_value_heads = width, heads, key_value_heads
        self.head_width, self.position, self.mask = head_width, position, mask
        self.bias, self.output_bias = bias, output_bias
        self.query_norm, self.key_norm = query_norm, key_norm
        self.scale, self.soft_cap, self.dropout = scale, soft_cap, dropout
        self.groups, self.dim = heads_of(width, heads, key_value_heads, head_width)
        self.query = Linear(width, heads * self.dim, bias)
        self.key = Linear(width, self.groups * self.dim, bias)
        self.value = Linear(width, self.groups * self.dim, bias)
        self.output = Linear(heads * self.dim, width, bias if output_bias is None else output_bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        query = self.query(hidden).view(batch, time, self.heads, self.dim)
        key = self.key(hidden).view(batch, time, self.groups, self.dim)
        value = self.value(hidden).view(batch, time, self.groups, self.dim)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None:
            key = self.key_norm(key)
        bias = None
        if self.position is not None:
            query, key = self.position.rotate(query, context), self.position.rotate(key, context)
            bias = self.position.bias(self.heads, context)
        own = context.remembered(self)
        if own is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            assert isinstance(own, KeyValues)
            keys, values = own.append(key, value)
        dropout = self.dropout if self.training else 0.0
        visibility = context.visibility(self.mask, self.heads)
        mixed = attend(query.transpose(1, 2), keys, values, visibility, bias, self.scale, self.soft_cap, dropout)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        return KeyValues(state.slots, self.groups, self.dim, self.dim, self.key.dtype)


class CrossAttention(Part):
    """Multi-head attention over a memory, such as the encoder's output.

    memory_width: of the memory's vectors (as `width` unless given); the other arguments as in Attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        memory_width: int | None = None,
        mask: Mask = everything,
        bias: bool = False,
        output_bias: bool | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.width, self.heads, self.key_value_heads = width, heads, key_value_heads
        self.head_width, self.memory_width, self.mask = head_width, memory_width, mask
        self.bias, self.output_bias, self.scale, self.dropout = bias, output_bias, scale, dropout
        self.groups, self.dim = heads_of(width, heads, key_value_heads, head_width)
        read = width if memory_width is None else memory_width
        self.query = Linear(width, heads * self.dim, bias)
        self.key = Linear(read, self.groups * self.dim, bias)
        self.value = Linear(read, self.groups * self.dim, bias)
        self.output = Linear(heads * self.dim, width, bias if output_bias is None else output_bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        assert context.memory is not None
        query = self.query(hidden).view(batch, time, self.heads, self.dim).transpose(1, 2)
        if context.state is None:
            assert context.memory_hidden is not None
            read = self.read(context.memory_hidden)
        else:
            known = context.state.layers[self, 0]
            assert isinstance(known, Memory)
            read = known
        dropout = self.dropout if self.training else 0.0
        visibility = context.memory.visibility(self.mask, self.heads)
        mixed = attend(query, read.keys, read.values, visibility, None, self.scale, dropout=dropout)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    def read(self, memory: Float[Tensor, "batch source width"]) -> Memory:
        """The memory's keys and values, computed once for all tokens to come."""
        batch, slots, _ = memory.shape
        key = self.key(memory).view(batch, slots, self.groups, self.dim).transpose(1, 2)
        value = self.value(memory).view(batch, slots, self.groups, self.dim).transpose(1, 2)
        return Memory(key.contiguous(), value.contiguous())


def heads_of(width: int, heads: int, key_value_heads: int | None, head_width: int | None) -> tuple[int, int]:
    """The number of key and value heads and the width of a head; ValueError where they do not fit together."""
    groups = heads if key_value_heads is None else key_value_heads
    if heads < 1 or groups < 1 or heads % groups:
        raise ValueError(f"{heads} heads cannot share {groups} key and value heads evenly")
    if head_width is None and width % heads:
        raise ValueError(f"a width of {width} does not divide into {heads} heads")
    return groups, width // heads if head_width is None else head_width
