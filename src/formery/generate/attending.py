"""Drafting with a guide that attends to the whole text: what it has read grows with the text, guesses come and go."""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.generate.draft import Draft, Row, Verdict
from formery.generate.guided import Guided, drawn, likeliest, nodes_of, told
from formery.generate.sampler import probabilities
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.models.guide import Attending, Guide


class AttendingGuided(Guided):
    """Drafts depth by depth; all guesses of a depth are read in one pass, each seeing the guesses on the way to it.

    Its state holds the target's vectors with the tokens after them. Vectors that came since the last draft are read
    with the first pass of the next one. beam: how many guesses of each depth are gone on from.
    """

    draft: Attending

    def __init__(self, draft: Guide, length: int, width: int, nodes: int | None, beam: int = 1):
        super().__init__(draft, length, width, nodes)
        self.beam = beam

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        longest = max(len(row.prefix) for row in rows)
        self.state = self.draft.start(len(rows), longest + settings.max_new_tokens + self.nodes)
        self.nothing = self.last[0, :0].reshape(0, self.draft.width)
        # Of each row: the target's vectors that have not been read yet.
        self.unread: list[Float[Tensor, "time width"]] = [
            self.nothing if target.hidden is None else target.hidden[i, : len(row.prefix) - 1]
            for i, row in enumerate(rows)
        ]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        # `last` stays as it was: it is of use only until the first vector has come.
        new = [
            told(verdict)[: len(row.tokens) - 1 - read - len(old)]
            for old, verdict, row, read in zip(self.unread, verdicts, rows, self.state.lengths, strict=True)
        ]
        self.unread = [torch.cat((old, some)) if len(old) else some for old, some in zip(self.unread, new, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.state.select(rows)
        self.unread = [self.unread[row] for row in rows]

    def embedded(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "batch time width"]:
        """The target's own embeddings of tokens."""
        return self.target.model.embedding.looked_up(torch.tensor(tokens, device=self.last.device))

    def after(self, rows: Sequence[Row], lengths: Sequence[int], time: int) -> Float[Tensor, "batch time embedded"]:
        """What is read beside the vectors from position lengths[row] on: the embedding of the token after each."""
        tokens = [row.tokens[read + 1 :] for row, read in zip(rows, lengths, strict=True)]
        return self.embedded([[*some, *[0] * (time - len(some))] for some in tokens])

    def caught_up(self, rows: Sequence[Row]) -> Float[Tensor, "batch width"]:
        """Reads what has not been read; the guess of the target's vector at each row's last token."""
        counts = [len(one) for one in self.unread]
        time, lengths = max(counts), self.state.lengths
        if time == 0:  # a single token has come, of which the target has made nothing yet
            return self.last
        unread, self.unread = self.unread, [self.nothing] * len(rows)
        beside = self.after(rows, lengths, time)
        if min(counts) == time:
            return self.draft.read(torch.stack(unread).to(self.last), beside, self.state)[:, -1]
        vectors = self.last.new_zeros(len(rows), time, self.draft.width)
        for row, one in enumerate(unread):
            vectors[row, : len(one)] = one
        ranges = [[*range(n, n + count), *[-1] * (time - count)] for n, count in zip(lengths, counts, strict=True)]
        found = self.draft.read(vectors, beside, self.state, torch.tensor(ranges, device=self.last.device))
        self.state.settle([list(range(count)) for count in counts])
        last = found[range(len(rows)), [max(0, count - 1) for count in counts]]
        return last.masked_fill(torch.tensor(counts, device=last.device)[:, None] == 0, 0)

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        lengths = [min(self.length, room) for room in rooms]
        vectors = self.caught_up(rows)[:, None]
        slots = self.state.slots
        growing = [
            Growing(row, chance, self.settings, used, length)
            for row, chance, used, length in zip(rows, self.random, slots.used, slots.lengths, strict=True)
        ]
        texts = self.state.lengths
        for depth in range(max(lengths, default=0)):
            logits = self.logits(vectors)
            for one, here, length in zip(growing, logits, lengths, strict=True):
                if depth < length:
                    one.grow(here, self.width, self.beam)
                if depth + 1 >= length:
                    one.front, one.origins = [], []
            if not any(one.front for one in growing):
                break
            vectors = self._read(growing, vectors)
        self.state.rollback(texts)
        return [one.finished(self.nodes) for one in growing]

    def _read(self, growing: Sequence["Growing"], vectors: Float[Tensor, "batch front width"]) -> Tensor:
        """Reads each front: at every guess the vector that it was made from, and its token."""
        time, starts, device = max(len(one.front) for one in growing), self.state.slots.used, vectors.device
        positions: Tensor | None = None
        visible: Tensor | None = None
        if time > 1 or not all(one.front for one in growing):
            at = [[*[one.length + one.depth - 1] * len(one.front), *[-1] * (time - len(one.front))] for one in growing]
            positions = torch.tensor(at, device=device)
        if any(one.forked for one in growing):
            visible = torch.zeros(len(growing), time, max(starts) + time, dtype=torch.bool, device=device)
        for row, (one, start) in enumerate(zip(growing, starts, strict=True)):
            one.slots |= {place: start + n for n, place in enumerate(one.front)}
            if visible is not None:
                for query, place in enumerate(one.front):
                    visible[row, query, : one.used] = True
                    visible[row, query, [one.slots[above] for above in one.draft.line(place)]] = True
        origins = torch.tensor([[*one.origins, *[0] * (time - len(one.front))] for one in growing], device=device)
        tokens = [[*(one.draft.tokens[p] for p in one.front), *[0] * (time - len(one.front))] for one in growing]
        source = vectors.take_along_dim(origins[..., None], 1)
        return self.draft.read(source, self.embedded(tokens), self.state, positions, visible)


class Growing:
    """A row's draft while it grows, depth by depth.

    used, length: of the guide's state before any guess was read. front: the places of the guesses that are gone on
    from; origins: of each, whose vector it was made from, as a place in the front before. slots: where guesses that
    were read lie. forked: whether it has branches. depth: how deep it is.
    """

    def __init__(self, row: Row, chance: random.Random, settings: Settings, used: int, length: int):
        self.row, self.chance, self.settings, self.used, self.length = row, chance, settings, used, length
        self.draft = Draft([], [] if settings.temperature > 0 else None, [], [])
        self.reached: list[float] = []
        self.front, self.origins, self.depth = [-1], [0], 0
        self.slots: dict[int, int] = {}

    @property
    def forked(self) -> bool:
        """Whether it is no chain."""
        return self.draft.parents != list(range(-1, len(self.draft.tokens) - 1))

    def grow(self, logits: Float[Tensor, "front vocabulary"], width: int, beam: int) -> None:
        """One more depth: `width` guesses after each of the front, of which the likeliest `beam` are gone on from.

        Drawn ones fork after the last token only, and all are gone on from.
        """
        drawing = self.draft.probabilities is not None
        above = [1.0 if place < 0 else self.reached[place] for place in self.front]
        grown: list[tuple[float, int, int]] = []  # minus the chance of the line, place, origin
        chances, tokens = ([], []) if drawing else likeliest(logits[None, : len(self.front)], width)
        for origin, place in enumerate(self.front):
            if drawing:
                written = [self.draft.tokens[one] for one in self.draft.line(place)]
                first = not self.row.output and place < 0
                left = probabilities(logits[origin], self.row.tokens + written, self.settings, first)
                found = [
                    (token, 1.0, drawn_from)
                    for token, drawn_from in drawn(left, width if self.depth == 0 else 1, self.chance)
                ]
            else:
                found = [(t, c, logits) for t, c in zip(tokens[0][origin], chances[0][origin], strict=True)]
            for token, chance, drawn_from in found:
                self.draft.tokens.append(token)
                self.draft.parents.append(place)  # type: ignore[union-attr]
                self.draft.chances.append(chance)  # type: ignore[union-attr]
                if self.draft.probabilities is not None:
                    self.draft.probabilities.append(drawn_from)
                self.reached.append(above[origin] * chance)
                grown.append((-self.reached[-1], len(self.draft.tokens) - 1, origin))
        kept = sorted(grown)[: len(grown) if drawing else beam]
        self.front, self.origins, self.depth = [one[1] for one in kept], [one[2] for one in kept], self.depth + 1

    def finished(self, nodes: int) -> Draft:
        """The draft, named guesses cut down to the likeliest ones."""
        if self.draft.probabilities is None:
            return nodes_of(self.draft, self.reached, nodes)
        self.draft.chances = None
        return self.draft
