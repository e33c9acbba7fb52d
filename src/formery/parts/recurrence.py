"""What recurrent layers share: a state that can be taken back.

A recurrent state holds what became of all tokens, not the tokens, so none can be taken out of it. It goes back by
going forward again: from a copy of how it was some tokens ago, over the inputs of those that stay. For a tree of drafts
it does not go forward at all: their inputs are kept until it is said which path stays, which is then gone along.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.state import Slots

Carried = tuple[Tensor, ...]
Advance = Callable[[Carried, Float[Tensor, "batch time inputs"], Bool[Tensor, "batch time"] | None], Carried]


class RecurrentState:
    """What a recurrent layer carries from token to token, and what it needs to go back.

    carried: after all tokens of each row. snapshot: the same after the first `folded[row]` of them.
    inputs: of the tokens since then, from which `advance` finds the way from the snapshot to any later point.
    reach: how many tokens before the latest pass can be taken back at least; all of that pass and all tokens can be
    in any case. The size depends on `reach` and on the length of the latest pass only. latest: how many tokens of that
    pass each row has taken in. forked: whether it was a tree, of which no path has been chosen: until then `carried` is
    what was carried before it, and `lengths` count the deepest branch.
    """

    def __init__(self, slots: Slots, carried: Carried, width: int, dtype: torch.dtype, advance: Advance, reach: int):
        batch, device = len(slots.used), slots.positions.device
        self.slots, self.advance, self.reach = slots, advance, reach
        self.carried, self.snapshot = carried, tuple(torch.zeros_like(one) for one in carried)
        self.inputs = torch.zeros(batch, 2 * reach, width, dtype=dtype, device=device)
        self.folded, self.lengths, self.latest = [0] * batch, [0] * batch, [0] * batch
        self.forked = False

    @property
    def logged(self) -> list[int]:
        """How many tokens of each row have come since the snapshot."""
        return [length - folded for length, folded in zip(self.lengths, self.folded, strict=True)]

    def append(
        self, inputs: Float[Tensor, "batch time inputs"], counts: Sequence[int], carried: Carried | None
    ) -> None:
        """Takes in a pass: its inputs, of which the first counts[row] are tokens, and what is carried after them.

        carried: None where they are a tree, of which counts[row] tokens are the deepest branch. Raises FormeryError
        where these are not the tokens after the last, or something failed half-way before.
        """
        if self.forked:
            raise FormeryError("a recurrent layer has read a tree of drafts: say by `settle` which path of it stays.")
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
        self.lengths, self.latest = lengths, list(counts)
        if carried is None:
            self.forked = True
        else:
            self.carried = carried

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
        self.latest = [self.latest[row] for row in rows.tolist()]

    @property
    def before(self) -> list[int]:
        """How many tokens each row had read before the latest pass."""
        return [length - latest for length, latest in zip(self.lengths, self.latest, strict=True)]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where that is further back than the snapshot, and not the very beginning."""
        if self.forked and any(length > before for length, before in zip(lengths, self.before, strict=True)):
            raise FormeryError(
                "a recurrent layer has read a tree of drafts: say by `settle` which path of it stays, or take all of "
                "it back."
            )
        for row, length in enumerate(lengths):
            if 0 < length < self.folded[row]:
                raise FormeryError(
                    f"row {row} cannot be taken back to {length} tokens: a recurrent layer has kept the way back "
                    f"to {self.folded[row]} of its {self.lengths[row]} only; give it a longer `reach`."
                )

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where tokens, not just padding, would be dropped."""
        if self.forked or list(counts) != self.lengths:
            raise FormeryError(
                "a recurrent layer cannot drop single tokens of what it has read: drop none, or take the last ones "
                "back with `rollback`."
            )

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets tokens at positions from lengths[row] on."""
        before = self.before
        if self.forked:
            self.lengths, self.forked = before, False
        shorter = [row for row, length in enumerate(lengths) if length < self.lengths[row]]
        if not shorter:
            return
        for row in shorter:
            self.lengths[row] = lengths[row]
            if lengths[row] < self.folded[row]:
                self.folded[row] = 0
                for one in self.snapshot:
                    one[row] = 0
        self.latest = [max(0, length - start) for length, start in zip(self.lengths, before, strict=True)]
        rows = torch.tensor(shorter, device=self.inputs.device)
        counts = [self.logged[row] for row in shorter]
        carried = tuple(one[rows] for one in self.snapshot)
        if any(counts):
            carried = self.advance(carried, *self._beginnings(self.inputs[rows], counts))
        self.carried = tuple(one.index_copy(0, rows, new) for one, new in zip(self.carried, carried, strict=True))

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Raises FormeryError where what was read was a chain, and a path is not its beginning."""
        if not self.forked and any(list(path) != list(range(len(path))) for path in paths):
            raise FormeryError(
                "a recurrent layer has read the latest tokens as a chain, so it can keep only the first of them."
            )

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Forgets what of the latest pass is not on the paths; where it was a tree, goes along them."""
        before = self.before
        lengths = [old + len(path) for old, path in zip(before, paths, strict=True)]
        if not self.forked:
            self.rollback(lengths)
            return
        device, longest = self.inputs.device, max(len(path) for path in paths)
        start = torch.tensor([[one - fold] for one, fold in zip(before, self.folded, strict=True)], device=device)
        padded = torch.tensor([[*path, *[0] * (longest - len(path))] for path in paths], device=device)
        inputs = self.inputs.take_along_dim((start + padded)[..., None], 1)
        rows, places = torch.arange(len(paths), device=device)[:, None], torch.arange(longest, device=device)
        self.inputs[rows, start + places] = inputs
        counts = [len(path) for path in paths]
        if longest:
            self.carried = self.advance(self.carried, *self._beginnings(inputs, counts))
        self.lengths, self.latest, self.forked = lengths, counts, False

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to move: there are no slots."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: what is carried does not grow with the text."""

    def tensors(self) -> list[Tensor]:
        return [*self.carried, *self.snapshot, self.inputs]
