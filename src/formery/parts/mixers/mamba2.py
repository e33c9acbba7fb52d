"""The mixer of Mamba-2: a recurrence that is computed as attention with a decay, chunk by chunk.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space
Duality", 2024. Each head has a matrix for its memory, which fades and is added to at each token:

    memory[t] = exp(decay[t]) · memory[t-1] + values[t] ⊗ keys[t],    output[t] = memory[t] · queries[t]

with `decay = step · A`, `values = step · x`; keys and queries are the paper's B and C. Unrolled over a chunk that is
a product with a masked matrix, `output[t] = Σ_{s<=t} (queries[t] · keys[s]) exp(Σ_{s<k<=t} decay[k]) values[s]`, plus
what came before the chunk.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.order import Tree, chain, tree
from formery.parts.part import Part, normal
from formery.parts.recurrence import Carried, RecurrentState
from formery.parts.state import LayerState, State

CHUNK = 64  # tokens whose masked matrix is computed at once


class CausalConvolution(Part):
    """Each channel's weighted sum of its own last values: `Σ_k weight[:, k] · x[t - kernel + 1 + k] + shift`.

    weight: [channels, kernel].
    """

    def __init__(self, channels: int, kernel: int, bias: bool = True):
        super().__init__()
        if kernel < 1:
            raise ValueError(f"a convolution needs a kernel of at least 1 token, not {kernel}")
        self.channels, self.kernel = channels, kernel
        self.weight = normal(channels, kernel, deviation=(3 * kernel) ** -0.5)
        self.shift = nn.Parameter(torch.zeros(channels)) if bias else None

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added."""
        return self.shift is not None

    def forward(
        self,
        values: Float[Tensor, "batch window+time channels"],
        positions: Int[Tensor, "batch time"] | None = None,
        windows: Int[Tensor, "batch time kernel"] | None = None,
    ) -> Float[Tensor, "batch time channels"]:
        """The sums for all but the first kernel - 1 values, which are there to be looked at.

        positions: where given, none looks further back than to the position 0 of its own sequence. windows: in a tree,
        the places of the values that each sum is of, the latest first.
        """
        time = values.shape[1] - self.kernel + 1
        total = self.weight[:, -1] * values[:, self.kernel - 1 :]
        for back in range(1, self.kernel):
            if windows is None:
                earlier = values[:, self.kernel - 1 - back :][:, :time]
            else:
                earlier = values.take_along_dim(windows[..., back, None], 1)
            if positions is not None:
                earlier = earlier.masked_fill((positions < back)[..., None], 0)
            total = total + self.weight[:, -1 - back] * earlier
        return total if self.shift is None else total + self.shift


class GatedRMSNorm(Part):
    """`y / sqrt(mean(y²) + epsilon) * weight` of `y = x * silu(gate)`, the mean over each of `groups` equal parts."""

    def __init__(self, width: int, groups: int = 1, epsilon: float = 1e-5):
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"a width of {width} does not divide into {groups} groups")
        self.width, self.groups, self.epsilon = width, groups, epsilon
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, hidden: Float[Tensor, "... width"], gate: Float[Tensor, "... width"]
    ) -> Float[Tensor, "... width"]:
        gated = hidden * nn.functional.silu(gate.to(hidden.dtype))
        size = self.width // self.groups
        normed = nn.functional.rms_norm(gated.unflatten(-1, (self.groups, size)), (size,), eps=self.epsilon)
        return (self.weight * normed.flatten(-2)).to(gate.dtype)


