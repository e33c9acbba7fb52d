"""`generate` and `stream`: prompts in, texts out, by any method."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from formery.errors import FormeryError
from formery.generate.method import bound, find
from formery.generate.settings import Settings
from formery.generate.verify import Event
from formery.models import Model

Prompt = str | Sequence[int]


@dataclass
class Generation:
    """What became of one prompt.

    calls: target calls that the row took part in. drafted, accepted: tokens guessed, and those that stood.
    stop: "end" (the model ended it), "stop" (a stop string), "length". guarded: near ties decided apart.
    state_bytes: the largest decode state of its batch. trace: an event for each call.
    """

    prompt: str | list[int]
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

    prompts: texts, or token ids. batch: how many at a time, all at once unless given. options: those of Settings and
    the method's own. A prompt's result does not depend on its neighbours. Raises FormeryError for an empty or too
    long prompt, an unknown method or option, and a draft with another vocabulary.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(isinstance(prompt, int) for prompt in prompts):
        raise FormeryError("prompts must be a list of texts, or of lists of token ids.")
    results = [Generation(prompt if isinstance(prompt, str) else [*map(int, prompt)]) for prompt in prompts]
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
    if "stop_tokens" in given and given["stop_tokens"] is not None:
        given["stop_tokens"] = frozenset(given["stop_tokens"])
    settings = Settings(**{**chosen.defaults, **given})
    own = {key: value for key, value in options.items() if key not in known}
    decode = bound(chosen, {**named, **own})
    tokens = [encoded(model, prompt, number) for number, prompt in enumerate(prompts, 1)]
    size = batch or max(1, len(tokens))
    with evaluating([model, *(one for one in own.values() if isinstance(one, Module))]):
        for first in range(0, len(tokens), size):
            for group in decode(model, tokens[first : first + size], settings, first):
                yield from group


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


def encoded(model: Model, prompt: Prompt, number: int) -> list[int]:
    """A prompt as tokens; `number` is its place in the list, for the sentence when it is no good."""
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise FormeryError("this model has no tokenizer: give prompts as token ids.")
        tokens = model.tokenizer.encode(prompt)
        if model.reads_apart and model.tokenizer.eos is not None:
            tokens = [*tokens, model.tokenizer.eos]
    else:
        tokens = [*map(int, prompt)]
    if not tokens or (isinstance(prompt, str) and not prompt.strip()):
        raise FormeryError(f"prompt {number} is empty: give the model something to read.")
    if wrong := [token for token in tokens if not 0 <= token < model.vocabulary]:
        raise FormeryError(f"prompt {number} has token {wrong[0]}; this model knows 0 to {model.vocabulary - 1}.")
    return tokens
