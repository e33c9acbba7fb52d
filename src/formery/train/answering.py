"""The objective and the evaluation of a model that learns text and answers questions on it."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.train.objective import IGNORED, Batch, cross_entropy


def answering(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """`loss(text) + loss(answers)`: rows without questions count as text, of the others only the answers count.

    `batch`: `tokens` Int[batch length+1], `answers` Bool[batch length+1].
    """
    logits, following, due = model(batch["tokens"][:, :-1]), batch["tokens"][:, 1:], batch["answers"][:, 1:]
    asked = due.any(-1)
    losses = []
    if not asked.all():
        losses.append(cross_entropy(logits[~asked], following[~asked]))
    if asked.any():
        losses.append(cross_entropy(logits[asked], following[asked].masked_fill(~due[asked], IGNORED)))
    return torch.stack(losses).sum()


def answers_and_text(batches: Iterable[Batch]) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation for `train`: "loss" of text, in nats a token, and "answered", the share of answer tokens that the
    model finds likeliest where it is given those before them."""
    held_out = list(batches)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        device, cost, tokens, right, asked = next(model.parameters()).device, 0.0, 0, 0, 0
        for batch in held_out:
            here = {name: tensor.to(device) for name, tensor in batch.items()}
            logits, following, due = model(here["tokens"][:, :-1]), here["tokens"][:, 1:], here["answers"][:, 1:]
            plain = ~due.any(-1)
            if plain.any():
                cost += float(cross_entropy(logits[plain], following[plain])) * following[plain].numel()
                tokens += following[plain].numel()
            right += int((logits.argmax(-1) == following)[due].sum())
            asked += int(due.sum())
        return {"loss": cost / max(1, tokens), "answered": right / max(1, asked)}

    return evaluate
