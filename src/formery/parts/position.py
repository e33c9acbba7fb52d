"""Where position enters: added to embeddings, turning queries and keys, or as a bias on scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.part import Described, Part, normal


class Position(Part):
    """The three places at which a position scheme may act; each does nothing unless a scheme says so."""

    def embed(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        """Acts on the embeddings."""
        return hidden

    def rotate(
        self, heads: Float[Tensor, "batch time head dim"], context: Context
    ) -> Float[Tensor, "batch time head dim"]:
        """Acts on queries and on keys before they are stored."""
        return heads

    def bias(self, heads: int, context: Context) -> Float[Tensor, "#batch head time slot"] | None:
        """What is added to the scores."""
        return None


class Learned(Position):
    """A learned vector for each position, added to the embedding.

    offset: how many rows of the table come before position 0 (OPT and BART: 2).
    """

    def __init__(self, length: int, width: int, offset: int = 0):
        super().__init__()
        self.length, self.width, self.offset = length, width, offset
        self.weight = normal(length + offset, width, deviation=0.02)

    def embed(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return hidden + nn.functional.embedding(context.positions.clamp(min=0) + self.offset, self.weight)


class Sinusoidal(Position):
    """`sin(position / base^(2i/width))` and the cosine of it, added to the embedding (Vaswani et al., 2017, 3.5).

    interleaved: sine and cosine alternate as in the paper; otherwise all sines come first, then all cosines.
    """

    def __init__(self, width: int, base: float = 10_000.0, interleaved: bool = True):
        super().__init__()
        self.width, self.base, self.interleaved = width, base, interleaved

    def embed(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        half = torch.arange(0, self.width, 2, device=hidden.device, dtype=torch.float32)
        angle = context.positions.clamp(min=0)[..., None] * torch.exp(half * (-math.log(self.base) / self.width))
        pair = torch.stack((angle.sin(), angle.cos()), -1)
        table = pair.flatten(-2) if self.interleaved else pair.transpose(-1, -2).flatten(-2)
        return hidden + table[..., : self.width].to(hidden.dtype)


class TokenTypes(Position):
    """A learned vector for each kind of token (first or second text of a pair), added to the embedding.

    The pass tells the kinds (`context.types`); without them every token is of kind 0.
    """

    def __init__(self, types: int, width: int):
        super().__init__()
        self.types, self.width = types, width
        self.weight = normal(types, width, deviation=0.02)

    def embed(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        if context.types is None:
            return hidden + self.weight[0]
        return hidden + nn.functional.embedding(context.types, self.weight)


class Together(Position):
    """Several schemes, each at its place: what they add is added up, what they turn is turned in turn."""

    def __init__(self, parts: Sequence[Position]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def embed(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        for part in self.parts:
            hidden = cast(Position, part).embed(hidden, context)
        return hidden

    def rotate(
        self, heads: Float[Tensor, "batch time head dim"], context: Context
    ) -> Float[Tensor, "batch time head dim"]:
        for part in self.parts:
            heads = cast(Position, part).rotate(heads, context)
        return heads

    def bias(self, heads: int, context: Context) -> Float[Tensor, "#batch head time slot"] | None:
        biases = [cast(Position, part).bias(heads, context) for part in self.parts]
        given = [bias for bias in biases if bias is not None]
        return torch.stack(torch.broadcast_tensors(*given)).sum(0) if given else None


class Scaling(Described):
    """Changes the frequencies of a rotary table so that it reaches further than it was trained for."""

    @property
    def magnitude(self) -> float:
        """What turned queries and keys are multiplied by."""
        return 1.0

    def __call__(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        """The changed frequencies, in radians a position."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(Scaling):
    """`frequency / factor`: positions are squeezed (position interpolation, Chen et al., 2023)."""

    factor: float

    def __call__(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling(Scaling):
    """Squeezes long wavelengths by `factor`, leaves short ones, and goes over smoothly in between (Llama 3.1).

    A wavelength is long beyond original_length / low, short below original_length / high.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __call__(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        turns = self.original_length * frequencies / (2 * math.pi)
        smooth = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (smooth + (1 - smooth) / self.factor)


@dataclass(frozen=True)
class YarnScaling(Scaling):
    """Leaves what turns fast, squeezes what turns slowly by `factor`, goes over linearly (Peng et al., 2023, eq. 23).

    fast, slow: turns over original_length above which a frequency is left, and below which it is squeezed. The
    border is looked for among the places of the table, rounded outwards if `truncate`.
    attention: the magnitude of queries and keys, `0.1 · ln(factor) + 1` unless given.
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        usual = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return usual if self.attention is None else self.attention

    def __call__(self, frequencies: Float[Tensor, "half"]) -> Float[Tensor, "half"]:
        half = len(frequencies)
        if half < 2:
            return frequencies
        # The table is geometric, so that its own second entry tells the step from place to place.
        step = -math.log(float(frequencies[1]))

        def place(turns: float) -> float:
            return math.log(self.original_length / (turns * 2 * math.pi)) / step

        low, high = place(self.fast), place(self.slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        at = torch.arange(half, device=frequencies.device, dtype=torch.float32)
        squeezed = ((at - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return frequencies * (1 - squeezed) + frequencies / self.factor * squeezed


class Rotary(Position):
    """Turns pairs of query and key entries by an angle that grows with position (Su et al., 2021).

    `angle = position * scaling(base^(-2i/dim))`; a score then depends on the distance alone.
    fraction: the share of each head's entries that is turned (GPT-NeoX: 0.25).
    interleaved: pairs are neighbours (2i, 2i+1); otherwise (i, i + dim/2).
    """

    def __init__(
        self, base: float = 10_000.0, fraction: float = 1.0, scaling: Scaling | None = None, interleaved: bool = False
    ):
        super().__init__()
        self.base, self.fraction, self.scaling, self.interleaved = base, fraction, scaling, interleaved

    def rotate(
        self, heads: Float[Tensor, "batch time head dim"], context: Context
    ) -> Float[Tensor, "batch time head dim"]:
        turned = self.turned(heads.shape[-1])
        cosine, sine = context.once(
            (self.base, self.scaling, turned, heads.dtype), lambda: self._table(turned, context.positions, heads.dtype)
        )
        x, rest = (heads, None) if turned == heads.shape[-1] else (heads[..., :turned], heads[..., turned:])
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
        pair = (first * cosine - second * sine, second * cosine + first * sine)
        x = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return x if rest is None else torch.cat((x, rest), -1)

    def turned(self, dim: int) -> int:
        """How many entries of a head of that width are turned."""
        return int(dim * self.fraction) // 2 * 2

    def frequencies(self, turned: int, device: torch.device) -> Float[Tensor, "half"]:
        """By how much each pair turns from one position to the next, in radians."""
        frequencies = self.base ** (-torch.arange(0, turned, 2, device=device, dtype=torch.float32) / turned)
        return frequencies if self.scaling is None else self.scaling(frequencies)

    @property
    def magnitude(self) -> float:
        """What turned entries are multiplied by."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    def _table(self, turned: int, positions: Int[Tensor, "batch time"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angle = positions.clamp(min=0)[..., None, None] * self.frequencies(turned, positions.device)
        return (angle.cos() * self.magnitude).to(dtype), (angle.sin() * self.magnitude).to(dtype)


class Alibi(Position):
    """`score - slope(head) * |query - key|`, slopes falling geometrically over the heads (Press et al., 2022)."""

    def bias(self, heads: int, context: Context) -> Float[Tensor, "#batch head time slot"]:
        return context.once(("alibi", heads), lambda: self._bias(heads, context))

    def _bias(self, heads: int, context: Context) -> Float[Tensor, "#batch head time slot"]:
        whole = 2 ** int(math.log2(heads))
        slopes = [2 ** (-8 * (head + 1) / whole) for head in range(whole)]
        # Heads beyond a power of two take every other slope of the next power, as in the authors' code.
        slopes += [2 ** (-4 * (2 * head + 1) / whole) for head in range(heads - whole)]
        slope = torch.tensor(slopes, device=context.positions.device)[:, None, None]
        return -slope * distance(context).abs()[:, None]


class RelativeBuckets(Position):
    """A learned bias for each head and bucket of distance, exact when near, logarithmic when far.

    As in T5 (Raffel et al., 2020). Layers that share one table hold the same part. bidirectional: half of the
    buckets are for keys after the query.
    """

    def __init__(self, heads: int, buckets: int = 32, furthest: int = 128, bidirectional: bool = False):
        super().__init__()
        self.heads, self.buckets, self.furthest, self.bidirectional = heads, buckets, furthest, bidirectional
        self.weight = normal(buckets, heads, deviation=0.1)

    def bias(self, heads: int, context: Context) -> Float[Tensor, "#batch head time slot"]:
        return context.once(self, lambda: self.weight[self.bucket(distance(context))].permute(0, 3, 1, 2))

    def bucket(self, ahead: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The bucket of `ahead = query - key`."""
        buckets = self.buckets // 2 if self.bidirectional else self.buckets
        side = (ahead < 0).long() * buckets if self.bidirectional else torch.zeros_like(ahead)
        away = ahead.abs() if self.bidirectional else ahead.clamp(min=0)
        exact = buckets // 2
        spread = torch.log(away.clamp(min=1).float() / exact) / math.log(self.furthest / exact) * (buckets - exact)
        far = (exact + spread.long()).clamp(max=buckets - 1)
        return side + torch.where(away < exact, away, far)


def distance(context: Context) -> Int[Tensor, "#batch time slot"]:
    """`query position - key position` of a pass, computed once; one row stands for all where they are alike."""
    rows = slice(0, 1) if context.even else slice(None)
    return context.once(
        "distance", lambda: context.positions[rows][:, :, None] - context.key_positions[rows][:, None, :]
    )
