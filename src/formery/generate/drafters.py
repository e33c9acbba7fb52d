"""Drafters that several papers build on: a smaller model, and copying."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.generate.draft import Draft, Row, Verdict, stream_of
from formery.generate.sampler import draw, penalised, probabilities
from formery.generate.settings import Settings
from formery.generate.stopping import end_tokens
from formery.generate.target import Target
from formery.models import Model


class ModelDrafter:
    """Drafts `length` tokens with a smaller model of the same vocabulary, greedily or by the target's settings.

    Nothing is drafted behind the end of a text. Its state holds a prefix of each row's tokens; after a verdict it is
    rolled back to what stands, and the tokens that it lacks are read together with the next draft.
    """

    def __init__(self, draft: Model, length: int = 3):
        if length < 1:
            raise FormeryError(f"a draft must be at least 1 token long, not {length}.")
        self.draft, self.length = draft, length

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        check_vocabulary(target.model, self.draft)
        self.settings = settings
        self.ends = end_tokens(target.model) if settings.stop_tokens is None else settings.stop_tokens
        self.target = Target(self.draft, [row.source for row in rows], settings)
        self.random = [stream_of(settings.seed, row.index, "draft") for row in rows]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        drafts = [Draft([], [] if self.settings.temperature > 0 else None) for _ in rows]
        # Each row drafts as many tokens as it would alone: what it draws must not depend on its neighbours.
        lengths = [min(self.length, room, self._left(row)) for row, room in zip(rows, rooms, strict=True)]
        state, step = self.target.state, 0
        while step < max(lengths):
            read = state.lengths
            unread = [
                (row.tokens + draft.tokens)[start:] if length > step else []
                for row, draft, start, length in zip(rows, drafts, read, lengths, strict=True)
            ]
            logits = self.target.feed(unread)
            state.rollback([start + len(tokens) for start, tokens in zip(read, unread, strict=True)])
            for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                if unread[i]:
                    token = self._choose(i, row, draft, logits[i, len(unread[i]) - 1])
                    draft.tokens += [] if token is None else [token]
                    if token is None or token in self.ends:
                        lengths[i] = len(draft.tokens)
            step += 1
        return drafts

    def _left(self, row: Row) -> int:
        """How many tokens the draft model can write behind this row before it is full."""
        limit = self.draft.max_length
        return self.length if limit is None else limit + 1 - len(row.tokens)

    def _choose(self, i: int, row: Row, draft: Draft, logits: Float[Tensor, "vocabulary"]) -> int | None:
        """The next guess; None ends the draft before it, whatever it would have been."""
        history, first = row.tokens + draft.tokens, not row.output and not draft.tokens
        if draft.probabilities is None:
            return int(penalised(logits, history, self.settings, first).argmax())
        chances = probabilities(logits, history, self.settings, first)
        draft.probabilities.append(chances)
        return draw(chances, self.random[i].random())

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        lengths = self.target.state.lengths
        # The last written token is always the target's own, so it has not been read here.
        self.target.state.rollback([min(read, len(row.tokens) - 1) for row, read in zip(rows, lengths, strict=True)])

    def select(self, rows: Sequence[int]) -> None:
        self.target.state.select(rows)
        self.random = [self.random[row] for row in rows]


class CopyDrafter:
    """Drafts what followed the last tokens when they occurred before, in the prompt or in what was written.

    The longest ending of the text, of `longest` down to `shortest` tokens, that has occurred before is looked up, and
    the `length` tokens after its latest place are the draft. unique: only endings that occurred just once count.
    aligned: a text read apart is first proposed from its beginning, before anything is written.
    """

    def __init__(
        self, length: int = 8, longest: int = 4, shortest: int = 2, unique: bool = False, aligned: bool = True
    ):
        if length < 1 or not 1 <= shortest <= longest:
            raise FormeryError(
                f"copying needs length >= 1 and 1 <= shortest <= longest, "
                f"not length {length}, shortest {shortest}, longest {longest}."
            )
        self.length, self.longest, self.shortest = length, longest, shortest
        self.unique, self.aligned = unique, aligned

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.places = [Places(self.shortest, self.longest, row.prompt, row.apart) for row in rows]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [Draft(self._copy(i, row)[: min(self.length, rooms[i])]) for i, row in enumerate(rows)]

    def _copy(self, i: int, row: Row) -> list[int]:
        if row.apart and not row.output:
            return row.prompt if self.aligned else []
        return self.places[i].following(self.length, self.unique)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        for row, places in zip(rows, self.places, strict=True):
            places.extend(row.output[places.written :])

    def select(self, rows: Sequence[int]) -> None:
        self.places = [self.places[row] for row in rows]


class Places:
    """A growing text and, for each run of `shortest` to `longest` tokens, where it was last followed by another."""

    def __init__(self, shortest: int, longest: int, prompt: Sequence[int], apart: bool):
        self.sizes = range(longest, shortest - 1, -1)
        self.tokens: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}
        self.repeated: set[tuple[int, ...]] = set()
        self.start = 0
        self.extend(prompt)
        self.prompt = len(prompt)
        self.start = self.prompt if apart else 0  # no run reaches across the border between two texts

    @property
    def written(self) -> int:
        """How many tokens came after the prompt."""
        return len(self.tokens) - self.prompt

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the text."""
        for token in tokens:
            end = len(self.tokens)
            for size in self.sizes:
                if end - size >= self.start:
                    run = tuple(self.tokens[end - size : end])
                    if run in self.after:
                        self.repeated.add(run)
                    self.after[run] = end
            self.tokens.append(token)

    def following(self, length: int, unique: bool) -> list[int]:
        """The tokens after the latest place at which the text's ending occurred before."""
        end = len(self.tokens)
        for size in self.sizes:
            if end - size < self.start:
                continue
            run = tuple(self.tokens[end - size :])
            place = self.after.get(run)
            if place is not None and not (unique and run in self.repeated):
                return self.tokens[place : place + length]
        return []


def check_vocabulary(model: Model, draft: Model) -> None:
    """Raises FormeryError where the draft's tokens would mean something else to the target."""
    own, other = model.tokenizer, draft.tokenizer
    if model.vocabulary != draft.vocabulary or (own is not None and other is not None and own.digest != other.digest):
        raise FormeryError(
            f"the draft has another vocabulary ({draft.vocabulary} tokens) than the model ({model.vocabulary}): "
            "take a draft that was trained with the model's own tokenizer."
        )
    if model.reads_apart != draft.reads_apart:
        raise FormeryError("the draft and the model are of different kinds (decoder and encoder-decoder).")
