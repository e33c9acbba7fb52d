"""What calls cost on this machine: by the tokens and rows they read, by context, and of another form of the model."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from statistics import median

import torch

from formery.evidence.replay import Known
from formery.generate import Draft, NoDraft, Row, Settings, draft_and_verify
from formery.generate.draft import stream_of
from formery.generate.judge import Judge
from formery.generate.sampler import modified_rejection
from formery.generate.target import Target
from formery.models import EncoderDecoder, Model, Source
from formery.parts import CrossAttention, Embedding
from formery.parts.experts import Experts
from formery.parts.native import using
from formery.parts.native.mode import Compile

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 17, 25, 33, 49, 65)
BATCHES = (1, 2, 4, 8, 16, 32)
FEW = 8  # prompts that are read for a batch; rows of larger ones are copies
BUFFER = 256 * 2**20  # bytes: more than caches hold
MOST_STATE = 2**30  # bytes of decode state that batches may hold while they are timed
FEWEST_ROUNDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 5, 25  # the fewest where a round takes long
SHORT = 16  # tokens of context that count as few


@dataclass(frozen=True)
class Costs:
    """Seconds of calls, by what was varied: seconds[round][i] belongs to at[i]. Within a round all were interleaved."""

    at: tuple[int, ...]
    seconds: list[list[float]]

    def medians(self, rounds: Sequence[int] | None = None) -> list[float]:
        """The median seconds of each, over these rounds or all."""
        chosen = self.seconds if rounds is None else [self.seconds[one] for one in rounds]
        return [median(column) for column in zip(*chosen, strict=True)]

    def drawn(self, source: random.Random | None) -> list[float]:
        """The medians; with a source of chance, those of as many rounds drawn with replacement."""
        count = len(self.seconds)
        return self.medians(None if source is None else [source.randrange(count) for _ in range(count)])


def between(at: Sequence[int], values: Sequence[float], wanted: float) -> float:
    """The value at `wanted` on straight lines between the measured ones, and on from the last two."""
    if len(at) == 1:
        return values[0]
    place = next((i for i in range(1, len(at)) if at[i] >= wanted), len(at) - 1)
    share = (wanted - at[place - 1]) / (at[place] - at[place - 1])
    return values[place - 1] + share * (values[place] - values[place - 1])


def timed(run: Callable[[], object]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Standing:
    """A model that has read a prompt and the first half of its text: calls can be timed there again and again.

    mode: whether the compiled kernels are used. context: how many tokens it has read instead, if that is given.
    """

    def __init__(
        self, model: Model, known: Known, settings: Settings, mode: Compile = "auto", context: int | None = None
    ) -> None:
        self.model, self.known, self.settings, self.mode = model, known, settings, mode
        half = known.steps // 2
        while half in known.guarded and half > 0:  # what a near tie takes is counted apart
            half -= 1
        self.row = known.row(model, half)
        self.ahead = list(islice(cycle(known.decided[half:]), max(WIDTHS)))
        fresh = self.row.tokens if context is None else list(islice(cycle(self.row.tokens), context + 1))
        with torch.inference_mode(), using(mode):
            self.target = Target(model, [known.source], settings)
            self.judge = Judge(model, settings, modified_rejection, not self.target.state.exact)
            read = self.target.state.lengths[0]
            if fresh[read:-1]:
                self.target.feed([fresh[read:-1]])
            elif read >= len(fresh):
                self.target.state.rollback([len(fresh) - 1])
        self.context = self.target.state.lengths[0]

    @property
    def room(self) -> int:
        """How many tokens a call may have."""
        most = self.model.max_length
        return max(WIDTHS) if most is None else most - self.context

    @torch.inference_mode()
    def call(self, width: int = 1) -> float:
        """Seconds of a call of so many tokens, and of the choice after it."""
        width = min(width, max(1, self.room))
        # The first guess is a wrong one, so that the choice ends there whatever the text says.
        wrong = (self.ahead[0] + 1) % self.model.vocabulary
        draft = Draft([wrong, *self.ahead[1 : width - 1]] if width > 1 else [])
        fed = [[self.row.tokens[-1], *draft.tokens]]
        with using(self.mode):
            took = timed(lambda: self.judge([self.row], [draft], self.target.feed(fed)))
        self.target.state.rollback([self.context])
        return took

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds until a fresh state has read the prompt."""
        with using(self.mode):
            return timed(lambda: Target(self.model, [self.known.source], self.settings))


