"""A guide: a small network that guesses what one frozen model would write, from that model's own vectors."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.models.conventions import Conventions
from formery.models.decoder import memory_context
from formery.parts import Context, Linear, Part, State
from formery.parts.native.program import Unfit
from formery.parts.native.stack import activated, entry, pieces, plainly, run, usable
from formery.parts.state import Remembering

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer


class Guide(Part):
    """The base of all guides: parts that were trained on a frozen model and are of use with that one only.

    width, vocabulary: of the model's vectors and tokens. A guide has no output of its own: it makes vectors, of which
    the model's own output makes logits. On disk it is a checkpoint like a model's.
    """

    width: int
    vocabulary: int

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: Tokenizer | None = None
        self.conventions = Conventions()


class Attending(Guide):
    """A guide whose layers attend to the whole text, with a decode state of their own.

    At each token it reads the model's vector there and the embedding of the token after it, and makes of them a guess
    of the model's next vector; of its own guesses it can go on in the same way. fuse: the map of both to what the
    layers read. first: `silu(first ·)` is done to the embedding before, where it is not None.
    """

    fuse: Linear

    def __init__(self, layers: Sequence[Part], norm: Part | None):
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm
        self.first: Linear | None = None

    def enter(
        self, vectors: Float[Tensor, "batch time width"], embedded: Float[Tensor, "batch time embedded"]
    ) -> Float[Tensor, "batch time width"]:
        """What the layers read: a vector of the model's (or a guess of it), and the token after it."""
        beside = embedded if self.first is None else nn.functional.silu(self.first(embedded))
        return self.fuse(torch.cat((vectors, beside), -1))

    def forward(
        self,
        vectors: Float[Tensor, "batch time width"],
        embedded: Float[Tensor, "batch time embedded"],
        positions: Int[Tensor, "batch time"],
        visible: Bool[Tensor, "batch time time"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Guesses of the model's next vectors, from scratch; position -1 is padding."""
        return self._run(self.enter(vectors, embedded), Context(positions, visible=visible))

    def start(self, batch: int, capacity: int) -> State:
        """An empty state."""
        state = State(batch, capacity, next(self.parameters()).device)
        turns: Counter[Remembering] = Counter()
        for _, part in self.layers.named_modules(remove_duplicate=False):
            if hasattr(part, "start"):
                remembering = cast(Remembering, part)
                state.of(remembering, turns[remembering])
                turns[remembering] += 1
        state.pieces = pieces(self.layers, self.norm, self.width)
        if state.pieces is not None and type(self).enter is Attending.enter:
            state.entry = entry(self.layers, self.norm, self.width, self.fuse, self.first)
        return state

    def read(
        self,
        vectors: Float[Tensor, "batch time width"],
        embedded: Float[Tensor, "batch time embedded"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """As `forward`, behind what `state` has read, and into it (positions and visible as in `Decoder.step`)."""
        if state.entry is None or not usable(vectors):
            return self.attend(self.enter(vectors, embedded), state, positions, visible)
        context = self._context(state, vectors.shape[1], positions, visible)
        try:
            found: Tensor = state.entry.run(vectors, context, embedded)
        except Unfit:
            return self._run(self.enter(vectors, embedded), context)
        return found

    def attend(
        self,
        entered: Float[Tensor, "batch time width"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The layers alone, on what they read."""
        return self._run(entered, self._context(state, entered.shape[1], positions, visible))

    def _context(self, state: State, time: int, positions: Tensor | None, visible: Tensor | None) -> Context:
        """Takes the next slots of each row, and says what the tokens in them see."""
        slots = state.slots
        state.reserve(time)
        even = positions is None and slots.even
        at = slots.extend(positions, time)
        context = Context(at, slots.positions[:, : slots.filled], visible, even=even, state=state)
        if state.memory_positions is not None:
            context.memory = memory_context(at, None, state.memory_positions)
        return context

    def _run(self, hidden: Tensor, context: Context) -> Float[Tensor, "batch time width"]:
        if torch.is_grad_enabled():
            return plainly(self.layers, self.norm, hidden, context)
        return run(self.layers, self.norm, hidden, context, None if context.state is None else context.state.pieces)


class Heads(Part):
    """`x + silu(W_i r + b_i)` for each depth i, all in one product; r is what the heads read, by default x itself.

    reads: the width of r.
    """

    def __init__(self, width: int, depths: int, reads: int | None = None):
        super().__init__()
        self.width, self.depths, self.reads = width, depths, reads
        self.map = Linear(reads or width, depths * width, bias=True, gain=0.1)

    def forward(
        self, vectors: Float[Tensor, "place width"], read: Float[Tensor, "place reads"] | None = None
    ) -> Float[Tensor, "place depth width"]:
        return from_heads(self.map, vectors, vectors if read is None else read)


def from_heads(
    linear: Linear, vectors: Float[Tensor, "place width"], read: Float[Tensor, "place reads"]
) -> Float[Tensor, "place depth width"]:
    """`vectors + silu(linear(read))`, the outputs of the map being those of all depths."""
    update = nn.functional.silu(linear(read)) if torch.is_grad_enabled() else activated(linear, read, "silu")
    return vectors[:, None] + update.unflatten(-1, (-1, vectors.shape[-1]))
