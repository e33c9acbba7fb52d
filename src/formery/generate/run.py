"""`generate` and `stream`: prompts in, texts out, by any method."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import Module

from formery.errors import FormeryError
from formery.generate.method import bound, find
from formery.generate.prompts import Prompt, encoded
from formery.generate.settings import Settings
from formery.generate.verify import Event
from formery.models import Model
from formery.parts.native import prepare


@dataclass
class Generation:
    """What became of one prompt.

    calls: target calls that the row took part in. drafted, accepted: tokens guessed, and those that stood.
    stop: "end" (the model ended it), "stop" (a stop string), "length". guarded: near ties decided apart.
    state_bytes: the largest decode state of its batch. trace: an event for each call.
    """

    prompt: str | list[int] | Tensor
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    calls: int = 0
    drafted: int = 0
    accepted: int = 0
    stop: str = "length"
    guarded: int = 0
    state_bytes: int = 0
    trace: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Takes in what one target call did."""
        self.text += event.text
        self.tokens += event.emitted
        self.calls += 1
        self.drafted += len(event.drafted)
        self.accepted += event.accepted
        self.guarded += event.guarded
        self.stop = event.stop or self.stop
        self.state_bytes = max(self.state_bytes, event.state_bytes)
        self.trace.append(event)


def generate(
    model: Model, prompts: Sequence[Prompt] | str, method: str = "greedy", batch: int | None = None, **options: Any
) -> list[Generation]:
    """Continues (or answers) each prompt.

    prompts: texts, or token ids; for a model that listens, paths of recordings, or samples. batch: how many at a
    time, all at once unless given. options: those of Settings and the method's own. A prompt's result does not depend
    on its neighbours. Raises FormeryError for an empty or too long prompt, an unknown method or option, and a draft
    with another vocabulary.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(isinstance(prompt, int) for prompt in prompts):
        raise FormeryError("prompts must be a list of texts, or of lists of token ids.")
    results = [Generation(one if isinstance(one, str | Tensor) else [*map(int, one)]) for one in prompts]
    for event in events(model, prompts, method, batch, options):
        results[event.row].add(event)
    return results


def stream(model: Model, prompt: Prompt, method: str = "greedy", **options: Any) -> Iterator[Event]:
    """Continues one prompt, giving an event after each target call."""
    return events(model, [prompt], method, None, options)


def events(
    model: Model, prompts: Sequence[Prompt], method: str, batch: int | None, options: Mapping[str, Any]
) -> Iterator[Event]:
    """The events of all prompts, batch by batch, as they happen."""
    if batch is not None and batch < 1:
        raise FormeryError(f"a batch must hold at least 1 prompt, not {batch}.")
    chosen, named = find(method)
    known = {one.name for one in dataclasses.fields(Settings)}
    given = {key: value for key, value in options.items() if key in known}
    if isinstance(given.get("stop"), list | set):
        given["stop"] = tuple(given["stop"])
    for name in ("stop_tokens", "suppressed", "suppressed_first"):
        if given.get(name) is not None:
            given[name] = frozenset(given[name])
    settings = Settings(**{**chosen.defaults, **never_written(model), **given})
    own = {key: value for key, value in options.items() if key not in known}
    decode = bound(chosen, {**named, **own})
    tokens = [encoded(model, prompt, number) for number, prompt in enumerate(prompts, 1)]
    size = batch or max(1, len(tokens))
    prepare(model.compiled, model.parameter_count() * settings.max_new_tokens * len(tokens))
    with evaluating([model, *(one for one in own.values() if isinstance(one, Module))]):
        for first in range(0, len(tokens), size):
            for group in decode(model, tokens[first : first + size], settings, first):
                yield from group


def never_written(model: Model) -> dict[str, frozenset[int]]:
    """The settings for tokens that the model was published never to write."""
    own = model.conventions
    return {"suppressed": frozenset(own.suppressed), "suppressed_first": frozenset(own.suppressed_first)}


@contextmanager
def evaluating(models: Sequence[Module]) -> Iterator[None]:
    """Switches what is for training only (dropout) off in this block."""
    training = [model for model in models if model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()
