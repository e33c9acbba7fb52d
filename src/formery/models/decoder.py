"""A decoder: embedding, layers, norm, output; alone a language model, with a memory half of an encoder-decoder."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.conventions import Conventions
from formery.parts import Context, Embedding, Part, State
from formery.parts.native import using
from formery.parts.native.mode import Compile
from formery.parts.native.stack import exact, guessed, logits, out, pieces, plainly, run
from formery.parts.state import Remembering

if TYPE_CHECKING:
    from formery.data.tokenizer import Tokenizer


class Decoder(Part):
    """Predicts each next token from those before it.

    norm: after the last layer, if any. max_length: how many positions it takes, None where nothing bounds it.
    reads_apart: whether a prompt is read by an encoder, apart from the text that is written.
    """

    reads_apart = False

    def __init__(
        self,
        embedding: Embedding,
        layers: Sequence[Part],
        norm: Part | None,
        output: Part,
        max_length: int | None = None,
    ):
        super().__init__()
        self.embedding, self.layers, self.norm, self.output = embedding, nn.ModuleList(layers), norm, output
        self.max_length = max_length
        self.tokenizer: Tokenizer | None = None
        self.conventions = Conventions()
        self.origin: str | None = None
        self.compiled: Compile = "auto"

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self.embedding.vocabulary

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits from scratch.

        positions: of each token, -1 for padding; by default 0, 1, 2, … (in each segment).
        segments: which of several packed sequences a token belongs to; they do not see each other.
        """
        return self.logits(self.hidden(tokens, positions, segments))

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        memory: Float[Tensor, "batch source width"] | None = None,
        memory_positions: Int[Tensor, "batch source"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The last layer's normed vectors from scratch, reading `memory` where there is cross-attention."""
        batch, time = tokens.shape
        visible: Bool[Tensor, "batch time time"] | None = None
        even = positions is None and segments is None
        if positions is None:
            positions = torch.arange(time, device=tokens.device).expand(batch, time)
            if segments is not None:
                positions = positions_in_segments(segments)
        if segments is not None:
            visible = segments[:, :, None] == segments[:, None, :]
        context = Context(positions, visible=visible, even=even)
        if memory is not None:
            context.memory, context.memory_hidden = memory_context(positions, memory, memory_positions), memory
        self._check_length(time if even else int(positions.max()) + 1)
        return self._run(tokens, context)

    def begin(
        self, prompts: Sequence[Sequence[int] | Tensor], capacity: int, keep: bool = False
    ) -> tuple[State, list[list[int]]]:
        """An empty state for these prompts, and the tokens that each row has still to read: its prompt.

        keep: what is left of an encoder; there is none here.
        """
        for prompt in prompts:
            if len(prompt) == 0:
                raise FormeryError("a prompt is empty: this model continues a text, so give it at least one token.")
            self._check_length(len(prompt))
        return self.start(len(prompts), capacity), [[int(token) for token in prompt] for prompt in prompts]

    def start(self, batch: int, capacity: int) -> State:
        """An empty state with room for `capacity` tokens in each of `batch` rows (it grows if need be)."""
        state = State(batch, capacity, self.embedding.weight.device)
        turns: Counter[Remembering] = Counter()
        for _, part in self.layers.named_modules(remove_duplicate=False):
            if hasattr(part, "start"):
                remembering = cast(Remembering, part)
                state.of(remembering, turns[remembering])
                turns[remembering] += 1
        with using(self.compiled):
            state.pieces = pieces(self.layers, self.norm, self.embedding.width)
            state.out = out(self.output, self.embedding.width)
        state.vouch(exact(state.pieces) and state.out is not None)
        return state

    def logits(
        self, hidden: Float[Tensor, "batch time width"], state: State | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """What the output makes of the last normed vectors. state: that they were read into, if any."""
        if torch.is_grad_enabled():
            return cast(Tensor, self.output(hidden))
        with using(self.compiled):
            return logits(self.output, hidden, None if state is None else state.out)

    def guessed(
        self, hidden: Float[Tensor, "batch time width"], state: State | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """As `logits`, where it need not be exact: of vectors that are guesses themselves."""
        with using(self.compiled):
            return guessed(self.output, hidden, None if state is None else state.out)

    def step(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Reads more tokens of each row into `state`; logits after each of them.

        positions: -1 pads rows that have fewer tokens (roll back afterwards to drop the padding).
        visible: restricts which of the filled slots each token sees, besides the masks of the layers.
        """
        return self.logits(self.read(tokens, state, positions, visible), state)

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """As `step`, but stops before the output: the last layer's normed vectors."""
        return self._run(tokens, self.context(tokens.shape[1], state, positions, visible))

    def context(
        self,
        time: int,
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Context:
        """What a pass over the next `time` tokens of each row knows; they have then their slots in `state`."""
        slots = state.slots
        self._check_length(max(slots.lengths) + time if positions is None else int(positions.max()) + 1)
        state.reserve(time)
        even = positions is None and slots.even
        at = slots.extend(positions, time)
        context = Context(at, slots.positions[:, : slots.filled], visible, even=even, state=state)
        if state.memory_positions is not None:
            context.memory = memory_context(at, None, state.memory_positions)
        return context

    def _run(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        if torch.is_grad_enabled():
            return plainly(self.layers, self.norm, self.embedding(tokens, context), context)
        with using(self.compiled):
            hidden = self.embedding(tokens, context)
            return run(self.layers, self.norm, hidden, context, None if context.state is None else context.state.pieces)

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise FormeryError(
                f"{length} tokens are more than this model takes ({self.max_length}); "
                "shorten the prompt or ask for fewer new tokens."
            )


def memory_context(
    positions: Int[Tensor, "batch time"],
    memory: Float[Tensor, "batch source width"] | None,
    memory_positions: Int[Tensor, "batch source"] | None,
) -> Context:
    """What cross-attention knows: queries at `positions`, keys at `memory_positions` (-1: padding)."""
    if memory_positions is None:
        assert memory is not None
        memory_positions = torch.arange(memory.shape[1], device=memory.device).expand(memory.shape[:2])
    return Context(positions, memory_positions, full=bool((memory_positions >= 0).all()))


def positions_in_segments(segments: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """0, 1, 2, … anew at each change of segment."""
    time = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.zeros_like(segments)
    starts[:, 1:] = torch.where(segments[:, 1:] != segments[:, :-1], time[:, 1:], 0)
    return time - starts.cummax(1).values
