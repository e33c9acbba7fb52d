"""Drafting by copying from several places at once: a tree of what came behind the text's ending before."""

from collections.abc import Sequence

from formery.errors import FormeryError
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.drafters import Places
from formery.generate.settings import Settings
from formery.generate.target import Target


class Continuations(Places):
    """A growing text, and for each run of tokens all the places behind it."""

    def __init__(self, shortest: int, longest: int, prompt: Sequence[int], apart: bool):
        self.behind: dict[tuple[int, ...], list[int]] = {}
        super().__init__(shortest, longest, prompt, apart)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self.tokens)
            super().extend([token])
            for size in self.sizes:
                if end - size >= self.start:
                    self.behind.setdefault(tuple(self.tokens[end - size : end]), []).append(end)

    def tree(self, length: int, width: int) -> Draft:
        """The tree of up to `width` continuations of the ending, those of longer runs first, then the latest."""
        draft, found = Draft([], None, []), 0
        known: dict[tuple[int, int], int] = {}  # (parent, token): place
        for size in self.sizes:
            if (end := len(self.tokens)) - size < self.start:
                continue
            for place in reversed(self.behind.get(tuple(self.tokens[end - size :]), [])):
                before, parent = len(draft.tokens), -1
                for token in self.tokens[place : place + length]:
                    if (parent, token) not in known:
                        known[parent, token] = len(draft.tokens)
                        draft.tokens.append(token)
                        draft.parents.append(parent)  # type: ignore[union-attr]
                    parent = known[parent, token]
                found += len(draft.tokens) > before
                if found == width:
                    break
            if found == width:
                break
        if draft.parents == list(range(-1, len(draft.tokens) - 1)):
            draft.parents = None
        return draft


class CopyTreeDrafter:
    """Drafts a tree of what followed the text's ending, of `longest` down to `shortest` tokens, where it came before.

    length: how deep it may be. width: how many lines it has; 1 is a chain.
    """

    def __init__(self, length: int = 4, width: int = 3, longest: int = 3, shortest: int = 1):
        if length < 1 or width < 1 or not 1 <= shortest <= longest:
            raise FormeryError(
                f"a tree of copies needs length >= 1, width >= 1 and 1 <= shortest <= longest, not length {length}, "
                f"width {width}, shortest {shortest}, longest {longest}."
            )
        self.length, self.width, self.longest, self.shortest = length, width, longest, shortest

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.places = [Continuations(self.shortest, self.longest, row.prompt, row.apart) for row in rows]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [
            places.tree(min(self.length, room), self.width) for places, room in zip(self.places, rooms, strict=True)
        ]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        for row, places in zip(rows, self.places, strict=True):
            places.extend(row.output[places.written :])

    def select(self, rows: Sequence[int]) -> None:
        self.places = [self.places[row] for row in rows]
