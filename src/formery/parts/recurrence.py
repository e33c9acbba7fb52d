"""What recurrent layers share: in which order a pass is read, and a state that can be taken back.

A recurrent state holds what became of all tokens, not the tokens, so none can be taken out of it. It goes back by
going forward again: from a copy of how it was some tokens ago, over the inputs of those that stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.context import Context
from formery.parts.state import Slots

Carried = tuple[Tensor, ...]
Advance = Callable[[Carried, Float[Tensor, "batch time inputs"], Bool[Tensor, "batch time"] | None], Carried]


@dataclass(frozen=True)
class Chain:
    """The tokens of a pass, each row's one after the other, its padding behind them.

    counts: how many tokens each row has. order: which place of the pass comes where, None where none moves.
    real: False at padding, None where there is none. positions: of each token, given only where a row holds several
    sequences, each of which begins at position 0. All in the new order.
    """

    counts: list[int]
    order: Int[Tensor, "batch time"] | None = None
    real: Bool[Tensor, "batch time"] | None = None
    positions: Int[Tensor, "batch time"] | None = None

    def enter(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Vectors of the pass, put into this order."""
        return hidden if self.order is None else hidden.take_along_dim(self.order[..., None], 1)

    def leave(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The way back from `enter`."""
        return hidden if self.order is None else hidden.take_along_dim(self.order.argsort(1)[..., None], 1)


def chain(context: Context) -> Chain:
    """In which order the recurrent layers of this pass read its tokens.

    Raises FormeryError where the tokens do not follow one another: a tree of drafts, hidden or missing tokens.
    """
    return context.once("chain", lambda: _chain(context))


def _chain(context: Context) -> Chain:
    positions = context.positions
    if context.even:
        return Chain([positions.shape[1]] * len(positions))
    real = positions >= 0
    counts: list[int] = real.sum(1).tolist()
    sequences = (positions == 0).cumsum(1)
    if context.visible is not None and not _all_visible(context, real, sequences):
        raise _not_a_chain()
    order = None
    if bool((real[:, 1:] > real[:, :-1]).any()):
        order = (~real).int().argsort(dim=1, stable=True)
        positions, real = positions.gather(1, order), real.gather(1, order)
    follows = (positions.diff(dim=1) == 1) | ~real[:, 1:]
    restarts = positions[:, 1:] == 0
    if context.state is None:
        follows = follows | restarts
    if not bool(follows.all()):
        raise _not_a_chain()
    padded = min(counts) < positions.shape[1]
    several = context.state is None and bool(restarts.any())
    return Chain(counts, order, real if padded else None, positions if several else None)


def _all_visible(context: Context, real: Bool[Tensor, "batch time"], sequences: Int[Tensor, "batch time"]) -> bool:
    """Whether each token sees just what a recurrence shows it: all that came before it in its sequence."""
    visible = context.visible
    assert visible is not None
    if context.state is None:
        same = sequences[:, :, None] == sequences[:, None, :]
        looked_at = (real[:, :, None] & real[:, None, :]).tril()
        return bool(((visible == same) | ~looked_at).all())
    query, key = context.positions[:, :, None], context.key_positions[:, None, :]
    return bool((visible | (key < 0) | (key > query)).all())


def _not_a_chain() -> FormeryError:
    return FormeryError(
        "a recurrent layer can only read chains, each token at the position after the last and none hidden from "
        "later ones: give it no trees of drafts, and packed sequences with positions that begin at 0."
    )


class RecurrentState:
    """What a recurrent layer carries from token to token, and what it needs to go back.

    carried: after all tokens of each row. snapshot: the same after the first `folded[row]` of them.
    inputs: of the tokens since then, from which `advance` finds the way from the snapshot to any later point.
    reach: how many tokens before the latest pass can be taken back at least; all of that pass and all tokens can be
    in any case. The size depends on `reach` and on the length of the latest pass only.
    """

    def __init__(self, slots: Slots, carried: Carried, width: int, dtype: torch.dtype, advance: Advance, reach: int):
        batch, device = len(slots.used), slots.positions.device
        self.slots, self.advance, self.reach = slots, advance, reach
        self.carried, self.snapshot = carried, tuple(torch.zeros_like(one) for one in carried)
        self.inputs = torch.zeros(batch, 2 * reach, width, dtype=dtype, device=device)
        self.folded, self.lengths = [0] * batch, [0] * batch

    @property
    def logged(self) -> list[int]:
        """How many tokens of each row have come since the snapshot."""
        return [length - folded for length, folded in zip(self.lengths, self.folded, strict=True)]

    def append(self, inputs: Float[Tensor, "batch time inputs"], counts: Sequence[int], carried: Carried) -> None:
        """Takes in a pass: its inputs, of which the first counts[row] are tokens, and what is carried after them.

        Raises FormeryError where these are not the tokens after the last, or something failed half-way before.
        """
        lengths = [old + new for old, new in zip(self.lengths, counts, strict=True)]
        if lengths != self.slots.lengths:
            raise FormeryError(
                f"a recurrent layer has read {lengths} tokens where the state counts {self.slots.lengths}: tokens were "
                "left out or read twice, or something failed half-way before; begin a new state, and read each once."
            )
        self._reserve(inputs.shape[1])
        rows = torch.arange(len(inputs), device=inputs.device)[:, None]
        places = torch.arange(inputs.shape[1], device=inputs.device)
        self.inputs[rows, torch.tensor(self.logged, device=inputs.device)[:, None] + places] = inputs
        self.lengths, self.carried = lengths, carried

    def _reserve(self, time: int) -> None:
        """Makes room for the inputs of `time` tokens; where it is short, all but the last `reach` are folded.

        Room for twice the reach lets single steps fold once in `reach` tokens rather than each time.
        """
        capacity, logged = self.inputs.shape[1], self.logged
        wanted = self.reach + max(self.reach, time)
        drop = [max(0, count - self.reach) if max(logged) + time > wanted else 0 for count in logged]
        if any(drop):
            self.snapshot = self.advance(self.snapshot, *self._beginnings(self.inputs, drop))
            self.folded = [folded + count for folded, count in zip(self.folded, drop, strict=True)]
        if any(drop) or capacity != wanted:
            places = torch.arange(wanted, device=self.inputs.device)
            moved = torch.tensor(drop, device=self.inputs.device)[:, None] + places
            self.inputs = self.inputs.take_along_dim(moved.clamp(max=capacity - 1)[..., None], 1)

    @staticmethod
    def _beginnings(inputs: Tensor, counts: Sequence[int]) -> tuple[Tensor, Bool[Tensor, "batch time"]]:
        """The inputs of the first counts[row] tokens, and which of them these are."""
        places = torch.arange(max(counts), device=inputs.device)
        return inputs[:, : max(counts)], places < torch.tensor(counts, device=inputs.device)[:, None]

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.carried = tuple(one[rows] for one in self.carried)
        self.snapshot = tuple(one[rows] for one in self.snapshot)
        self.inputs = self.inputs[rows]
        self.folded = [self.folded[row] for row in rows.tolist()]
        self.lengths = [self.lengths[row] for row in rows.tolist()]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where that is further back than the snapshot, and not the very beginning."""
        for row, length in enumerate(lengths):
            if 0 < length < self.folded[row]:
                raise FormeryError(
                    f"row {row} cannot be taken back to {length} tokens: a recurrent layer has kept the way back "
                    f"to {self.folded[row]} of its {self.lengths[row]} only; give it a longer `reach`."
                )

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where tokens, not just padding, would be dropped."""
        if list(counts) != self.lengths:
            raise FormeryError(
                "a recurrent layer cannot drop single tokens of what it has read: drop none, or take the last ones "
                "back with `rollback`."
            )

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets tokens at positions from lengths[row] on."""
        shorter = [row for row, length in enumerate(lengths) if length < self.lengths[row]]
        if not shorter:
            return
        for row in shorter:
            self.lengths[row] = lengths[row]
            if lengths[row] < self.folded[row]:
                self.folded[row] = 0
                for one in self.snapshot:
                    one[row] = 0
        rows = torch.tensor(shorter, device=self.inputs.device)
        counts = [self.logged[row] for row in shorter]
        carried = tuple(one[rows] for one in self.snapshot)
        if any(counts):
            carried = self.advance(carried, *self._beginnings(self.inputs[rows], counts))
        self.carried = tuple(one.index_copy(0, rows, new) for one, new in zip(self.carried, carried, strict=True))

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to move: there are no slots."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: what is carried does not grow with the text."""

    def tensors(self) -> list[Tensor]:
        return [*self.carried, *self.snapshot, self.inputs]