class Mamba2(Part):
    """The Mamba-2 mixer (Dao and Gu, 2024, figure 6), in the place of attention; it sees everything before a token.

    heads, head_width: of the values, together the inner width. state_width: of keys and queries. groups: how many
    keys and queries there are, each for heads / groups heads. kernel: tokens that the convolution spans.
    bias: on the first and the last map. shortest_step, longest_step: bounds of the step, None where there is none.
    reach: how many tokens before the latest pass a decode state can take back at least.
    `input` gives, in this order, the gate, values, keys, queries and the step of each head.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        state_width: int,
        groups: int = 1,
        kernel: int = 4,
        bias: bool = False,
        convolution_bias: bool = True,
        epsilon: float = 1e-5,
        shortest_step: float = 0.0,
        longest_step: float | None = None,
        reach: int = 64,
    ):
        super().__init__()
        if heads < 1 or groups < 1 or heads % groups:
            raise ValueError(f"{heads} heads cannot share {groups} groups of keys and queries evenly")
        if reach < 1:
            raise ValueError(f"a recurrent state must reach back at least 1 token, not {reach}")
        self.width, self.heads, self.head_width, self.state_width = width, heads, head_width, state_width
        self.groups, self.kernel, self.bias, self.convolution_bias = groups, kernel, bias, convolution_bias
        self.epsilon, self.shortest_step, self.longest_step, self.reach = epsilon, shortest_step, longest_step, reach
        self.inner = heads * head_width
        self.channels = self.inner + 2 * groups * state_width
        self.input = Linear(width, self.inner + self.channels + heads, bias)
        self.convolution = CausalConvolution(self.channels, kernel, convolution_bias)
        steps = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.step_shift = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # the softplus of which is `steps`
        self.log_decay = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = GatedRMSNorm(self.inner, groups, epsilon)
        self.output = Linear(self.inner, width, bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        branches = tree(context)
        if branches is not None:
            return self._forked(hidden, context, branches)
        order = chain(context)
        own = context.remembered(self)
        gate, inputs = self.input(order.enter(hidden)).split((self.inner, self.channels + self.heads), -1)
        if own is None:
            window, memory = self._nothing(len(hidden), hidden.device)
        else:
            assert isinstance(own, RecurrentState)
            window, memory = own.carried
        x, keys, queries, steps, window = self._prepare(window, inputs, order.real, order.positions)
        decays = self._decays(steps)
        if order.positions is not None:
            decays = decays.masked_fill((order.positions == 0)[..., None, None], -torch.inf)
        mixed, memory = scan(x * steps[..., None], decays, keys, queries, memory)
        mixed = mixed + x * self.skip.view(self.groups, -1, 1)
        if own is not None:
            own.append(inputs, order.counts, (window, memory))
        return order.leave(self.output(self.norm(mixed.flatten(2), gate)))

    def _forked(
        self, hidden: Float[Tensor, "batch time width"], context: Context, branches: Tree
    ) -> Float[Tensor, "batch time width"]:
        """`forward` for a tree of drafts: each token comes behind those of its own branch; nothing is carried yet."""
        own = context.remembered(self)
        assert isinstance(own, RecurrentState)
        gate, inputs = self.input(hidden).split((self.inner, self.channels + self.heads), -1)
        window, memory = own.carried
        windows = context.once(("windows", self.kernel), lambda: branches.windows(self.kernel))
        x, keys, queries, steps, _ = self._prepare(window, inputs, branches.real, None, windows)
        mixed = scan_tree(x * steps[..., None], self._decays(steps), keys, queries, memory, branches.ancestors)
        mixed = mixed + x * self.skip.view(self.groups, -1, 1)
        own.append(inputs, branches.depths, None)
        return self.output(self.norm(mixed.flatten(2), gate))

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        carried = self._nothing(state.batch, state.slots.positions.device)
        width, dtype = self.channels + self.heads, self.input.weight.dtype
        return RecurrentState(state.slots, carried, width, dtype, self.advance, self.reach)

    def advance(
        self, carried: Carried, inputs: Float[Tensor, "batch time inputs"], real: Bool[Tensor, "batch time"] | None
    ) -> Carried:
        """What is carried after some more tokens, without their outputs."""
        window, memory = carried
        x, keys, _, steps, window = self._prepare(window, inputs, real, None)
        return window, remember(x * steps[..., None], self._decays(steps), keys, memory)

    def _nothing(self, batch: int, device: torch.device) -> Carried:
        """What is carried before the first token: the convolution's window and the memory, at least in float32."""
        dtype = self.input.weight.dtype
        window = torch.zeros(batch, self.kernel - 1, self.channels, dtype=dtype, device=device)
        shape = batch, self.groups, self.heads // self.groups, self.head_width, self.state_width
        return window, torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def _prepare(
        self,
        window: Float[Tensor, "batch window channels"],
        inputs: Float[Tensor, "batch time inputs"],
        real: Bool[Tensor, "batch time"] | None,
        positions: Int[Tensor, "batch time"] | None,
        windows: Int[Tensor, "batch time kernel"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch time group head dim"],
        Float[Tensor, "batch time group state"],
        Float[Tensor, "batch time group state"],
        Float[Tensor, "batch time group head"],
        Float[Tensor, "batch window channels"],
    ]:
        """Values, keys, queries and steps of each token (the step of padding is 0), and the window after them."""
        channels, steps = inputs.split((self.channels, self.heads), -1)
        read = torch.cat((window, channels), 1)
        places = torch.arange(self.kernel - 1, device=inputs.device)
        counts = torch.full((len(inputs),), inputs.shape[1], device=inputs.device) if real is None else real.sum(1)
        window = read.take_along_dim((counts[:, None] + places)[..., None], 1)
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        mixed = nn.functional.silu(self.convolution(read, positions, windows))
        state = self.groups * self.state_width
        x, keys, queries = (one.unflatten(-1, (self.groups, -1)) for one in mixed.split((self.inner, state, state), -1))
        steps = nn.functional.softplus(steps.to(read.dtype) + self.step_shift)
        steps = steps.clamp(self.shortest_step, self.longest_step)
        if real is not None:
            steps = steps.masked_fill(~real[..., None], 0)
        x = x.unflatten(-1, (self.heads // self.groups, self.head_width))
        return x, keys, queries, steps.unflatten(-1, (self.groups, -1)), window

    def _decays(self, steps: Float[Tensor, "batch time group head"]) -> Float[Tensor, "batch time group head"]:
        return -steps * self.log_decay.to(steps.dtype).exp().view(self.groups, -1)


def scan(
    values: Float[Tensor, "batch time group head dim"],
    decays: Float[Tensor, "batch time group head"],
    keys: Float[Tensor, "batch time group state"],
    queries: Float[Tensor, "batch time group state"],
    memory: Float[Tensor, "batch group head dim state"],
) -> tuple[Float[Tensor, "batch time group head dim"], Float[Tensor, "batch group head dim state"]]:
    """The recurrence over any number of tokens: the output at each, and the memory after them.

    A decay of -inf forgets all that was before. Sums of decays are never differences of longer sums, so that they
    are exact to a few units of rounding.
    """
    outputs = []
    for part in zip(*(one.split(CHUNK, 1) for one in (values, decays, keys, queries)), strict=True):
        value, decay, key, query = part
        lasts = decay.movedim(1, -1)  # batch group head time
        time = lasts.shape[-1]
        # between[t, s]: the sum of the decays after s, up to t.
        between = lasts[..., None].expand(*lasts.shape, time).tril(-1).cumsum(-2)
        later = torch.ones(time, time, dtype=torch.bool, device=decay.device).triu(1)
        kept = between.masked_fill(later, -torch.inf).exp()
        scores = torch.einsum("btgn,bsgn->bgts", query, key)[:, :, None] * kept
        before = torch.einsum("btgn,bghdn->btghd", query, memory) * decay.cumsum(1).exp()[..., None]
        outputs.append(torch.einsum("bghts,bsghd->btghd", scores, value) + before)
        memory = remember(value, decay, key, memory)
    return torch.cat(outputs, 1), memory


def scan_tree(
    values: Float[Tensor, "batch time group head dim"],
    decays: Float[Tensor, "batch time group head"],
    keys: Float[Tensor, "batch time group state"],
    queries: Float[Tensor, "batch time group state"],
    memory: Float[Tensor, "batch group head dim state"],
    ancestors: Bool[Tensor, "batch time time"],
) -> Float[Tensor, "batch time group head dim"]:
    """The outputs of the recurrence along each branch of a tree, which begins at `memory` (as STree, 2025).

    `output[t] = Σ_{s on the way to t} (queries[t] · keys[s]) exp(Σ_{k between s and t} decays[k]) values[s]`, plus
    what came before the tree, faded by all decays on the way. Sums of decays are of those on the way alone.
    """
    way = ancestors.to(decays.dtype)[:, None, None]
    lasts = decays.movedim(1, -1)  # batch group head time
    # below[k, s]: the decay of k where s lies above it; so that between[t, s] sums those after s, up to t.
    below = lasts[..., None] * (way - torch.eye(way.shape[-1], dtype=way.dtype, device=way.device))
    between = way @ below
    kept = between.exp() * way
    scores = torch.einsum("btgn,bsgn->bgts", queries, keys)[:, :, None] * kept
    faded = (way @ lasts[..., None])[..., 0].movedim(-1, 1).exp()
    before = torch.einsum("btgn,bghdn->btghd", queries, memory) * faded[..., None]
    return torch.einsum("bghts,bsghd->btghd", scores, values) + before


def remember(
    values: Float[Tensor, "batch time group head dim"],
    decays: Float[Tensor, "batch time group head"],
    keys: Float[Tensor, "batch time group state"],
    memory: Float[Tensor, "batch group head dim state"],
) -> Float[Tensor, "batch group head dim state"]:
    """The memory after these tokens: `exp(Σ decays) · memory + Σ_s exp(Σ_{k>s} decays[k]) values[s] ⊗ keys[s]`."""
    from_here = decays.flip(1).cumsum(1).flip(1)
    after = torch.cat((from_here[:, 1:], torch.zeros_like(from_here[:, :1])), 1)
    added = torch.einsum("bsghd,bsgn->bghdn", values * after.exp()[..., None], keys)
    return memory * from_here[:, 0].exp()[..., None, None] + added
