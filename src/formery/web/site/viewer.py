"""Decoding to be watched: bounded runs, each in a thread of its own, that end when nobody looks any more."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import cache
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

import anyio

from formery.catalog import papers
from formery.errors import FormeryError
from formery.evidence.record import SHIPPED, shipped_names

if TYPE_CHECKING:
    from formery.generate import Generation

TOKENS, CHARACTERS, SECONDS, WAITING = 256, 4000, 60.0, 8
PROMPTS = {
    "code": 'def mean(values):\n    """Return the arithmetic mean of the values."""\n',
    "translate": "Two young men are playing football on the beach.",
}
BASELINES = {
    "greedy": "the likeliest token, one after the other",
    "sampling": "a token drawn from the model's distribution",
}
_LOADING = Lock()


class Busy(Exception):
    """As many runs as may be are under way, and as many as may wait are waiting."""


@dataclass(frozen=True)
class Choice:
    """A method that can be watched: its paper, if it has one, a line on it, and the shipped models it works on."""

    name: str
    paper: str
    summary: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What is asked for; FormeryError where it is beyond what may be asked."""

    model: str
    method: str
    prompt: str
    tokens: int = 64
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise FormeryError("there is no prompt: write what the model should go on with.")
        if len(self.prompt) > CHARACTERS:
            raise FormeryError(f"the prompt has {len(self.prompt):,} characters; {CHARACTERS:,} are the most here.")
        if not 1 <= self.tokens <= TOKENS:
            raise FormeryError(f"{self.tokens} new tokens: from 1 to {TOKENS} can be watched.")
        if self.temperature is not None and not 0 <= self.temperature <= 5:
            raise FormeryError(f"a temperature of {self.temperature:g}: from 0 to 5 can be watched.")
        if self.model not in models():
            raise FormeryError(f"the viewer has no model {self.model!r}; there are {', '.join(models())}.")
        if self.method not in {one.name for one in choices() if self.model in one.models}:
            raise FormeryError(f"no method {self.method!r} can be watched on {self.model}.")


def models() -> list[str]:
    """The shipped models that can be watched: those with a prompt to begin with."""
    return [name for name in shipped_names() if name in PROMPTS]


@cache
def choices() -> list[Choice]:
    """The methods that can be watched, the plain ones first; found without importing them."""
    there = shipped_names()
    found = [Choice(name, "", summary, tuple(models())) for name, summary in BASELINES.items()]
    for entry in papers():
        for method in entry.card.methods:
            guided = [name for name in there if name.endswith(f"/{method.guide or method.name}")]
            suits = [
                name
                for name in models()
                if _kind(name) in method.kinds and (not guided or f"{name}/{method.guide or method.name}" in guided)
            ]
            if suits:
                found.append(Choice(method.name, entry.card.slug, method.summary, tuple(suits)))
    return found


@cache
def _kind(model: str) -> str:
    text = (SHIPPED / model / "formery.json").read_text(encoding="utf-8")
    return "encoder-decoder" if '"EncoderDecoder"' in text else "decoder"


class Viewer:
    """Runs decodings side by side: at most `runs` at once, `WAITING` more in a queue, `seconds` for each."""

    def __init__(self, runs: int = 2, seconds: float = SECONDS) -> None:
        if runs < 1:
            raise FormeryError(f"a viewer runs at least 1 decoding at once, not {runs}.")
        self.runs, self.seconds = runs, seconds
        self.free = asyncio.Semaphore(runs)
        self.under_way = 0

    def admit(self) -> None:
        """Takes a place for a run, which `events` gives back; raises Busy where there is none."""
        if self.under_way >= self.runs + WAITING:
            raise Busy
        self.under_way += 1

    async def events(self, run: Run) -> AsyncIterator[dict[str, Any]]:
        """What each call of the model did, as it happens; when nobody takes them any more, the run ends."""
        left, loop = Event(), asyncio.get_running_loop()
        told: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        def tell(what: dict[str, Any] | None) -> None:
            if not left.is_set():
                loop.call_soon_threadsafe(told.put_nowait, what)

        def work() -> None:
            try:
                for event in follow(run, self.seconds):
                    if left.is_set():
                        return
                    tell(event)
            except FormeryError as error:
                tell({"error": str(error)})
            except Exception as error:  # a page must hear of it, whatever it is
                tell({"error": f"this run failed: {type(error).__name__}."})
                raise
            finally:
                tell(None)

        thread = Thread(target=work, daemon=True)
        try:
            if self.free.locked():
                yield {"waiting": True}
            async with self.free:
                try:
                    thread.start()
                    while (event := await told.get()) is not None:
                        yield event
                finally:
                    left.set()
                    # Its place is free when it has really ended, and a connection that closes cancels each wait.
                    with anyio.CancelScope(shield=True):
                        while thread.is_alive():
                            await asyncio.sleep(0.01)
        finally:
            self.under_way -= 1


def follow(run: Run, seconds: float) -> Iterator[dict[str, Any]]:
    """Decodes, and says of each call what was drafted, what stands, what was written, and the counters so far."""
    from formery.generate import Generation, stream
    from formery.generate.method import find

    yield {"loading": run.model}
    with _LOADING:
        model = _model(run.model)
        takes_draft = find(run.method)[0].takes_draft
        options: dict[str, Any] = {"draft": _draft(run.model, run.method)} if takes_draft else {}
    if run.temperature is not None:
        options["temperature"] = run.temperature
    generation, shown = Generation(run.prompt), _Shown(model.tokenizer)
    began = time.perf_counter()
    for event in stream(model, run.prompt, run.method, max_new_tokens=run.tokens, seed=run.seed, **options):
        generation.add(event)
        elapsed = time.perf_counter() - began
        late = elapsed > seconds and event.stop is None
        yield {**shown.call(generation), "seconds": elapsed, "stop": "time" if late else event.stop}
        if late:
            return


@cache
def _model(name: str) -> Any:
    from formery.methods import discover
    from formery.models import load

    discover()
    return load(name)


@cache
def _draft(model: str, method: str) -> Any:
    from formery.evidence.compare import draft_for

    return draft_for(model, None, method)


@dataclass
class _Shown:
    """Calls as a page draws them."""

    tokenizer: Any
    texts: list[str] = field(default_factory=list)

    def call(self, generation: "Generation") -> dict[str, Any]:
        """The last call: each guess with its parent and whether it stands; the texts that are new, and from where."""
        from formery.web.tokens import guess_text, token_texts

        event = generation.trace[-1]
        before = self.texts
        self.texts = token_texts(generation.tokens, self.tokenizer)
        # Bytes of a character that was not whole may have become one.
        same = next((i for i, (a, b) in enumerate(zip(before, self.texts, strict=False)) if a != b), len(before))
        parents = event.parents or [place - 1 for place in range(len(event.drafted))]
        return {
            "guesses": [
                {"text": guess_text([token], self.tokenizer), "parent": parent, "stands": place in event.path}
                for place, (token, parent) in enumerate(zip(event.drafted, parents, strict=True))
            ],
            "from": same,
            "texts": self.texts[same:],
            "written": len(event.emitted),
            "accepted": min(event.accepted, len(event.emitted)),
            "totals": {
                "tokens": len(generation.tokens),
                "calls": generation.calls,
                "drafted": generation.drafted,
                "accepted": generation.accepted,
            },
            "drafting": event.draft_seconds,
            "verifying": event.verify_seconds,
        }
