"""Texts that are known: decoded once, replayed by lossless methods, and read again by other forms of the model.

A lossless method writes greedy decoding's own text. Where that text is known, how much of a draft stands is read off
it, and only the drafter has to run. A drafter that looks at what the target says behind a wrong guess, as Jacobi
iteration does, has the target asked, for that alone.
"""

import importlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from formery.generate import METHODS, Draft, Drafter, Method, NoDraft, Row, Settings, Verdict, draft_and_verify
from formery.generate.draft import stream_of
from formery.generate.judge import Judge
from formery.generate.plain import GREEDY
from formery.generate.sampler import modified_rejection
from formery.generate.target import Target, full_length
from formery.models import Model, Source

# Options that say how long a draft is, and the lengths that are tried.
LENGTHS = {"length": (1, 2, 3, 4, 6, 8, 12), "block": (3, 5, 8)}


@dataclass(frozen=True)
class Known:
    """A prompt and what greedy decoding makes of it.

    decided: the tokens written, and behind them the end where the model chose it. written: how many were written.
    guarded: the steps at which a near tie was decided apart. prefill: seconds until the first call. call: of one
    call for one token, its choice included; rest: of a step besides; extra: what near ties took in all.
    """

    index: int
    source: Source
    prefix: list[int]
    decided: list[int]
    written: int
    guarded: frozenset[int] = frozenset()
    prefill: float = 0.0
    call: float = 0.0
    rest: float = 0.0
    extra: float = 0.0

    @property
    def steps(self) -> int:
        """How many calls token by token decoding makes."""
        return len(self.decided)

    @property
    def seconds(self) -> float:
        """What token by token decoding takes."""
        return self.prefill + self.extra + self.steps * (self.call + self.rest)

    def row(self, model: Model, written: int = 0) -> Row:
        """The row that the loop would hold after so many tokens."""
        stream = stream_of(0, self.index, "target")
        return Row(self.index, self.source, list(self.prefix), model.reads_apart, stream, self.decided[:written])


class _Listener(NoDraft):
    """Guesses nothing, and keeps what the target decides, the end of the text too."""

    prefix: list[int]

    def __init__(self) -> None:
        self.decided: list[int] = []

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.prefix = rows[0].prefix

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        self.decided += verdicts[0].emitted


def steady(seconds: Sequence[float]) -> float:
    """The mean, times far above the median counted as if they were nearer: those are not the model's."""
    most = 3 * median(seconds)
    return sum(min(one, most) for one in seconds) / len(seconds)


def learn(model: Model, source: Source, settings: Settings, index: int = 0) -> Known:
    """Decodes one prompt token by token, and times it."""
    listener = _Listener()
    calls: list[float] = []
    rests: list[float] = []
    guarded: set[int] = set()
    written = 0
    began = time.perf_counter()
    for [event] in draft_and_verify(model, [source], settings, index, listener):
        now = time.perf_counter()
        if event.guarded:
            guarded.add(len(calls))
        calls.append(event.verify_seconds)
        rests.append(now - began - event.verify_seconds)
        written += len(event.emitted)
        began = time.perf_counter()
    plain = [seconds for step, seconds in enumerate(calls) if step not in guarded]
    call, rest = steady(plain or calls), steady(rests[1:] or [0.0])
    return Known(
        index=index,
        source=source,
        prefix=listener.prefix,
        decided=listener.decided,
        written=written,
        guarded=frozenset(guarded),
        prefill=max(0.0, rests[0] - rest),
        call=call,
        rest=rest,
        extra=sum(max(0.0, calls[step] - call) for step in guarded),
    )


@dataclass
class Replay:
    """What a method does to write a known text.

    widths: how many tokens each target call reads. begin, drafting: seconds before the first call, and between calls
    for guessing and learning. called: of each target call, where they were made too. asked: whether the target had to
    be asked what it says behind wrong guesses.
    """

    widths: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    begin: float = 0.0
    drafting: float = 0.0
    called: list[float] = field(default_factory=list)
    asked: bool = False


