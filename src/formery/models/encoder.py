"""An encoder reads a text, a picture or a recording in all directions; a head makes something of what it read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.conventions import Conventions
from formery.parts import Context, Embedding, Part, Patches, SpeechStem
from formery.parts.native import using
from formery.parts.native.mode import Compile
from formery.parts.native.stack import pieces, plainly, run

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
        self.compiled: Compile = "auto"

    def forward(
        self,
        source: Tensor,
        positions: Int[Tensor, "batch time"] | None = None,
        types: Int[Tensor, "batch time"] | None = None,
        known: Sequence[Any] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The normed vectors of the last layer.

        positions: of each place, -1 for padding. types: which of several texts a token is of, for models that ask.
        known: the layers as `pieces` has them, where somebody asked for them before.
        """
        even = positions is None
        if positions is None:
            positions = self.embedding.places(source)
        self.check_length(positions.shape[1] if even else int(positions.max()) + 1)
        context = Context(positions, even=even, types=types)
        if torch.is_grad_enabled():
            return plainly(self.layers, self.norm, self.embedding(source, context), context)
        with using(self.compiled):
            return run(self.layers, self.norm, self.embedding(source, context), context, known)

    def pieces(self) -> list[Any] | None:
        """The layers as the compiled kernels run them; None where they do not."""
        with using(self.compiled):
            return pieces(self.layers, self.norm, self.embedding.width)

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

    @torch.no_grad()
    def read(self, sources: Sequence[Any], batch: int = 32) -> list[Tensor]:
        """The result for each source, in order: texts, pairs of texts (tuples), token ids, or pictures.

        batch: how many at a time. A text longer than the model takes loses its end. Sources of like length share a
        batch, so that little is padded; a result does not depend on its neighbours but for rounding. Raises
        FormeryError for a text without tokens, and for token ids that are too many.
        """
        if isinstance(sources, str):
            raise FormeryError("read() takes a list of texts: put the one text into a list.")
        if batch < 1:
            raise FormeryError(f"a batch of {batch} reads nothing; give 1 or more.")
        made = [self._prepared(one) for one in sources]
        order = sorted(range(len(made)), key=lambda place: -len(made[place][0]))
        results: dict[int, Tensor] = {}
        device = next(self.parameters()).device
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            source, positions = self.encoder.embedding.collate([made[place][0] for place in places])
            types = _types([made[place] for place in places])
            out = self(source.to(device), *(None if one is None else one.to(device) for one in (positions, types)))
            for row, place in enumerate(places):
                padded = positions is not None and out.ndim == 3
                results[place] = out[row, positions[row] >= 0] if padded and positions is not None else out[row]
        return [results[place] for place in range(len(made))]

    def _prepared(self, source: Any) -> tuple[Any, list[int] | None]:
        """What the encoder takes, and for a pair which of the two each token is of."""
        types = None
        if isinstance(source, str) or _is_pair(source):
            if self.tokenizer is None:
                raise FormeryError("this model has no tokenizer: give texts as token ids.")
            if isinstance(source, str):
                source = self.tokenizer.prompt(source, self.max_length)
            else:
                source, types = self.tokenizer.pair(source[0], source[1], self.max_length)
        if len(source) == 0:
            raise FormeryError("a text without tokens cannot be read; leave it out.")
        return source, types


def _is_pair(source: Any) -> bool:
    return isinstance(source, tuple) and len(source) == 2 and all(isinstance(one, str) for one in source)


def _types(rows: Sequence[tuple[Any, list[int] | None]]) -> Int[Tensor, "batch time"] | None:
    """Which text each token is of, padded with zeros; None where no row is a pair."""
    if all(types is None for _, types in rows):
        return None
    told = [types or [0] * len(source) for source, types in rows]
    return nn.utils.rnn.pad_sequence([torch.tensor(one) for one in told], batch_first=True)
