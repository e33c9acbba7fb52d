"""What a model in two levels remembers: a decode state of blocks, and one of the tokens in each row's present block."""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.parts.context import Context
from formery.parts.native.stack import pieces, plainly, run
from formery.parts.state import Remembering, Slots, State


def begun(
    layers: nn.ModuleList, norm: nn.Module | None, width: int, batch: int, capacity: int, like: State | Tensor
) -> State:
    """An empty state of a stack of layers. like: a state of the same layers, or a tensor where this one shall lie."""
    state = State(batch, capacity, like.slots.positions.device if isinstance(like, State) else like.device)
    turns: Counter[Remembering] = Counter()
    for _, part in layers.named_modules(remove_duplicate=False):
        if hasattr(part, "start"):
            remembering = cast(Remembering, part)
            state.of(remembering, turns[remembering])
            turns[remembering] += 1
    state.pieces = like.pieces if isinstance(like, State) else pieces(layers, norm, width)
    return state


def passed(
    layers: nn.ModuleList,
    norm: nn.Module | None,
    hidden: Float[Tensor, "batch time width"],
    state: State | None = None,
    counts: Sequence[int] | None = None,
) -> Float[Tensor, "batch time width"]:
    """The normed vectors behind a stack of layers; counts: how many of a row's vectors are read, all unless given."""
    batch, time, _ = hidden.shape
    places, ends = torch.arange(time, device=hidden.device), None
    if state is None:
        context = Context(places.expand(batch, time), even=True)
    else:
        positions, slots = None, state.slots
        if counts is not None and min(counts) < time:
            lengths, read = torch.tensor([slots.lengths, list(counts)], device=hidden.device)[..., None]
            positions = (lengths + places).masked_fill(places >= read, -1)
            ends = [length + count for length, count in zip(slots.lengths, counts, strict=True)]
        state.reserve(time)
        even = positions is None and slots.even
        at = slots.extend(positions, time)
        context = Context(at, slots.positions[:, : slots.filled], even=even, state=state)
    if torch.is_grad_enabled():
        return plainly(layers, norm, hidden, context)
    found = run(layers, norm, hidden, context, None if state is None else state.pieces)
    if ends is not None:
        assert state is not None
        state.rollback(ends)
    return found


class Levels:
    """The state of blocks, that of the present blocks, and the tokens read, from which the latter can be made again.

    A token's keys and values go with its block, so that of each text only those of the present block are held: of
    `prefix` vectors and up to `length - 1` tokens. contexts: what the present blocks' prefixes are made of. stale: rows
    that were taken back into an earlier block; there `outer` ends before the block whose vector leads to the context.
    """

    def __init__(
        self, slots: Slots, outer: State, inner: State, contexts: Float[Tensor, "batch wide"], length: int, prefix: int
    ):
        self.slots, self.outer, self.inner, self.contexts = slots, outer, inner, contexts
        self.length, self.prefix, self.opening = length, prefix, contexts[:1].clone()
        self.tokens: Int[Tensor, "batch capacity"] = torch.zeros_like(slots.positions, dtype=torch.int32)
        self.lengths, self.before = [0] * len(contexts), [0] * len(contexts)
        self.stale = [False] * len(contexts)

    def take(self, tokens: Int[Tensor, "batch time"], counts: Sequence[int]) -> None:
        """Notes a pass: its tokens, of which the first counts[row] are read."""
        device = tokens.device
        starts, read = torch.tensor([self.lengths, list(counts)], device=device)[..., None]
        places = torch.arange(tokens.shape[1], device=device)
        row, place = (places < read).nonzero(as_tuple=True)
        self.tokens[row, (starts + places)[row, place]] = tokens[row, place].to(torch.int32)
        self.before = self.lengths
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def read(self, begin: Int[Tensor, "batch 1"], time: int) -> Int[Tensor, "batch time"]:
        """So many tokens of each row from `begin` on; what lies behind the last one means nothing."""
        places = begin + torch.arange(time, device=begin.device)
        return self.tokens.take_along_dim(places.clamp(max=self.tokens.shape[1] - 1), 1).long()

    def renew(self, inner: State, contexts: Float[Tensor, "batch wide"]) -> None:
        """Puts new states of the present blocks in the place of the old ones."""
        self.inner, self.contexts, self.stale = inner, contexts, [False] * len(contexts)
        self.inner.rollback([self.prefix + length % self.length for length in self.lengths])

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        chosen = rows.tolist()
        for state in (self.outer, self.inner):
            state.select(chosen)
        self.contexts, self.tokens = self.contexts[rows], self.tokens[rows]
        self.lengths, self.before = [self.lengths[row] for row in chosen], [self.before[row] for row in chosen]
        self.stale = [self.stale[row] for row in chosen]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can always be done."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where tokens, not just padding, would be dropped."""
        if list(counts) != self.lengths:
            raise FormeryError("a model of blocks cannot drop single tokens: a block stands for all of its own.")

    def rollback(self, lengths: Sequence[int]) -> None:
        outer, inner = self.outer.lengths, self.inner.lengths
        for row, (old, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            block = new // self.length
            if block < old // self.length:
                self.stale[row] = True
                outer[row] = min(outer[row], max(0, block - 1))
                if block == 0:
                    self.contexts[row] = self.opening[0]
            elif not self.stale[row]:
                inner[row] = self.prefix + new % self.length
        self.outer.rollback(outer)
        self.inner.rollback(inner)
        self.lengths = list(lengths)

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Raises FormeryError where a path is not the beginning of the latest pass."""
        if any(list(path) != list(range(len(path))) for path in paths):
            raise FormeryError("a model of blocks has read the latest tokens as a chain: it keeps the first of them.")

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        self.rollback([before + len(path) for before, path in zip(self.before, paths, strict=True)])

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to move: blocks have slots of their own."""

    def grow(self, capacity: int) -> None:
        grown = self.tokens.new_zeros(len(self.tokens), capacity)
        grown[:, : self.tokens.shape[1]] = self.tokens
        self.tokens = grown

    def tensors(self) -> list[Tensor]:
        inside = [
            one for state in (self.outer, self.inner) for layer in state.layers.values() for one in layer.tensors()
        ]
        return [
            self.tokens,
            self.contexts,
            self.opening,
            self.outer.slots.positions,
            self.inner.slots.positions,
            *inside,
        ]