class _Hindsight(Verdict):
    """A verdict read off the known text; the target is asked only when its other choices are looked at."""

    def __init__(
        self, path: list[int], draft: Draft, emitted: list[int], ask: Callable[[], list[int]], hidden: Tensor
    ) -> None:
        self.accepted, self.path, self.emitted, self.guarded, self._ask = len(path), path, emitted, 0, ask
        self.draft, self.hidden = draft, hidden

    @cached_property
    def choices(self) -> list[int]:  # type: ignore[override]
        return self._ask()


class _Oracle:
    """The target, fed as the loop feeds it, for as long as it is asked."""

    def __init__(self, model: Model, known: Known, settings: Settings) -> None:
        self.model, self.known, self.settings = model, known, settings
        self.target = Target(self.model, [self.known.source], self.settings)
        self.judge = Judge(self.model, self.settings, modified_rejection, not self.target.state.exact)
        self.asked = False
        self.seconds = 0.0

    def choices(self, before: int, draft: Draft) -> list[int]:
        """What the target says behind each token of the draft."""
        return self.verdict(before, draft).choices

    def verdict(self, before: int, draft: Draft) -> Verdict:
        """The target's own, where `before` tokens are written; its state then holds what stands."""
        began, self.asked = time.perf_counter(), True
        row, state = self.known.row(self.model, before), self.target.state
        if len(unread := row.tokens[state.lengths[0] : -1]):
            self.target.feed([unread])
        logits = self.target.feed([[row.tokens[-1], *draft.tokens]], [draft])
        [verdict] = self.judge([row], [draft], logits)
        state.settle([[0, *(place + 1 for place in verdict.path)]])
        self.seconds += time.perf_counter() - began
        return verdict


@torch.inference_mode()
def replay(
    model: Model, known: Known, drafter: Drafter, settings: Settings, call: Callable[[int], float] | None = None
) -> Replay:
    """Lets the drafter guess at a text that is known; calls and acceptance are those of a real decoding.

    call: makes a target call of so many tokens, and times it. A drafter that is a model itself and the target push each
    other out of the processor's caches, so that neither takes as long as alone. A drafter that drafts inside of the
    target's own state has it called at every step.
    """
    done, row, oracle = Replay(), known.row(model), _Oracle(model, known, settings)
    room, hidden = full_length(model, len(known.prefix), settings), _vectors(model, known)
    inside = getattr(drafter, "inside", False)
    began = time.perf_counter()
    drafter.begin(oracle.target, [row], settings)
    done.begin = time.perf_counter() - began
    while True:
        before, began = len(row.output), time.perf_counter()
        [draft] = drafter.propose([row], [room - before - 1])
        done.drafting += time.perf_counter() - began
        ahead = known.decided[before:]
        path = _stands(draft, ahead)
        asking = oracle.seconds
        if inside:
            oracle.verdict(before, draft)
            done.called.append(oracle.seconds - asking)
        row.output += ahead[: len(path) + 1][: known.written - before]
        done.widths.append(1 + len(draft.tokens))
        done.called += [] if call is None or inside else [call(done.widths[-1])]
        done.drafted += len(draft.tokens)
        done.accepted += min(len(path), len(row.output) - before)
        at = len(known.prefix) - 1 + before
        seen = hidden[at : at + len(path) + 1]
        verdict = _Hindsight(path, draft, ahead[: len(path) + 1], partial(oracle.choices, before, draft), seen)
        began, asking = time.perf_counter(), oracle.seconds
        drafter.observe([row], [verdict])
        done.drafting += time.perf_counter() - began - (oracle.seconds - asking)
        if before + len(path) + 1 >= len(known.decided):
            done.asked = oracle.asked
            return done


def _stands(draft: Draft, ahead: Sequence[int]) -> list[int]:
    """The places of the guesses that are what comes."""
    path: list[int] = []
    for token in ahead:
        place = next((one for one in draft.children(path[-1] if path else -1) if draft.tokens[one] == token), None)
        if place is None:
            break
        path.append(place)
    return path


