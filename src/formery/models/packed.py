"""Whole models on texts of unlike length without padding: a model's own parts, on packed rows (`parts/packed.py`)."""

from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.models.encoder import Encoder, Reader
from formery.models.encoder_decoder import EncoderDecoder
from formery.models.rewrite import rewritten
from formery.parts import Attention, CrossAttention, Embedding, Part
from formery.parts.native import using
from formery.parts.native.stack import plainly, run
from formery.parts.packed import Packed, PackedAttention, PackedContext, PackedCrossAttention

Whole = TypeVar("Whole", bound=Part)
Reading = Encoder | Decoder


def packable(model: Whole, kind: type[PackedAttention] = PackedAttention) -> Whole:
    """A twin of the model, with the very same weights, that runs packed texts too; the model itself if it is one.

    What it gives equals what padding gives to rounding; only dropout draws otherwise. A twin shares no weights that are
    sharded over processes. Raises FormeryError where a part looks at other tokens in a way that is not known, or the
    way in takes no tokens.
    """
    parts = list(model.modules())
    if any(isinstance(part, PackedAttention) for part in parts):
        return model
    for part in parts:
        strange = isinstance(part, Attention | CrossAttention) and type(part) not in (Attention, CrossAttention)
        if strange or (hasattr(part, "start") and not isinstance(part, Attention | Decoder)):
            raise FormeryError(f"{type(part).__name__} looks at other tokens in a way that packed texts do not know.")
        if isinstance(part, Encoder) and not isinstance(part.embedding, Embedding):
            raise FormeryError(f"{type(part.embedding).__name__} takes no tokens: only texts can be packed.")
    made = rewritten(model, Attention, lambda part, _: kind(part))
    if any(isinstance(part, CrossAttention) for part in parts):
        made = rewritten(made, CrossAttention, lambda part, _: PackedCrossAttention(part))
    return made


def encoded(
    model: Encoder,
    source: Int[Tensor, "batch time"],
    positions: Int[Tensor, "batch time"],
    types: Int[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "1 total width"], Packed]:
    """What the encoder makes of the tokens at positions of 0 and more; `Packed.unpack` pads it."""
    packed = Packed(positions)
    context = PackedContext(packed, None if types is None else packed.pack(types))
    return _behind(model, packed.pack(source), context), packed


def read(
    model: Reader,
    source: Int[Tensor, "batch time"],
    positions: Int[Tensor, "batch time"],
    types: Int[Tensor, "batch time"] | None = None,
) -> Tensor:
    """As `Reader.forward`, the head reading vectors that are padded with zeros."""
    hidden, packed = encoded(model.encoder, source, positions, types)
    found: Tensor = packed.unpack(hidden) if model.head is None else model.head(packed.unpack(hidden), positions)
    return found


def continued(
    model: Decoder, tokens: Int[Tensor, "batch time"], positions: Int[Tensor, "batch time"]
) -> tuple[Float[Tensor, "1 total width"], Packed]:
    """A decoder's last normed vectors, of which `model.logits` makes logits."""
    packed = Packed(positions)
    return _behind(model, packed.pack(tokens), PackedContext(packed)), packed


def translated(
    model: EncoderDecoder,
    source: Int[Tensor, "batch source"],
    tokens: Int[Tensor, "batch time"],
    source_positions: Int[Tensor, "batch source"],
    positions: Int[Tensor, "batch time"],
) -> tuple[Float[Tensor, "1 total width"], Packed]:
    """The decoder's last normed vectors; the encoder's are put in the decoder's order once, for all layers."""
    memory, read_from = encoded(model.encoder, source, source_positions)
    counts = (source_positions >= 0).sum(1).tolist()
    packed = Packed(positions, beside=counts)
    aligned = memory.index_select(1, read_from.rows_of(packed))
    context = PackedContext(packed, source=[counts[row] for row in packed.order], memory_hidden=aligned)
    return _behind(model.decoder, packed.pack(tokens), context), packed


def _behind(model: Reading, tokens: Int[Tensor, "1 total"], context: PackedContext) -> Float[Tensor, "1 total width"]:
    """The normed vectors behind all layers."""
    if not any(isinstance(part, PackedAttention) for part in model.layers.modules()):
        raise FormeryError("this model does not know packed texts: make it packable(model) first.")
    longest = max(context.packed.lengths)
    if model.max_length is not None and longest > model.max_length:
        raise FormeryError(f"a text of {longest} tokens is longer than this model takes ({model.max_length}).")
    if torch.is_grad_enabled():
        return plainly(model.layers, model.norm, model.embedding(tokens, context), context)
    with using(model.compiled):
        return run(model.layers, model.norm, model.embedding(tokens, context), context, None)
