"""An encoder reads a text in both directions; a decoder writes another, looking at what was read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.parts import Context, CrossAttention, Embedding, Part, State

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer


class Encoder(Part):
    """Turns a text into a vector for each token; who sees whom is up to the masks of its layers."""

    def __init__(
        self, embedding: Embedding, layers: Sequence[Part], norm: Part | None = None, max_length: int | None = None
    ):
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm
        self.max_length = max_length

    def forward(
        self, tokens: Int[Tensor, "batch time"], positions: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time width"]:
        """The normed vectors of the last layer; position -1 marks padding."""
        even = positions is None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        self.check_length(tokens.shape[1] if even else int(positions.max()) + 1)
        context = Context(positions, even=even)
        hidden = self.embedding(tokens, context)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return hidden if self.norm is None else self.norm(hidden)

    def check_length(self, length: int) -> None:
        """FormeryError for a text that is longer than the encoder takes."""
        if self.max_length is not None and length > self.max_length:
            raise FormeryError(
                f"a prompt of {length} tokens is longer than this model takes ({self.max_length}); shorten it."
            )


class EncoderDecoder(Part):
    """Writes a text that answers another one, such as its translation.

    start_token: what the decoder reads first.
    """

    reads_apart = True

    def __init__(self, encoder: Encoder, decoder: Decoder, start_token: int):
        super().__init__()
        self.encoder, self.decoder, self.start_token = encoder, decoder, start_token
        self.tokenizer: Tokenizer | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the decoder knows."""
        return self.decoder.vocabulary

    @property
    def max_length(self) -> int | None:
        """How many positions the decoder takes."""
        return self.decoder.max_length

    @property
    def output(self) -> Part:
        """The way from the decoder's vectors to logits."""
        return self.decoder.output

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch time"],
        source_positions: Int[Tensor, "batch source"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits from scratch; position -1 marks padding on either side."""
        memory = self.encoder(source, source_positions)
        hidden = self.decoder.hidden(tokens, positions, memory=memory, memory_positions=source_positions)
        return self.decoder.output(hidden)

    def begin(self, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[State, list[list[int]]]:
        """Encodes these prompts into a fresh state; each row has then to read the start token."""
        for prompt in prompts:
            if not prompt:
                raise FormeryError("a prompt is empty: give this model a text to read.")
            self.encoder.check_length(len(prompt))
        device = self.decoder.embedding.weight.device
        longest = max(len(prompt) for prompt in prompts)
        source = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        positions = torch.arange(longest, device=device).expand(source.shape)
        positions = positions.masked_fill(positions >= lengths[:, None], -1)
        ragged = bool((lengths != longest).any())
        memory = self.encoder(source, positions if ragged else None)
        state = self.decoder.start(len(prompts), capacity)
        state.memory_positions = positions
        for part in self.decoder.modules():
            if isinstance(part, CrossAttention):
                state.layers[part, 0] = part.read(memory)
        return state, [[self.start_token] for _ in prompts]

    def step(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Tensor | None = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Reads more tokens of each row into `state`; logits after each of them (as `Decoder.step`)."""
        return self.decoder.step(tokens, state, positions, visible)

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Tensor | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """As `step`, but stops before the output: the decoder's last normed vectors."""
        return self.decoder.read(tokens, state, positions, visible)
