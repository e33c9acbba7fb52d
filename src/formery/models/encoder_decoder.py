"""An encoder reads a text (or a recording); a decoder writes another, looking at what was read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.models.conventions import Conventions
from formery.models.decoder import Decoder
from formery.models.encoder import Encoder
from formery.parts import CrossAttention, Embedding, Part, State
from formery.parts.native import using
from formery.parts.native.mode import Compile
from formery.parts.native.stack import exact

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer

Source = Sequence[int] | Tensor

class EncoderDecoder(Part):
    """Writes a text that answers another one, such as its translation.

    start_token: what the decoder reads first. prefix: what it reads next before it writes (a language, a task).
    preprocessor: how a recording becomes features, as published, where that is told.
    """

    reads_apart = True

    def __init__(self, encoder: Encoder, decoder: Decoder, start_token: int, prefix: Sequence[int] = ()):
        super().__init__()
        self.encoder, self.decoder, self.start_token, self.prefix = encoder, decoder, start_token, tuple(prefix)
        self.tokenizer: Tokenizer | None = None
        self.conventions = Conventions()
        self.origin: str | None = None
        self.preprocessor: dict[str, Any] | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the decoder knows."""
        return self.decoder.vocabulary

    @property
    def max_length(self) -> int | None:
        """How many positions the decoder takes."""
        return self.decoder.max_length

    @property
    def compiled(self) -> Compile:
        """How passes are computed: by the fast kernels, or not."""
        return self.decoder.compiled

    @property
    def embedding(self) -> Embedding:
        """The decoder's way in."""
        return self.decoder.embedding

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
        return self.decoder.logits(hidden)

    def begin(self, prompts: Sequence[Source], capacity: int, keep: bool = False) -> tuple[State, list[list[int]]]:
        """Encodes these prompts into a fresh state; each row has then to read the start token and the prefix.

        keep: leaves what the encoder made in the state, as `encoded`.
        """
        for prompt in prompts:
            if len(prompt) == 0:
                raise FormeryError("a prompt is empty: give this model a text to read.")
            if not isinstance(prompt, Tensor):
                self.encoder.check_length(len(prompt))
        device = self.decoder.embedding.weight.device
        way_in: Any = self.encoder.embedding
        source, positions = way_in.collate(prompts)
        positions = None if positions is None else positions.to(device)
        known = self.encoder.pieces()
        memory = self.encoder(source.to(device), positions, known=known)
        state = self.decoder.start(len(prompts), capacity)
        exactly = state.exact and exact(known) and isinstance(way_in, Embedding)
        everywhere = torch.arange(memory.shape[1], device=device).repeat(len(prompts), 1)
        state.memory_positions = everywhere if positions is None else positions
        state.encoded = memory if keep else None
        with using(self.decoder.compiled):
            for part in self.decoder.modules():
                if isinstance(part, CrossAttention):
                    state.layers[part, 0] = part.read(memory)
        state.vouch(exactly)
        return state, [[self.start_token, *self.prefix] for _ in prompts]

    def logits(
        self, hidden: Float[Tensor, "batch time width"], state: State | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """What the output makes of the decoder's last vectors. state: that they were read into, if any."""
        return self.decoder.logits(hidden, state)

    def guessed(
        self, hidden: Float[Tensor, "batch time width"], state: State | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """As `Decoder.guessed`."""
        return self.decoder.guessed(hidden, state)

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
