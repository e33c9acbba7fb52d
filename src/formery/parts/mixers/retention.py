"""Retention: attention whose weights fade with distance by a fixed rate, so that it is a recurrence too.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023. With `keep` between 0 and 1
for each head and queries and keys turned by their positions (equations 5, 6 and 7):

    parallel:   outputs = (queries · keysᵀ ⊙ D) · values,   D[n, m] = keep^(n - m) for m <= n, else 0
    recurrent:  memory[n] = keep · memory[n-1] + keys[n] ⊗ values[n],   outputs[n] = queries[n] · memory[n]
    chunkwise:  parallel within a chunk, plus `keep^i · queries[i] · memory` for its i-th token

The three are the same but for rounding. There is no softmax: what a token reads is a sum over a memory of fixed size.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.order import Chain, chain, tree
from formery.parts.part import Part
from formery.parts.position import Position
from formery.parts.recurrence import Carried, RecurrentState
from formery.parts.state import LayerState, State


class Retention(Part):
    """Gated multi-scale retention (Sun et al., 2023, equation 8), in the place of attention.

    `output(silu(gate(x)) * norm(retention(x)))`, the norm over each head's values, without weights (`output` has them).
    value_width: of the values of all heads together, twice the width unless given (as in the paper). position: turns
    queries and keys. shortest, longest: after how many tokens the first and the last head have faded to about a third,
    `keep = 1 - 1 / tokens`, geometric in between; equation 8 has 32 and `32 · 2^(heads - 1)`, the paper's experiments
    32 and 512. chunk: tokens that are computed in parallel. reach: how many tokens before the latest pass a decode
    state can take back at least.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        value_width: int | None = None,
        position: Position | None = None,
        shortest: float = 32.0,
        longest: float = 512.0,
        chunk: int = 64,
        epsilon: float = 1e-5,
        reach: int = 64,
    ):
        super().__init__()
        inner = 2 * width if value_width is None else value_width
        if heads < 1 or width % heads or inner % heads:
            raise ValueError(f"a width of {width} and values of {inner} do not divide into {heads} heads")
        if not 1 < shortest <= longest < math.inf:
            raise ValueError(
                f"heads cannot fade after {shortest:g} to {longest:g} tokens: more than 1, in rising order"
            )
        if chunk < 1 or reach < 1:
            raise ValueError(f"a chunk and a reach hold at least 1 token, not {chunk} and {reach}")
        self.width, self.heads, self.value_width, self.position = width, heads, value_width, position
        self.shortest, self.longest, self.chunk, self.epsilon, self.reach = shortest, longest, chunk, epsilon, reach
        self.inner = inner
        self.query, self.key = Linear(width, width), Linear(width, width)
        self.value, self.gate = Linear(width, inner), Linear(width, inner)
        self.output = Linear(inner, width, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        branches = tree(context)
        own = context.remembered(self)
        assert own is None or isinstance(own, RecurrentState)
        queries, keys = (self._turned(one(hidden), context) for one in (self.query, self.key))
        inputs = torch.cat((keys * (self.width // self.heads) ** -0.5, self.value(hidden)), -1)
        [memory] = self._nothing(len(hidden), hidden.device) if own is None else own.carried
        if branches is None:
            order = chain(context)
            inputs = order.enter(inputs)
            mixed, memory = self._mixed(order.enter(queries), inputs, order, memory)
            if own is not None:
                own.append(inputs, order.counts, (memory,))
            mixed = order.leave(mixed)
        else:
            assert own is not None
            query, key, value = self._split(queries, inputs, branches.real)
            depths = branches.ancestors.sum(-1)
            mixed = parallel(query, key, value, self.rates(hidden.device), depths, branches.ancestors)
            mixed = self._normed(mixed + recalled(query, memory, self.rates(hidden.device), depths))
            own.append(inputs, branches.depths, None)
        return self.output(nn.functional.silu(self.gate(hidden)) * mixed.to(hidden.dtype))

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        carried = self._nothing(state.batch, state.slots.positions.device)
        return RecurrentState(state.slots, carried, self.width + self.inner, self.key.dtype, self.advance, self.reach)

    def advance(
        self, carried: Carried, inputs: Float[Tensor, "batch time inputs"], real: Bool[Tensor, "batch time"] | None
    ) -> Carried:
        """What is carried after some more tokens, without their outputs."""
        _, key, value = self._split(None, inputs, real)
        ages, sequences = ages_of(Chain([], None, real), inputs)
        [memory] = carried
        return (remember(key, value, self.rates(inputs.device), memory, ages, sequences),)

    def rates(self, device: torch.device) -> Float[Tensor, "head"]:
        """The logarithm of what each head keeps from one token to the next."""
        spread = torch.linspace(math.log(self.shortest), math.log(self.longest), self.heads, dtype=torch.float64)
        return torch.log1p(-torch.exp(-spread)).to(device)

    def _turned(self, heads: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        if self.position is None:
            return heads
        return self.position.rotate(heads.unflatten(-1, (self.heads, -1)), context).flatten(2)

    def _nothing(self, batch: int, device: torch.device) -> Carried:
        """The memory before the first token, at least in float32."""
        dtype = torch.promote_types(self.key.dtype, torch.float32)
        shape = batch, self.heads, self.width // self.heads, self.inner // self.heads
        return (torch.zeros(shape, dtype=dtype, device=device),)

    def _split(
        self, queries: Tensor | None, inputs: Tensor, real: Bool[Tensor, "batch time"] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, time, head, dim], at least in float32; the keys of padding are 0."""
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        key, value = (
            one.unflatten(-1, (self.heads, -1)) for one in inputs.to(dtype).split((self.width, self.inner), -1)
        )
        if real is not None:
            key = key * real[..., None, None]
        return key if queries is None else queries.to(dtype).unflatten(-1, (self.heads, -1)), key, value

    def _mixed(self, queries: Tensor, inputs: Tensor, order: Chain, memory: Tensor) -> tuple[Tensor, Tensor]:
        """What retention makes of a chain, normed, and the memory after it."""
        query, key, value = self._split(queries, inputs, order.real)
        rates = self.rates(inputs.device)
        if inputs.shape[1] == 1 and order.real is None and order.positions is None:
            mixed, memory = recurrent(query, key, value, rates, memory)
        else:
            ages, sequences = ages_of(order, inputs)
            mixed, memory = chunkwise(query, key, value, rates, memory, ages, sequences, self.chunk)
        return self._normed(mixed), memory

    def _normed(self, mixed: Float[Tensor, "batch time head value"]) -> Float[Tensor, "batch time inner"]:
        return nn.functional.layer_norm(mixed, mixed.shape[-1:], eps=self.epsilon).flatten(2)


def ages_of(order: Chain, inputs: Tensor) -> tuple[Int[Tensor, "#batch time"], Int[Tensor, "#batch time"]]:
    """How many tokens of the pass there are up to each, and in which of the row's sequences it stands (0: the first).

    Where rows are alike, one stands for all.
    """
    if order.real is None:
        ages = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)[None]
    else:
        ages = order.real.cumsum(1)
    return ages, torch.zeros_like(ages) if order.positions is None else (order.positions == 0).cumsum(1) - 1


def parallel(
    queries: Float[Tensor, "batch time head key"],
    keys: Float[Tensor, "batch time head key"],
    values: Float[Tensor, "batch time head value"],
    rates: Float[Tensor, "head"],
    ages: Int[Tensor, "#batch time"],
    seen: Bool[Tensor, "#batch time time"],
) -> Float[Tensor, "batch time head value"]:
    """Equation 5: `Σ_m keep^(ages[n] - ages[m]) (queries[n] · keys[m]) values[m]` over all m that n has `seen`."""
    apart = (ages[:, :, None] - ages[:, None, :])[:, None] * rates[:, None, None]
    kept = apart.masked_fill(~seen[:, None], -torch.inf).exp().to(keys.dtype)
    scores = torch.einsum("bnhk,bmhk->bhnm", queries, keys) * kept
    return torch.einsum("bhnm,bmhv->bnhv", scores, values)


def recurrent(
    queries: Float[Tensor, "batch time head key"],
    keys: Float[Tensor, "batch time head key"],
    values: Float[Tensor, "batch time head value"],
    rates: Float[Tensor, "head"],
    memory: Float[Tensor, "batch head key value"],
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Equation 6, token by token: the outputs, and the memory after them."""
    keep, outputs = rates.exp().to(memory.dtype)[:, None, None], []
    for query, key, value in zip(queries.unbind(1), keys.unbind(1), values.unbind(1), strict=True):
        memory = keep * memory + key[..., None] * value[..., None, :]
        outputs.append((query[..., None, :] @ memory)[..., 0, :])
    return torch.stack(outputs, 1), memory


def chunkwise(
    queries: Float[Tensor, "batch time head key"],
    keys: Float[Tensor, "batch time head key"],
    values: Float[Tensor, "batch time head value"],
    rates: Float[Tensor, "head"],
    memory: Float[Tensor, "batch head key value"],
    ages: Int[Tensor, "#batch time"],
    sequences: Int[Tensor, "#batch time"],
    chunk: int,
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Equation 7: the outputs, and the memory after them; a sequence sees nothing of those before it."""
    outputs, age, sequence = [], torch.zeros_like(ages[:, :1]), torch.zeros_like(ages[:, :1])
    for query, key, value, aged, of in zip(
        *(one.split(chunk, 1) for one in (queries, keys, values, ages, sequences)), strict=True
    ):
        lower = torch.ones(aged.shape[1], aged.shape[1], dtype=torch.bool, device=aged.device).tril()
        inner = parallel(query, key, value, rates, aged, lower & (of[:, :, None] == of[:, None, :]))
        outputs.append(inner + recalled(query, memory, rates, aged - age, of == sequence))
        memory = remember(key, value, rates, memory, aged - age, of - sequence)
        age, sequence = aged[:, -1:], of[:, -1:]
    return torch.cat(outputs, 1), memory


def recalled(
    queries: Float[Tensor, "batch time head key"],
    memory: Float[Tensor, "batch head key value"],
    rates: Float[Tensor, "head"],
    ages: Int[Tensor, "#batch time"],
    seen: Bool[Tensor, "#batch time"] | None = None,
) -> Float[Tensor, "batch time head value"]:
    """`keep^age · query · memory`: what tokens read from the memory as it was `ages` before them, where they see it."""
    kept = (ages[..., None] * rates).exp()
    if seen is not None:
        kept = kept * seen[..., None]
    return torch.einsum("bnhk,bhkv->bnhv", queries * kept.to(queries.dtype)[..., None], memory)


def remember(
    keys: Float[Tensor, "batch time head key"],
    values: Float[Tensor, "batch time head value"],
    rates: Float[Tensor, "head"],
    memory: Float[Tensor, "batch head key value"],
    ages: Int[Tensor, "#batch time"],
    sequences: Int[Tensor, "#batch time"],
) -> Float[Tensor, "batch head key value"]:
    """The memory after these tokens: `keep^last · memory + Σ_m keep^(last - ages[m]) keys[m] ⊗ values[m]`.

    sequences: counted from that of the memory, which is 0; only the last one is remembered.
    """
    last, end = ages[:, -1:], sequences[:, -1:]
    kept = ((last - ages)[..., None] * rates).exp() * (sequences == end)[..., None]
    added = torch.einsum("bmhk,bmhv->bhkv", keys * kept.to(keys.dtype)[..., None], values)
    faded = (last * rates).exp() * (end == 0)
    return memory * faded.to(memory.dtype)[..., None, None] + added
