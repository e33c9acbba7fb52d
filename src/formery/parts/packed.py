"""Texts of unlike length laid end to end, without padding: all that works token by token takes one matrix of rows.

Zhai, Jiang, Wang, Jia, Zhang, Chen, Liu and Zhu, "ByteTransformer: A High-Performance Transformer Boosted for
Variable-Length Inputs", 2022, section III.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention, CrossAttention
from formery.parts.context import Context, Visibility
from formery.parts.kernels import attend
from formery.parts.mask import Mask
from formery.parts.part import Part


class Packed:
    """The texts of a padded batch, laid end to end so that those of like length stand together.

    positions: of the padded batch, -1 for padding; each text's are 0, 1, 2, …. beside: further numbers to sort texts of
    one length by, such as the lengths of what they answer. Raises FormeryError for other positions, or no token.
    """

    def __init__(self, positions: Int[Tensor, "batch time"], beside: Sequence[int] | None = None):
        self.shape, device = positions.shape, positions.device
        real = positions >= 0
        counts = real.sum(1).tolist()
        if not sum(counts):
            raise FormeryError("a batch without a token cannot be packed.")
        others = [0] * len(counts) if beside is None else beside
        self.order = sorted(
            (row for row, count in enumerate(counts) if count), key=lambda row: (counts[row], others[row])
        )
        self.lengths = [counts[row] for row in self.order]
        self.offsets = torch.tensor([0, *self.lengths], device=device).cumsum(0)
        order = torch.tensor(self.order, device=device)
        text, column = real[order].nonzero(as_tuple=True)
        self.index: Int[Tensor, "total"] = order[text] * self.shape[1] + column
        self.positions = (torch.arange(len(text), device=device) - self.offsets[text])[None]
        if not torch.equal(self.pack(positions), self.positions):
            raise FormeryError("texts that are packed begin at position 0 and leave none out.")

    @property
    def fill(self) -> float:
        """Which share of the padded batch are tokens."""
        return len(self.index) / (self.shape[0] * self.shape[1])

    def pack(self, padded: Tensor) -> Tensor:
        """Of [batch, time, …] the tokens alone, as [1, total, …]."""
        return padded.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Of [1, total, …] the padded batch [batch, time, …], zeros where there is no token."""
        padded = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[2:])
        return padded.index_copy(0, self.index, packed[0]).unflatten(0, self.shape)

    def rows_of(self, other: "Packed") -> Int[Tensor, "total"]:
        """Where the tokens of these texts lie, text by text in the order of `other`."""
        places = {row: place for place, row in enumerate(self.order)}
        if set(places) != set(other.order):
            raise FormeryError("a text is empty where the one that belongs to it is not.")
        texts = [places[row] for row in other.order]
        begins = self.offsets.tolist()
        return torch.cat([torch.arange(begins[text], begins[text + 1]) for text in texts]).to(self.index.device)


class Stretch(NamedTuple):
    """Texts of one length that follow one another. source: the length of what each of them reads."""

    number: int
    length: int
    context: Context
    source: int = 0


class PackedContext(Context):
    """What a pass over packed texts knows; attention looks at each stretch of texts of one length by itself.

    source: the lengths of the texts that cross-attention reads, in the same order, with `memory_hidden` packed alike.
    """

    def __init__(
        self,
        packed: Packed,
        types: Int[Tensor, "1 total"] | None = None,
        source: Sequence[int] | None = None,
        memory_hidden: Float[Tensor, "1 source width"] | None = None,
    ):
        super().__init__(packed.positions, full=True, types=types, memory_hidden=memory_hidden)
        self.packed = packed
        self.stretches = list(self._own())
        self.crossings = [] if source is None else list(self._crossing(source))

    def visibility(self, mask: Mask, heads: int) -> Visibility:
        """Only stretches can tell; FormeryError for a part that asks."""
        raise FormeryError("a part that attends to other tokens was not made for packed texts.")

    def _own(self) -> Iterator[Stretch]:
        for length, alike in groupby(self.packed.lengths):
            number = len(list(alike))
            yield Stretch(number, length, Context(self._counted(number, length), even=True))

    def _crossing(self, source: Sequence[int]) -> Iterator[Stretch]:
        for (length, read), alike in groupby(zip(self.packed.lengths, source, strict=True)):
            number = len(list(alike))
            context = Context(self._counted(number, length), self._counted(number, read), full=True)
            yield Stretch(number, length, context, read)

    def _counted(self, number: int, length: int) -> Int[Tensor, "number length"]:
        return torch.arange(length, device=self.positions.device).expand(number, length)


