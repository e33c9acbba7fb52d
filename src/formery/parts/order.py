"""In which order recurrent layers read the tokens of a pass: one after the other, or along the branches of a tree."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.context import Context


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

    Raises FormeryError where the tokens do not follow one another: a tree of drafts (`tree` tells whether it is one),
    hidden or missing tokens.
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
        "later ones, and into a state also trees, each token seeing the text and its own branch: give packed "
        "sequences positions that begin at 0."
    )


@dataclass(frozen=True)
class Tree:
    """The tokens of a pass that branch, each row's behind what its state has read.

    ancestors: which tokens lie on the way to each, itself included. parents: the place of the token before each, -1
    for the last one of the text. real: False at padding. depths: how many tokens the deepest branch of each row has.
    """

    ancestors: Bool[Tensor, "batch time time"]
    parents: Int[Tensor, "batch time"]
    real: Bool[Tensor, "batch time"]
    depths: list[int]

    def windows(self, kernel: int) -> Int[Tensor, "batch time kernel"]:
        """Each token and the kernel - 1 before it on its branch, itself first, as places behind kernel - 1 earlier."""
        batch, time = self.parents.shape
        earlier = torch.arange(kernel - 1, device=self.parents.device)
        before = torch.cat(((earlier - 1).clamp(min=0).expand(batch, -1), kernel - 1 + self.parents), 1)
        places = [torch.arange(kernel - 1, kernel - 1 + time, device=self.parents.device).expand(batch, -1)]
        for _ in range(kernel - 1):
            places.append(before.gather(1, places[-1]))
        return torch.stack(places, -1)


def tree(context: Context) -> Tree | None:
    """How the tokens of this pass branch; None where they do not, so that they are a chain.

    Raises FormeryError where they are neither.
    """
    return context.once("tree", lambda: _tree(context))


def _tree(context: Context) -> Tree | None:
    state, visible, positions = context.state, context.visible, context.positions
    if state is None or visible is None:
        return None
    real, time = positions >= 0, positions.shape[1]
    if _all_visible(context, real, (positions == 0).cumsum(1)):
        return None
    slots = torch.arange(visible.shape[2], device=visible.device)
    start = torch.tensor(state.slots.start, device=visible.device)[:, None]
    text = (slots < start) & (context.key_positions >= 0)
    if not bool((visible | ~text[:, None] | ~real[..., None]).all()):
        raise _not_a_chain()
    places = torch.arange(time, device=visible.device)
    own = visible.take_along_dim((start + places)[:, None].expand(-1, time, -1), 2)
    ancestors = own & (positions[:, None] <= positions[..., None]) & real[:, None] & real[..., None]
    # Above each token lies one branch: as many as its depth tells, and all but itself are those above its parent.
    before = ancestors & (positions[:, None] == positions[..., None] - 1)
    parents = torch.where(before.any(-1), before.int().argmax(-1), -1)
    depths = positions - torch.where(real, positions, positions.amax() + 1).amin(1, keepdim=True) + 1
    itself = torch.eye(time, dtype=torch.bool, device=visible.device)
    above = ancestors.take_along_dim(parents.clamp(min=0)[..., None], 1) & (parents >= 0)[..., None]
    branches = (ancestors == (above | itself)).all(-1) & (ancestors.sum(-1) == depths)
    if not bool((branches | ~real).all()):
        raise _not_a_chain()
    return Tree(ancestors, parents, real, depths.where(real, depths.new_zeros(())).amax(1).tolist())
