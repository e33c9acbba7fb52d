"""Models that read beyond a decoder's window: the text behind it in chunks, and the decoder itself for what is near."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.parts import Context, Embedding, Part, Slots, State
from formery.parts.attention import Attention
from formery.parts.chunks import Chunks, Kept
from formery.parts.steered import Mix, steerable, through


@dataclass
class Seen:
    """What is known of some texts of one length: `start` tokens are past, the others stand before the decoder.

    near: keys and values of the latter.
    """

    start: int
    near: Kept

    def cut(self, length: int) -> Self:
        """The same with so many tokens behind the past."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return self.near.tensors()


class Reading:
    """What a model that reads beyond its window remembers: the tokens of each row, and what it has made of them.

    Rows are read one by one, since each may stand at another place of its chunk.
    """

    def __init__(self, slots: Slots) -> None:
        device, batch = slots.positions.device, len(slots.used)
        self.tokens = [torch.empty(0, dtype=torch.long, device=device) for _ in range(batch)]
        self.seen: list[Seen | None] = [None] * batch
        self.before = [0] * batch  # how many tokens there were before the latest pass

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has read."""
        return [len(row) for row in self.tokens]

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        chosen = rows.tolist()
        self.tokens = [self.tokens[row] for row in chosen]
        self.seen = [self.seen[row] for row in chosen]
        self.before = [self.before[row] for row in chosen]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can always be done."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where tokens, not just padding, would be dropped."""
        if list(counts) != self.lengths:
            raise FormeryError("a text that is read in chunks cannot lose single tokens; take the last ones back.")

    def rollback(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            if length < len(self.tokens[row]):
                self.tokens[row] = self.tokens[row][:length]
                seen = self.seen[row]
                # What was made of a past that is taken back must not serve for another one.
                self.seen[row] = None if seen is None or length < seen.start else seen.cut(length - seen.start)
                self.before[row] = min(self.before[row], length)

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Raises FormeryError where a path is not the beginning of what was read."""
        if any(list(path) != list(range(len(path))) for path in paths):
            raise FormeryError("a text that is read in chunks was read as a chain, so it can keep only its beginning.")

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        self.rollback([before + len(path) for before, path in zip(self.before, paths, strict=True)])

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to move: tokens lie in their order."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: room is made as tokens come."""

    def tensors(self) -> list[Tensor]:
        return [*self.tokens, *(tensor for seen in self.seen if seen is not None for tensor in seen.tensors())]


class Beyond(Decoder):
    """A decoder, unchanged, that sees `near` chunks at a time, and whatever a method makes of the chunks before.

    A text within the window is the decoder's own business. Subclasses say what is made of the past (`opened`) and how
    tokens are read on top of it (`advance`). Trees of drafts and packed segments are not for it.
    """

    def __init__(self, decoder: Decoder, window: int, chunk: int, near: int):
        Part.__init__(self)  # the layers are the decoder's
        self.chunks = Chunks(window, chunk, near)
        if decoder.max_length is not None and decoder.max_length < window:
            raise FormeryError(f"the decoder takes {decoder.max_length} tokens, fewer than the window of {window}.")
        self.decoder, self.window, self.chunk, self.near = decoder, window, chunk, near
        self.max_length = None
        self.tokenizer, self.conventions = decoder.tokenizer, decoder.conventions
        self.origin = None
        self.compiled = decoder.compiled
        steerable(decoder.layers)

    @property
    def attentions(self) -> list[Attention]:
        """The decoder's attention parts, from the lowest layer up."""
        return steerable(self.decoder.layers)

    @property
    def embedding(self) -> Embedding:  # type: ignore[override]
        return self.decoder.embedding

    @property
    def norm(self) -> Part | None:  # type: ignore[override]
        return self.decoder.norm

    @property
    def output(self) -> Part:  # type: ignore[override]
        return self.decoder.output

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]
        """Refused: by themselves they would read without the past."""
        raise FormeryError("a model that reads in chunks lends its layers to no method; use one that drafts elsewhere.")

    @abstractmethod
    def opened(self, past: Int[Tensor, "batch past"], seen: Seen | None) -> Seen:
        """What is made of the past, whole chunks of it. seen: of a beginning of the same texts, to go on from."""

    @abstractmethod
    def advance(self, seen: Seen, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        """Reads the next tokens, which all have the same past; the last normed vectors. Changes `seen`."""

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        memory: Float[Tensor, "batch source width"] | None = None,
        memory_positions: Int[Tensor, "batch source"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """The last normed vectors from scratch; position -1 is padding, on either side."""
        if segments is not None or memory is not None:
            raise FormeryError("a model that reads in chunks takes neither packed segments nor another text.")
        if positions is None:
            return self.stretch(tokens, 0)
        return self.read(tokens, self.start(len(tokens), tokens.shape[1]), positions)

    def stretch(self, tokens: Int[Tensor, "batch time"], begin: int) -> Float[Tensor, "batch rest width"]:
        """The last normed vectors of the tokens from `begin` on, from scratch."""
        found, seen = [], None
        if not begin:
            begin = min(self.window, tokens.shape[1])
            found.append(self.decoder.hidden(tokens[:, :begin]))
        for first, last in self.chunks.stretches(begin, tokens.shape[1]):
            start = self.chunks.start(first)
            seen = self.opened(tokens[:, :start], seen)
            if first > start:
                self.advance(seen, tokens[:, start:first])
            found.append(self.advance(seen, tokens[:, first:last]))
        return torch.cat(found, 1)

    def behind(self, tokens: Int[Tensor, "batch time"], start: int) -> Float[Tensor, "batch rest width"]:
        """As `stretch`, with all tokens before `start`, and no others, past to all tokens from there on."""
        return self.advance(self.opened(tokens[:, :start], None), tokens[:, start:])

    def start(self, batch: int, capacity: int) -> State:
        """An empty state for so many rows."""
        state = State(batch, capacity, self.embedding.weight.device)
        state.layers[self, 0] = Reading(state.slots)
        return state

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Reads more tokens of each row; the last normed vectors, 0 at padding.

        Raises FormeryError for a tree of drafts, and for tokens that do not go on from what was read.
        """
        if visible is not None:
            raise FormeryError("a model that reads in chunks takes drafts that are chains, not trees.")
        state.reserve(tokens.shape[1])
        at = state.slots.extend(positions, tokens.shape[1])
        reading = cast(Reading, state.layers[self, 0])
        found = torch.zeros(*tokens.shape, self.embedding.width, dtype=self.attentions[0].key.dtype, device=at.device)
        reading.before = reading.lengths
        for row, before in enumerate(reading.before):
            real = at[row] >= 0
            new = tokens[row][real]
            if at[row][real].tolist() != list(range(before, before + len(new))):
                raise FormeryError(f"row {row} has read {before} tokens; what comes next does not go on from there.")
            if len(new):
                found[row, real] = self._go_on(reading, row, new)
        return found

    def _go_on(self, reading: Reading, row: int, new: Int[Tensor, "time"]) -> Float[Tensor, "time width"]:
        begin, found = len(reading.tokens[row]), []
        reading.tokens[row] = tokens = torch.cat((reading.tokens[row], new))
        for first, last in self.chunks.stretches(begin, len(tokens)):
            start, seen = self.chunks.start(first), reading.seen[row]
            if seen is None or seen.start != start:
                seen = self.opened(tokens[None, :start], seen)
                if first > start:
                    self.advance(seen, tokens[None, start:first])
            else:
                seen = seen.cut(first - start)  # another row may go on from the same
            found.append(self.advance(seen, tokens[None, first:last]))
            reading.seen[row] = seen
        return torch.cat(found, 1)[0]

    def through_layers(self, tokens: Int[Tensor, "batch time"], first: int, mix: Mix) -> Tensor:
        """The decoder's layers and norm, from position `first` on, with `mix` in the place of attention."""
        context = Context(torch.arange(first, first + tokens.shape[1], device=tokens.device)[None])
        hidden = self.embedding(tokens, context)
        for layer in self.decoder.layers:
            hidden = through(layer, hidden, context, mix)
        return hidden if self.norm is None else cast(Tensor, self.norm(hidden))
