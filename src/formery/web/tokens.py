"""Outputs as pieces of text that say where they came from: guessed and accepted, rejected, or the model's."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from formery.data.tokenizer import Tokenizer
from formery.generate import Generation

Kind = Literal["target", "accepted", "rejected"]
REPLACEMENT = "\ufffd"
CONTEXT = 4  # tokens that a decoder may need to see before the one it is asked about


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind.

    note: what the target call did that they came from. differs: this is the first token that greedy did
    not write.
    """

    text: str
    kind: Kind
    note: str = ""
    differs: bool = False


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """What each token adds to the text; bytes of a character that is not whole yet wait for its last one."""
    if tokenizer is None:
        return [f"{token} " for token in tokens]
    texts, start = [], 0
    for end in range(1, len(tokens) + 1):
        before = tokenizer.decode(tokens[max(0, start - CONTEXT) : start])
        text = tokenizer.decode(tokens[max(0, start - CONTEXT) : end]).removeprefix(before)
        if text.endswith(REPLACEMENT) and end < len(tokens):
            texts.append("")
        else:
            texts.append(text)
            start = end
    return texts


def guess_text(tokens: Sequence[int], tokenizer: Tokenizer | None) -> str:
    """Tokens that did not become text, on one line so that they don't break the lines of the text around."""
    if tokenizer is None:
        return "".join(f"{token} " for token in tokens)
    text = "".join(tokenizer.token_text(token) for token in tokens)
    return re.sub(r"[^\S\n]+", " ", text).replace("\n", "↵")


def first_difference(tokens: Sequence[int], baseline: Sequence[int]) -> int | None:
    """The place of the first token that the baseline does not have there; None where there is none."""
    if list(tokens) == list(baseline):
        return None
    places = range(min(len(tokens), len(baseline)))
    return next((place for place in places if tokens[place] != baseline[place]), len(places))


def pieces(generation: Generation, tokenizer: Tokenizer | None, difference: int | None = None) -> list[Piece]:
    """The output as pieces in reading order; a rejected draft stands before the token that took its place.

    difference: the place of the first token that should be marked.
    """
    tokens = [piece for call in _calls(generation, tokenizer, difference) for piece in call]
    merged = []
    for (kind, note), run in groupby(tokens, key=lambda piece: (piece.kind, piece.note)):
        group: list[Piece] = []
        for piece in run:
            if group and not piece.differs and not group[-1].differs:
                group[-1] = Piece(group[-1].text + piece.text, kind, note)
            else:
                group.append(piece)
        merged += group
    return [piece for piece in merged if piece.text]


def _calls(
    generation: Generation, tokenizer: Tokenizer | None, difference: int | None
) -> Iterator[list[Piece]]:
    texts = token_texts(generation.tokens, tokenizer)
    place = 0
    for number, event in enumerate(generation.trace, 1):
        count = len(event.emitted)
        note = f"call {number}: {event.accepted} of {len(event.drafted)} accepted" if event.drafted else ""
        kinds: list[Kind] = ["accepted" if i < event.accepted else "target" for i in range(count)]
        call = [
            Piece(texts[place + i], kind, note, differs=place + i == difference)
            for i, kind in enumerate(kinds)
        ]
        # Where the text ends within the draft nothing took the place of the rest.
        if count > event.accepted and event.rejected:
            rejected = Piece(guess_text(event.rejected, tokenizer), "rejected", note)
            call.insert(event.accepted, rejected)
        place += count
        yield call
