"""An encoder reads a text, a picture or a recording in all directions; a head makes something of what it read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.conventions import Conventions
from formery.parts import Context, Embedding, Part, Patches, SpeechStem

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer

WayIn = Embedding | Patches | SpeechStem


class Encoder(Part):
    """Turns a source into a vector for each of its places; who sees whom is up to the masks of its layers.

    embedding: the way in, from tokens, pixels or frames of sound.
    """

    def __init__(
        self, embedding: WayIn, layers: Sequence[Part], norm: Part | None = None, max_length: int | None = None
    ):
        super().__init__()
        self.embedding, self.layers, self.norm = embedding, nn.ModuleList(layers), norm
        self.max_length = max_length

    def forward(
        self,
        source: Tensor,
        positions: Int[Tensor, "batch time"] | None = None,
        types: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The normed vectors of the last layer.

        positions: of each place, -1 for padding. types: which of several texts a token is of, for models that ask.
        """
        even = positions is None
        if positions is None:
            positions = self.embedding.places(source)
        self.check_length(positions.shape[1] if even else int(positions.max()) + 1)
        context = Context(positions, even=even, types=types)
        hidden = self.embedding(source, context)
        for layer in self.layers:
            hidden = layer(hidden, context)
        return hidden if self.norm is None else self.norm(hidden)

    def check_length(self, length: int) -> None:
        """FormeryError for a text that is longer than the encoder takes."""
        if self.max_length is not None and length > self.max_length:
            raise FormeryError(
                f"a prompt of {length} tokens is longer than this model takes ({self.max_length}); shorten it."
            )


class Reader(Part):
    """An encoder that stands alone, with what is made of its vectors: a class, a missing word, one vector for a text.

    head: called with the vectors and the positions (None where nothing is padded); without one the vectors
    themselves are the result. labels: the names of the classes, where there are such. preprocessor: how a picture
    becomes pixels, as published, where that is told; it is kept for others, pictures are given as tensors.
    """

    def __init__(self, encoder: Encoder, head: Part | None = None, labels: Sequence[str] | None = None):
        super().__init__()
        self.encoder, self.head, self.labels = encoder, head, labels
        self.tokenizer: Tokenizer | None = None
        self.conventions = Conventions()
        self.origin: str | None = None
        self.preprocessor: dict[str, Any] | None = None

    @property
    def max_length(self) -> int | None:
        """How many positions it takes."""
        return self.encoder.max_length

    def forward(
        self,
        source: Tensor,
        positions: Int[Tensor, "batch time"] | None = None,
        types: Int[Tensor, "batch time"] | None = None,
    ) -> Tensor:
        """What the head makes of the source; positions and types as in `Encoder`."""
        hidden = self.encoder(source, positions, types)
        result: Tensor = hidden if self.head is None else self.head(hidden, positions)
        return result

    @torch.inference_mode()
    def read(self, sources: Sequence[Any], batch: int = 32) -> list[Tensor]:
        """The result for each source (texts, token ids, pictures), as many at a time as `batch` says.

        A text longer than the model takes loses its end. Sources of like length share a batch, so that little is
        padded; a result does not depend on its neighbours but for rounding.
        """
        made = [self._prepared(one) for one in sources]
        order = sorted(range(len(made)), key=lambda place: -len(made[place]))
        results: dict[int, Tensor] = {}
        device = next(self.parameters()).device
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            source, positions = self.encoder.embedding.collate([made[place] for place in places])
            out = self(source.to(device), None if positions is None else positions.to(device))
            for row, place in enumerate(places):
                padded = positions is not None and out.ndim == 3
                results[place] = out[row, positions[row] >= 0] if padded and positions is not None else out[row]
        return [results[place] for place in range(len(made))]

    def _prepared(self, source: Any) -> Any:
        if not isinstance(source, str):
            return source
        if self.tokenizer is None:
            raise FormeryError("this model has no tokenizer: give texts as token ids.")
        tokens = self.tokenizer.prompt(source)
        if self.max_length is not None and len(tokens) > self.max_length:
            last = tokens[-1:] if self.tokenizer.wraps else []
            tokens = [*tokens[: self.max_length - len(last)], *last]
        return tokens