def _vectors(model: Model, known: Known) -> Float[Tensor, "time width"]:
    """The target's last vectors at each token of the prefix and of what was decided."""
    tokens = [*known.prefix, *known.decided][: model.max_length]
    state, _ = model.begin([known.source], len(tokens))
    return model.read(torch.tensor([tokens]), state)[0]


def drafter_of(method: Method) -> Callable[..., Drafter] | None:
    """What makes the method's drafter; None for a method that is no drafter on the shared loop."""
    found = inspect.getclosurevars(method.make).nonlocals.get("drafter") if inspect.isfunction(method.make) else None
    return found if callable(found) else None


def lossless(model: Model) -> Iterator[Method]:
    """The methods that write the model's greedy text in another way."""
    importlib.import_module("formery.methods").discover()  # papers lie above this room
    for method in METHODS.values():
        exact = method.lossless and method is not GREEDY and not method.defaults.get("temperature")
        if exact and method.suits(model):
            yield method


def settings_of(method: Method) -> list[str]:
    """The method with each length that is tried, and its variants."""
    options = [f"{name}={n}" for name, lengths in LENGTHS.items() if name in method.options for n in lengths]
    return [method.name, *(f"{method.name}:{one}" for one in (*options, *method.variants))][bool(options) :]


@dataclass(frozen=True)
class Quality:
    """What another form of a model costs.

    nats: how much more each token of a text costs, that is cross-entropy; on: which text, of how many tokens. same: the
    share of the written tokens that stay the likeliest. tokens: of the text and written ones.
    """

    nats: float
    same: float
    on: str
    tokens: int
    written: int


@dataclass(frozen=True)
class Scores:
    """What a model makes of known texts.

    losses: the cost of each token, in nats, on the texts that `on` names. choices: its likeliest tokens where text was
    written. sure: the share of the written tokens that had more than half of the probability.
    """

    on: str
    losses: Float[Tensor, "tokens"]
    choices: Int[Tensor, "written"]
    sure: float


@torch.inference_mode()
def scores(model: Model, known: Sequence[Known], references: Sequence[Sequence[int]]) -> Scores:
    """Reads the texts again, each in one pass.

    What is scored is the prompts' own text; for a model that reads its prompts apart the references, where there is one
    for every prompt, else what was written.
    """
    losses, choices, chances = [], [], []
    whole = model.reads_apart and len(references) == len(known) and all(references)
    own = not model.reads_apart and all(len(one.prefix) > 1 for one in known)
    for number, one in enumerate(known):
        logits = _logits(model, one, one.decided)
        start = len(one.prefix) - 1
        log = logits[start:].log_softmax(-1)
        written = torch.tensor(one.decided)
        choices.append(log.argmax(-1))
        chances.append(log.gather(-1, written[:, None]).exp().flatten())
        if own:
            scored, text = logits[:start], torch.tensor(one.prefix[1:])
        elif whole:
            scored, text = _logits(model, one, references[number])[start:], torch.tensor(references[number])
        else:
            scored, text = logits[start:], written
        losses.append(cross_entropy(scored, text, reduction="none"))
    on = "the prompts' own text" if own else "the references" if whole else "the text written"
    sure = float((torch.cat(chances) > 0.5).double().mean())
    return Scores(on, torch.cat(losses).double(), torch.cat(choices), sure)


def _logits(model: Model, known: Known, written: Sequence[int]) -> Float[Tensor, "time vocabulary"]:
    """Those after each token of the prefix and of what is written but the last."""
    state, [prefix] = model.begin([known.source], len(known.prefix) + len(written))
    return model.step(torch.tensor([[*prefix, *written[:-1]]]), state)[0].float()


def quality(base: Scores, other: Scores) -> Quality:
    """The second model's scores against those of the first, whose text it is."""
    nats = float((other.losses - base.losses).mean())
    same = float((other.choices == base.choices).double().mean())
    return Quality(nats, same, base.on, tokens=len(base.losses), written=len(base.choices))
