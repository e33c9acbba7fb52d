"""The objectives `next_token` and `translate` of texts without padding (`models/packed.py`), equal to rounding."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models import Decoder, EncoderDecoder
from formery.models.packed import continued, translated
from formery.parts.packed import Packed
from formery.train.objective import IGNORED, Batch, Objective, targets


def packed_next_token(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The objective `next_token` of texts of unlike length, without padding.

    `batch`: `tokens`, `positions` Int[batch length+1]; position -1 is padding.
    """
    if "segments" in batch or "positions" not in batch:
        raise FormeryError("batches that are packed give the positions of each text, and no segments.")
    hidden, packed = continued(cast(Decoder, model), batch["tokens"][:, :-1], batch["positions"][:, :-1])
    return _loss(cast(Decoder, model), hidden, packed, batch)


def packed_translate(label_smoothing: float = 0.0) -> Objective:
    """The objective `translate` without padding; batches as there."""

    def objective(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        whole = cast(EncoderDecoder, model)
        sides = (batch["source"], batch["tokens"][:, :-1], batch["source_positions"], batch["positions"][:, :-1])
        hidden, packed = translated(whole, *sides)
        return _loss(whole.decoder, hidden, packed, batch, label_smoothing)

    return objective


def _loss(model: Decoder, hidden: Tensor, packed: Packed, batch: Batch, smoothing: float = 0.0) -> Float[Tensor, ""]:
    """The mean cross entropy in nats; the output runs where there is a target, and nowhere else."""
    following = packed.pack(targets(batch))
    due = following[0] != IGNORED
    logits = model.logits(hidden[:, due])
    return nn.functional.cross_entropy(logits[0].float(), following[0, due], label_smoothing=smoothing)