def interleaved(runs: Sequence[Callable[[], float]], at: Sequence[int], seconds: float) -> Costs:
    """Each run in every round, in an order that changes, until the time is up; the first round only warms up."""
    order, chance = list(range(len(runs))), random.Random(0)
    rounds: list[list[float]] = []
    began = time.perf_counter()
    for run in runs:
        run()
    least = LEAST_ROUNDS if time.perf_counter() - began < seconds / 4 else FEWEST_ROUNDS
    while len(rounds) < least or (len(rounds) < MOST_ROUNDS and time.perf_counter() - began < seconds):
        chance.shuffle(order)
        took = {which: runs[which]() for which in order}
        rounds.append([took[which] for which in range(len(runs))])
    return Costs(tuple(at), rounds)


def call_costs(model: Model, known: Known, settings: Settings, widest: int, seconds: float) -> tuple[Costs, int]:
    """Calls of 1 token up to `widest`, interleaved, and the context at which they were timed."""
    standing = Standing(model, known, settings)
    behind = next((width for width in WIDTHS if width >= widest), WIDTHS[-1])
    widths = [width for width in WIDTHS if width == 1 or width <= min(behind, standing.room)]
    runs = [lambda width=width: standing.call(width) for width in widths]
    return interleaved(runs, widths, seconds), standing.context


def context_costs(model: Model, known: Known, settings: Settings, most: int, seconds: float) -> Costs:
    """Calls of 1 token behind a short context and behind one of `most` tokens, interleaved.

    Raises FormeryError for a state that cannot be taken back to the short one.
    """
    long = Settings(**{**vars(settings), "max_new_tokens": max(settings.max_new_tokens, most)})
    places = [Standing(model, known, long, context=context) for context in (SHORT, most)]
    return interleaved([place.call for place in places], [place.context for place in places], seconds)


def against(base: Standing, other: Standing, seconds: float) -> tuple[Costs, Costs]:
    """A call of 1 token, and reading the prompt, of two models in turn; `at` is 0 for the first, 1 for the second."""
    calls = interleaved([partial(_settled, one) for one in (base, other)], (0, 1), seconds)
    return calls, interleaved([base.prefill, other.prefill], (0, 1), seconds / 2)


def _settled(standing: Standing) -> float:
    """Seconds of a call of 1 token that follows others, so that what fits the processor's caches is there."""
    return median([standing.call() for _ in range(4)][1:])


@dataclass(frozen=True)
class BatchCosts:
    """What batches of so many rows cost: calls of one token in each row, reading the prompts, a step besides its call.

    state_bytes: of each batch whose calls were timed.
    """

    calls: Costs
    prefills: Costs
    rests: Costs
    state_bytes: list[int]