class PackedAttention(Part):
    """`inner`, where texts are packed stretch by stretch: what they do not see of one another is not computed."""

    def __init__(self, inner: Attention):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        inner = self.inner
        if not isinstance(context, PackedContext):
            found: Tensor = inner(hidden, context)
            return found
        query = inner.query(hidden).unflatten(-1, (inner.heads, inner.dim))
        key, value = (one(hidden).unflatten(-1, (inner.groups, inner.dim)) for one in (inner.key, inner.value))
        if inner.query_norm is not None:
            query = inner.query_norm(query)
        if inner.key_norm is not None:
            key = inner.key_norm(key)
        if inner.position is not None:
            query, key = inner.position.rotate(query, context), inner.position.rotate(key, context)
        return inner.output(self.mix(query, key, value, context).flatten(2))

    def mix(
        self,
        query: Float[Tensor, "1 total head dim"],
        key: Float[Tensor, "1 total group dim"],
        value: Float[Tensor, "1 total group dim"],
        context: PackedContext,
    ) -> Float[Tensor, "1 total head dim"]:
        """Attention within each text."""
        inner, mixed = self.inner, []
        # Pieces of a split, not slices: their gradients are joined once, where each slice's would fill a whole matrix.
        sizes = [one.number * one.length for one in context.stretches]
        pieces = zip(*(part[0].split(sizes) for part in (query, key, value)), strict=True)
        for one, rows in zip(context.stretches, pieces, strict=True):
            texts = [part.unflatten(0, (one.number, one.length)).transpose(1, 2) for part in rows]
            bias = None if inner.position is None else inner.position.bias(inner.heads, one.context)
            visibility = one.context.visibility(inner.mask, inner.heads)
            dropout = inner.dropout if inner.training else 0.0
            found = attend(texts[0], texts[1], texts[2], visibility, bias, inner.scale, inner.soft_cap, dropout)
            mixed.append(found.transpose(1, 2).flatten(0, 1))
        return torch.cat(mixed)[None]


class PackedCrossAttention(Part):
    """`inner`, where texts and what they read are packed stretch by stretch."""

    def __init__(self, inner: CrossAttention):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        inner = self.inner
        if not isinstance(context, PackedContext):
            found: Tensor = inner(hidden, context)
            return found
        assert context.memory_hidden is not None
        read = inner.read(context.memory_hidden)
        sizes = [one.number * one.length for one in context.crossings]
        sources = [one.number * one.source for one in context.crossings]
        queries = inner.query(hidden)[0].unflatten(-1, (inner.heads, inner.dim)).split(sizes)
        mixed = []
        for one, rows, *known in zip(
            context.crossings, queries, read.keys[0].split(sources, 1), read.values[0].split(sources, 1), strict=True
        ):
            query = rows.unflatten(0, (one.number, one.length)).transpose(1, 2)
            key, value = (part.unflatten(1, (one.number, one.source)).transpose(0, 1) for part in known)
            visibility = one.context.visibility(inner.mask, inner.heads)
            dropout = inner.dropout if inner.training else 0.0
            found = attend(query, key, value, visibility, None, inner.scale, dropout=dropout)
            mixed.append(found.transpose(1, 2).flatten(0, 1))
        return inner.output(torch.cat(mixed).flatten(1)[None])
