"""What to minimise: objectives are functions `(model, batch) -> loss`, a mean over the batch's targets."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], Tensor]

IGNORED = -100  # the target that cross_entropy leaves out


class Batches(Protocol):
    """The data of a run: `batch(index)` gives the same batch for the same index, so a run can resume."""

    def batch(self, index: int, /) -> Batch: ...


def targets(batch: Batch) -> Int[Tensor, "batch time"]:
    """The token after each token; IGNORED where that is padding (position -1) or begins a new segment."""
    following = batch["tokens"][:, 1:]
    if "positions" in batch:
        following = following.masked_fill(batch["positions"][:, 1:] < 0, IGNORED)
    if "segments" in batch:
        following = following.masked_fill(batch["segments"][:, 1:] != batch["segments"][:, :-1], IGNORED)
    return following


def target_count(batch: Batch) -> int:
    """How many targets the mean of an objective runs over; examples where a batch holds no tokens."""
    if "tokens" not in batch:
        return len(next(iter(batch.values())))
    return int((targets(batch) != IGNORED).sum())


def cross_entropy(
    logits: Float[Tensor, "batch time vocabulary"],
    target: Int[Tensor, "batch time"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """The mean cross entropy in nats over the targets that are not IGNORED, computed in float32."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing
    )


def next_token(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """A decoder's loss: the cross entropy of each next token.

    `batch`: `tokens` Int[batch length+1]; optionally `positions` (-1 is padding) and `segments` alike.
    """
    extra = {name: batch[name][:, :-1] for name in ("positions", "segments") if name in batch}
    return cross_entropy(model(batch["tokens"][:, :-1], **extra), targets(batch))


def translate(label_smoothing: float = 0.0) -> Objective:
    """An encoder-decoder's loss: the cross entropy of each next target token, given the source.

    `batch`: `source`, `source_positions` Int[batch source_time]; `tokens`, `positions` Int[batch length+1];
    position -1 is padding. Label smoothing as in "Attention Is All You Need" (2017), section 5.4.
    """

    def objective(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        logits = model(
            batch["source"],
            batch["tokens"][:, :-1],
            source_positions=batch["source_positions"],
            positions=batch["positions"][:, :-1],
        )
        return cross_entropy(logits, targets(batch), label_smoothing)

    return objective


def mean_loss(objective: Objective, batches: Iterable[Batch]) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for `train`: the objective's mean over all targets of held-out `batches`, as "loss"."""
    held_out = list(batches)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        total = 0.0
        for batch in held_out:
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            total += float(objective(model, here)) * target_count(batch)
        return {"loss": total / sum(map(target_count, held_out))}

    return evaluate
