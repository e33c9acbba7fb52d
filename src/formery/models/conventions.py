"""What a model expects of whoever generates with it; it travels with the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from formery.errors import FormeryError


@dataclass(frozen=True)
class Conventions:
    """The tokens that a model uses as signs rather than as text.

    stop: end a text; None where the tokenizer's end token does. begin, pad: begin a text and fill rows in other
    libraries; here the tokenizer's post-processor and positions do. suppressed: never written. suppressed_first: not
    as the first token.
    """

    stop: tuple[int, ...] | None = None
    begin: int | None = None
    pad: int | None = None
    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data."""
        values = {one.name: (getattr(self, one.name), one.default) for one in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if value != default
        }

    @classmethod
    def from_json(cls, data: object) -> "Conventions":
        """Raises FormeryError where the data are no conventions."""
        known = {one.name for one in fields(cls)}
        if not isinstance(data, Mapping) or not set(data) <= known:
            raise FormeryError("its conventions of generation are not a table of known names.")
        alone = ("begin", "pad")
        given: dict[str, Any] = {
            name: one if name in alone else tuple(tokens(name, one)) for name, one in data.items()
        }
        return cls(**given)

    def __post_init__(self) -> None:
        tokens("begin, pad", [one for one in (self.begin, self.pad) if one is not None])


def tokens(name: str, value: object) -> list[int]:
    """The value, if it is a list of token ids; raises FormeryError otherwise."""
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**31 for one in value):
        raise FormeryError(f"{name} should be a list of token ids, not {value!r:.80}.")
    return value
