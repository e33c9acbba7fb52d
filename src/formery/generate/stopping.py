"""When a text ends: an end token, a stop string, or the length asked for; and its text as it grows."""

from collections.abc import Sequence

from formery.errors import FormeryError
from formery.generate.settings import Settings
from formery.models import Model

CONTEXT = 4  # tokens before a text that its first one may be read with


def end_tokens(model: Model) -> frozenset[int]:
    """The tokens with which the model ends a text: those that it was published with, or its tokenizer's."""
    if model.conventions.stop is not None:
        return frozenset(model.conventions.stop)
    end = None if model.tokenizer is None else model.tokenizer.eos
    return frozenset() if end is None else frozenset({end})


class Stopping:
    """Follows one row; a character that is not whole yet is held back until it is.

    prefix: what the row was given. A tokenizer may show a token otherwise at the beginning of a text (without its
    space), so that what is written is read behind the last tokens before it.
    """

    def __init__(self, model: Model, settings: Settings, prefix: Sequence[int] = ()):
        self.tokenizer, self.settings = model.tokenizer, settings
        self.context = [] if model.reads_apart else list(prefix[-CONTEXT:])
        self.before = self.decoded(self.context, "")
        if self.tokenizer is None and settings.stop:
            raise FormeryError("this model has no tokenizer, so it cannot stop at a string: give stop_tokens.")
        self.ends = end_tokens(model) if settings.stop_tokens is None else settings.stop_tokens
        self.given = ""

    def take(self, output: Sequence[int], new: Sequence[int], room: int) -> tuple[list[int], str, str | None]:
        """Which of the `new` tokens after `output` stand, the text that they add, and why the row ends, if it does."""
        kept: list[int] = []
        stop: str | None = None
        for token in new:
            if token in self.ends:
                stop = "end"
                break
            kept.append(token)
            if self.settings.stop and self._stopped([*output, *kept]) is not None:
                stop = "stop"
                break
            if len(kept) >= room:
                stop = "length"
                break
        return kept, self._text([*output, *kept], stop), stop

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of tokens that end here."""
        return self.decoded([*self.context, *tokens], self.before)

    def decoded(self, tokens: Sequence[int], before: str) -> str:
        """The text of the tokens, without the text before."""
        text = "" if self.tokenizer is None else self.tokenizer.decode(tokens)
        if before and not text.startswith(before):  # the prompt ends within a character
            assert self.tokenizer is not None
            return self.tokenizer.decode(tokens[len(self.context) :])
        return text[len(before) :]

    def _stopped(self, tokens: list[int]) -> int | None:
        """Where the first stop string begins."""
        if self.tokenizer is None:
            return None
        text = self.whole(tokens)
        places = [place for one in self.settings.stop if (place := text.find(one)) >= 0]
        return min(places, default=None)

    def _text(self, tokens: list[int], stop: str | None) -> str:
        if self.tokenizer is None:
            return ""
        text = self.whole(tokens)
        if stop == "stop":
            text = text[: self._stopped(tokens)]
        elif stop is None:
            text = text.rstrip("\ufffd")
            held = max(
                (n for one in self.settings.stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0
            )
            text = text[: len(text) - held]
        if not text.startswith(self.given):
            return ""
        new = text[len(self.given) :]
        self.given = text
        return new