@torch.inference_mode()
def batch_costs(model: Model, known: Sequence[Known], settings: Settings, seconds: float) -> BatchCosts:
    """Calls of one token in growing batches of these prompts, interleaved; and real decoding of a small batch."""
    # A batch of one stands for all prompts, so it has the one of middle length.
    known = sorted(known, key=lambda one: len(one.prefix) + len(one.source))
    middle = len(known) // 2
    sources = list(islice(cycle(one.source for one in (*known[middle:], *known[:middle])), FEW))
    targets: list[Target] = []
    for batch in BATCHES:
        target = Target(model, sources[:batch], settings)
        target.state.select(list(islice(cycle(range(target.state.batch)), batch)))
        targets.append(target)
        if sum(one.state.nbytes for one in targets) > MOST_STATE:
            break
    calls = interleaved([partial(_together, one, settings) for one in targets], BATCHES[: len(targets)], seconds / 2)
    at = (1, FEW // 2, FEW)
    laps = [[_decoded(model, sources[:count], settings) for count in at] for _ in range(FEWEST_ROUNDS)]
    prefills, rests = (Costs(at, [[run[part] for run in lap] for lap in laps]) for part in (0, 1))
    return BatchCosts(calls, prefills, rests, [one.state.nbytes for one in targets])


def _decoded(model: Model, sources: Sequence[Source], settings: Settings) -> tuple[float, float]:
    """Real decoding for a few steps: seconds of reading the prompts, and of a step besides its call, the median."""
    took: list[float] = []
    began = time.perf_counter()
    with closing(draft_and_verify(model, sources, settings, 0, NoDraft())) as groups:  # type: ignore[type-var]
        for rows in islice(groups, 6):
            now = time.perf_counter()
            took.append(now - began - rows[0].verify_seconds)
            if any(event.stop for event in rows):
                break
            began = time.perf_counter()
    rest = median(took[1:] or took)
    return took[0] - (rest if took[1:] else 0.0), rest


def _together(target: Target, settings: Settings) -> float:
    """Seconds of a call of one token in each row, and of the choices after it."""
    lengths = target.state.lengths
    rows = [Row(i, [0], [0], False, stream_of(0, i, "target")) for i in range(len(lengths))]
    judge = Judge(target.model, settings, modified_rejection, False)
    took = timed(lambda: judge(rows, [Draft()] * len(rows), target.feed([[0]] * len(rows))))
    target.state.rollback(lengths)
    return took


def streaming_read() -> float:
    """Bytes a second at which a large buffer is read from end to end, on all threads."""
    buffer = torch.ones(BUFFER // 4)
    return BUFFER / median([timed(buffer.amax) for _ in range(5)][1:])


def bytes_read(model: Model) -> int:
    """How much of the weights a call of one token reads: not the tables that are looked up in, nor idle experts."""
    decoder = model.decoder if isinstance(model, EncoderDecoder) else model
    whole = held([decoder])
    tied = {id(one) for one in decoder.output.parameters()}
    looked_up = [p for one in decoder.modules() if isinstance(one, Embedding) for p in one.parameters(recurse=True)]
    whole -= sum({id(p): p.nbytes for p in looked_up if id(p) not in tied}.values())
    # What cross-attention knows of the source was computed once.
    crossing = [one for one in decoder.modules() if isinstance(one, CrossAttention)]
    whole -= held([each for one in crossing for each in (one.key, one.value)])
    for one in decoder.modules():
        if isinstance(one, Experts):
            whole -= round(held(list(one.experts)) * (1 - one.active / len(one.experts)))
    return whole


def held(parts: Sequence[torch.nn.Module]) -> int:
    """Bytes of all weights, shared ones counted once."""
    return sum({id(one): one.nbytes for part in parts for one in part.parameters()}.values())


@dataclass(frozen=True)
class Profile:
    """What was measured of the model as it runs here.

    calls: by their number of tokens, behind `context` tokens. contexts: calls of one token behind a short and a long
    context. weight_bytes: held; read_bytes: read by a call of one token; streaming: bytes a second of a plain read.
    nats: what a token of the text `on` costs; sure: the share of written tokens with more than half of the probability.
    state: bytes that decoding a row keeps for each token, besides, and for each place that an encoder read. positions:
    how many the model takes, None where nothing bounds it.
    """

    calls: Costs
    context: int
    contexts: Costs | None
    step_seconds: float
    prefill_seconds: float
    weight_bytes: int
    read_bytes: int
    streaming: float
    nats: float
    sure: float
    on: str
    state: tuple[int | None, int | None, int | None]
    positions: int | None

    @property
    def bandwidth(self) -> float:
        """Bytes of weights a second in a call of one token, over those of a plain read."""
        return self.read_bytes / self.calls.medians()[0] / self.streaming

    def _slope(self) -> tuple[float, float]:
        """Seconds of a call of one token behind no context, and what each token of context adds."""
        if self.contexts is None:
            return 1.0, 0.0
        (short, long), (low, high) = self.contexts.medians(), self.contexts.at
        slope = max(0.0, (long - short) / (high - low))
        return max(0.0, short - slope * low), slope

    def state_share(self, context: float) -> float:
        """The share of a call of one token that goes into reading the state of so long a context."""
        bare, slope = self._slope()
        return slope * context / (bare + slope * context)

    def context_of(self, share: float) -> float | None:
        """At which context that share is reached; None if at none."""
        bare, slope = self._slope()
        return bare / slope * share / (1 - share) if slope else None
