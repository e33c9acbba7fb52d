"""What a caller asks of a generation, whatever the method: how long, how random, when to stop."""

import math
from dataclasses import dataclass

from formery.errors import FormeryError


@dataclass(frozen=True)
class Settings:
    """How to generate.

    max_new_tokens: at most that many. temperature: 0 is greedy; above, logits are divided by it before sampling.
    top_k, top_p, min_p: keep the k likeliest tokens; the likeliest with together p of the probability; those with
    at least min_p times the likeliest's. repetition_penalty: above 1 makes tokens seen before less likely.
    seed: of all randomness; a row draws from its own stream, so its neighbours do not change it.
    stop: strings that end the text (they are not part of it). stop_tokens: token ids that do, by default the
    model's own. suppressed, suppressed_first: tokens that are never written, or not as the first; by default the
    model's own.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] | None = None
    suppressed: frozenset[int] = frozenset()
    suppressed_first: frozenset[int] = frozenset()

    @property
    def changes_logits(self) -> bool:
        """Whether the greedy choice is made from other logits than the model's."""
        return self.repetition_penalty != 1.0 or bool(self.suppressed or self.suppressed_first)

    def __post_init__(self) -> None:
        if not isinstance(self.stop, tuple) or any(not isinstance(one, str) or not one for one in self.stop):
            raise FormeryError("stop must be a list of strings that are not empty.")
        for name in ("stop_tokens", "suppressed", "suppressed_first"):
            if wrong := [one for one in getattr(self, name) or () if type(one) is not int or one < 0]:
                raise FormeryError(f"{name} must be token ids, not {wrong[0]!r}.")
        for name, whole in (("max_new_tokens", self.max_new_tokens), ("top_k", self.top_k)):
            if whole is not None and not isinstance(whole, int):
                raise FormeryError(f"{name} must be a whole number, not {whole!r}.")
        for name, value, least, most in (
            ("max_new_tokens", self.max_new_tokens, 1, math.inf),
            ("temperature", self.temperature, 0, 100),
            ("top_k", self.top_k, 1, math.inf),
            ("top_p", self.top_p, 1e-9, 1),
            ("min_p", self.min_p, 0, 1),
            ("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
        ):
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                bounds = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
                raise FormeryError(f"{name} must be {bounds}, not {value!r}.")
