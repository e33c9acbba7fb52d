"""A guide that is a decoder layer of its own: it attends to what it has read, and to what the model's encoder made."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.models.decoder import Decoder, memory_context
from formery.models.encoder_decoder import EncoderDecoder
from formery.models.guide import Attending
from formery.parts import (
    Attention,
    Context,
    CrossAttention,
    GatedMLP,
    Layer,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    State,
)


class SecondDecoder(Attending):
    """One layer and a norm.

    source: the width of the encoder's vectors, None for a model without an encoder.
    """

    def __init__(self, width: int, vocabulary: int, attention_heads: int, hidden: int, source: int | None):
        inner: list[Part] = [Attention(width, attention_heads, position=Rotary())]
        if source is not None:
            inner.append(CrossAttention(width, attention_heads, memory_width=source))
        inner.append(GatedMLP(width, hidden))
        super().__init__([Layer([PreNorm(RMSNorm(width), one) for one in inner])], RMSNorm(width))
        self.width, self.vocabulary, self.attention_heads = width, vocabulary, attention_heads
        self.hidden, self.source = hidden, source

    def over(
        self,
        entered: Float[Tensor, "batch time width"],
        positions: Int[Tensor, "batch time"],
        memory: Float[Tensor, "batch source width"] | None = None,
        memory_positions: Int[Tensor, "batch source"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The layer from scratch, on what it reads; position -1 is padding on either side."""
        context = Context(positions)
        if memory is not None:
            context.memory, context.memory_hidden = memory_context(positions, memory, memory_positions), memory
        return self._run(entered, context)

    def start_on(
        self,
        batch: int,
        capacity: int,
        memory: Float[Tensor, "batch source width"] | None,
        memory_positions: Int[Tensor, "batch source"] | None,
    ) -> State:
        """An empty state on what an encoder made."""
        state = self.start(batch, capacity)
        if memory is not None:
            state.memory_positions = memory_positions
            for part in self.layers.modules():
                if isinstance(part, CrossAttention):
                    state.layers[part, 0] = part.read(memory)
        return state


def encoded(model: Decoder | EncoderDecoder, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What a frozen model's encoder makes of a batch's sources, and its positions; None where it has no encoder."""
    if not isinstance(model, EncoderDecoder):
        return None, None
    with torch.no_grad():
        memory: Tensor = model.encoder(batch["source"], batch["source_positions"])
    return memory, batch["source_positions"]
