"""Methods timed against each other on the same prompts; a busy minute of the machine hits them all."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from formery.data.base import Example
from formery.evidence.measured import Progress, quiet
from formery.generate import Generation, generate
from formery.models import Guide, Model


@dataclass(frozen=True)
class Entrant:
    """A method, with options behind its name ("speculative-sampling:length=4"), and what else it is given."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Laps:
    """What an entrant wrote, and the seconds that it took in each round."""

    outputs: list[Generation]
    seconds: list[float]

    @property
    def tokens(self) -> int:
        """How many tokens were decided: those written, and the end where the model chose it."""
        return sum(len(one.tokens) + (one.stop == "end") for one in self.outputs)

    @property
    def calls(self) -> int:
        """In how many target calls the rows took part, added up."""
        return sum(one.calls for one in self.outputs)

    def rates(self) -> list[float]:
        """Tokens a second, in each round."""
        return [self.tokens / seconds for seconds in self.seconds]


def race(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    entrants: Sequence[Entrant],
    rounds: int,
    batch: int,
    settings: Mapping[str, Any],
    progress: Progress = quiet,
) -> list[Laps]:
    """Every entrant over all prompts, in each of the rounds, after one batch each to warm up.

    The order is rotated from round to round. settings: what all are given alike.
    """
    laps = [Laps([], []) for _ in entrants]
    total = len(entrants) * rounds

    def run(entrant: Entrant, some: Sequence[str | Sequence[int]]) -> list[Generation]:
        return generate(model, some, entrant.method, batch=batch, **settings, **entrant.options)

    for entrant in entrants:
        progress(0, total, f"{entrant.method} (warming up)")
        run(entrant, prompts[:batch])
    for lap in range(rounds):
        for turn in range(len(entrants)):
            which = (lap + turn) % len(entrants)
            progress(lap * len(entrants) + turn, total, entrants[which].method)
            began = time.perf_counter()
            outputs = run(entrants[which], prompts)
            laps[which].seconds.append(time.perf_counter() - began)
            if lap == 0:
                laps[which].outputs = outputs
    progress(total, total, "done")
    return laps


def speedups(laps: Laps, baseline: Laps) -> list[float]:
    """Tokens a second over the baseline's in the same round.

    A rate, not a time: a method that stops elsewhere gains nothing by writing less.
    """
    return [own / other for own, other in zip(laps.rates(), baseline.rates(), strict=True)]


def identical(outputs: Sequence[Generation], baseline: Sequence[Generation]) -> float:
    """The share of outputs that have the baseline's very tokens."""
    same = sum(
        own.tokens == other.tokens and (own.stop == "end") == (other.stop == "end")
        for own, other in zip(outputs, baseline, strict=True)
    )
    return same / len(outputs)


def seconds_in_calls(outputs: Sequence[Generation], batch: int) -> tuple[float, float]:
    """Seconds spent drafting, and verifying; each event of a batch tells those of the whole batch's call."""
    drafting = verifying = 0.0
    for first in range(0, len(outputs), batch):
        longest = max(outputs[first : first + batch], key=lambda one: one.calls)
        drafting += sum(event.draft_seconds for event in longest.trace)
        verifying += sum(event.verify_seconds for event in longest.trace)
    return drafting, verifying


def shortened(tokens: list[int], room: int, begin: int | None) -> list[int]:
    """The last tokens that there is room for, behind the one that begins a text, if this one has it."""
    first = tokens[:1] if begin is not None and tokens[0] == begin and room > 1 else []
    return [*first, *tokens[len(first) - room :]]


def fitted(
    model: Model, drafts: Sequence[Model | Guide | None], examples: Sequence[Example], max_new_tokens: int
) -> tuple[list[str | list[int]], int]:
    """The prompts, and how many of them lost their beginning so that they and the new tokens fit the model.

    A text that an encoder reads is left whole.
    """
    models = [model, *(one for one in drafts if one is not None and not isinstance(one, Guide))]
    lengths = [one.max_length for one in models if one.max_length is not None]
    if model.reads_apart or model.tokenizer is None or not lengths:
        return [example.prompt for example in examples], 0
    room = max(1, min(lengths) - max_new_tokens)
    encoded = [model.tokenizer.prompt(example.prompt) for example in examples]
    prompts: list[str | list[int]] = [
        shortened(tokens, room, model.tokenizer.bos) if len(tokens) > room else example.prompt
        for tokens, example in zip(encoded, examples, strict=True)
    ]
    return prompts, sum(len(tokens) > room for tokens in encoded)
