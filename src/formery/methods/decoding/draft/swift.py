"""SWIFT: the model drafts for itself with some sublayers skipped, which ones being searched for while it writes.

Xia, Li, Zhang, Du and Li, "SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration", 2024. Of the
attentions and feed-forwards between the first and the last layer a fixed share `skip` is left out while drafting, in
the model's own decode state. Which ones begins evenly spread. Once `window` tokens are written, other sets are tried,
one every few tokens: a set reads the first `window` written tokens in one pass, and its score is the share at which its
likeliest token is the one that was written next. The best set so far drafts. Sets are drawn at random; every fourth is
the most promising one by what was seen, `score ~ bias + Σ weight_i · skipped_i`, a Bayesian linear model in the place
of the paper's Gaussian process, its mean plus its deviation deciding. A guess of which the thinner form is not sure
(`confidence`) ends the draft.

The paper reports decoding 1.3 to 1.6 times faster, without training and with nothing added, and that each task has sets
of its own that are best. Differences here: a search belongs to one text and is forgotten with it, so that no text
depends on another, where the paper's goes on from text to text; drafts are chains, not trees.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import Setting, criterion, survey, untestable, values_of
from formery.evidence.checks import rows as rows_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Draft, Row, stream_of
from formery.generate.method import Method, drafting, register
from formery.generate.selfdraft import SelfDrafter, Thin, sublayers
from formery.generate.settings import Settings
from formery.generate.target import Target, device_of
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless
from formery.parts import Context, KeyValues, Memory

EVERY = 4  # tokens between two trials, and trials of which the last is chosen by the model of the scores

Kept = tuple[int, ...]  # sublayers that run, by number


class Search:
    """The search for a row's best set: which of the sublayers `free` to skip, `count` of them.

    best: the set that is skipped, and its score. tried: all sets that were scored.
    """

    def __init__(self, free: Sequence[int], count: int, chance: random.Random):
        self.free, self.count, self.chance = list(free), count, chance
        spread = [int((place + 0.5) * len(self.free) / count) for place in range(count)]
        self.best, self.score = frozenset(self.free[place] for place in spread), -1.0
        self.tried: list[tuple[frozenset[int], float]] = []

    def candidate(self) -> frozenset[int]:
        """The set to try next: first the one that it begins with."""
        if not self.tried:
            return self.best
        if (len(self.tried) + 1) % EVERY == 0:
            return self._promising()
        return frozenset(self.chance.sample(self.free, self.count))

    def learn(self, skipped: frozenset[int], score: float) -> None:
        """What came of a trial."""
        self.tried.append((skipped, score))
        if score > self.score:
            self.best, self.score = skipped, score

    def _promising(self) -> frozenset[int]:
        """The sublayers with the highest upper bounds of their weights in the model of the scores."""
        seen = torch.tensor([[float(one in skipped) for one in self.free] for skipped, _ in self.tried]).double()
        scores = torch.tensor([score for _, score in self.tried]).double()
        seen, scores = seen - seen.mean(0), scores - scores.mean()
        noise, prior = 0.01, 0.04  # variances of a score, and of what skipping one sublayer may change
        covariance = (seen.T @ seen / noise + torch.eye(len(self.free)).double() / prior).inverse()
        bounds = (covariance @ seen.T @ scores / noise + covariance.diagonal().sqrt()).tolist()
        order = sorted(range(len(self.free)), key=lambda place: (-bounds[place], place))
        return frozenset(self.free[place] for place in order[: self.count])


class SwiftDrafter(SelfDrafter):
    """Drafts with `skip` of the inner sublayers left out; `trials` sets are tried for each text.

    window: how many written tokens a trial reads.
    """

    def __init__(self, length: int = 6, confidence: float = 0.8, skip: float = 0.45, window: int = 16, trials: int = 8):
        super().__init__(length, confidence)
        if not 0 < skip <= 1 or window < 2 or trials < 0:
            raise FormeryError(
                f"skipping needs 0 < skip <= 1, window >= 2 and trials >= 0, not skip {skip}, window {window}, "
                f"trials {trials}."
            )
        self.skip, self.window, self.trials = skip, window, trials

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        self.parts, layers = sublayers(self.decoder), self.decoder.layers
        # The first and the last layer always run; where there are no others, their outer sublayers.
        first, last = (len(getattr(layer, "sublayers", [layer])) for layer in (layers[0], layers[-1]))
        inner = range(first, len(self.parts) - last) if len(layers) > 2 else range(1, len(self.parts) - 1)
        free = list(inner) or [len(self.parts) - 1]
        count = max(1, round(self.skip * len(free)))
        self.searches = [Search(free, count, stream_of(settings.seed, row.index, "skip")) for row in rows]
        self.forms: dict[tuple[Kept, bool], Thin] = {}
        # A recurrent layer cannot read a text again in another way.
        kinds = {type(layer) for layer in target.state.layers.values()}
        self.searching = kinds <= {KeyValues, Memory}

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        trying = {
            i: search.candidate()
            for i, (row, search) in enumerate(zip(rows, self.searches, strict=True))
            if self.searching
            and len(search.tried) < self.trials
            and len(row.output) > self.window + EVERY * len(search.tried)
        }
        self.skipped = [trying.get(i, search.best) for i, search in enumerate(self.searches)]
        if trying:
            self._try(rows, trying)
        self.skipped = [search.best for search in self.searches]
        return super().propose(rows, rooms)

    def _try(self, rows: Sequence[Row], trying: dict[int, frozenset[int]]) -> None:
        """Each set reads the first written tokens once more, behind all others but seeing only what was before them."""
        state, time, device = self.target.state, self.window, device_of(self.decoder)
        slots = state.slots
        tokens = [row.output[:time] if i in trying else [0] * time for i, row in enumerate(rows)]
        positions = torch.full((len(rows), time), -1, device=device)
        visible = torch.zeros(len(rows), time, slots.filled + time, dtype=torch.bool, device=device)
        for i in trying:
            start = len(rows[i].prefix)
            positions[i] = torch.arange(start, start + time, device=device)
            held = slots.positions[i, : slots.used[i]]
            visible[i, :, : slots.used[i]] = (held >= 0) & (held < start)
            visible[i, :, slots.used[i] : slots.used[i] + time] = torch.ones(time, time, device=device).tril().bool()
        context = self.decoder.context(time, state, positions, visible)
        with self.target.packing:
            hidden = self.thin(self.decoder.embedding(torch.tensor(tokens, device=device), context), context)
            choices = self.target.model.logits(hidden, state).argmax(-1).tolist()
        state.settle([[] for _ in rows])
        for i, skipped in trying.items():
            written = rows[i].output[1 : time + 1]
            same = sum(a == b for a, b in zip(choices[i], written, strict=True))
            self.searches[i].learn(skipped, same / time)

    def thin(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        if len(set(self.skipped)) == 1:
            kept = tuple(n for n in range(len(self.parts)) if n not in self.skipped[0])
            return self._form(kept, True)(hidden, context)
        # Rows that skip a sublayer go past it while it runs for the others.
        running = [tuple(n not in skipped for skipped in self.skipped) for n in range(len(self.parts))]
        first = 0
        while first < len(running):
            last = first
            while last < len(running) and running[last] == running[first]:
                last += 1
            if any(running[first]):
                made = self._form(tuple(range(first, last)), False)(hidden, context)
                rows = torch.tensor(running[first], device=hidden.device)[:, None, None]
                hidden = made if all(running[first]) else torch.where(rows, made, hidden)
            first = last
        return self._form((), True)(hidden, context)

    def _form(self, kept: Kept, normed: bool) -> Thin:
        if (kept, normed) not in self.forms:
            norm: nn.Module | None = self.decoder.norm if normed else None
            parts = [self.parts[number] for number in kept]
            self.forms[kept, normed] = Thin(self.decoder, self.target.state, parts, norm)
        return self.forms[kept, normed]

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        self.searches = [self.searches[row] for row in rows]


METHOD = register(
    Method(
        "swift",
        "the model drafts with sublayers skipped that it searches for as it writes",
        lossless=True,
        make=drafting(SwiftDrafter),
        variants=("trials=0", "skip=0.2"),
        paper="swift",
    )
)


def check(budget: Budget) -> Measured:
    """Sets that are searched for against evenly spread ones, and a model that was trained with layers dropped."""
    names = [METHOD.name, *(f"{METHOD.name}:{one}" for one in METHOD.variants)]
    robust = Setting(METHOD.name, model="code/layerskip")
    plain = survey(budget, [Setting(name) for name in names], PAPER.works)
    trained = survey(budget, [robust], ("code",))
    factor = untestable(
        "factor",
        "a model of 13 billion parameters is decoded at least 1.3 times as fast",
        ">=",
        1.3,
        "needs such a model, whose layers are more redundant, and hardware on which reading weights is the cost",
        essential=True,
    )
    tasks = untestable(
        "tasks",
        "the best sets of one task draft worse for another, in accepted guesses a call",
        "<",
        0.0,
        "needs one model that does several tasks; those here do one each",
    )
    return Measured(
        [
            lossless([*plain, *trained]),
            *fewer_calls(plain),
            *accepts_more(plain, names[0], names[1]),
            criterion(
                "faster after layer dropout",
                "one text at a time, code is faster than token by token on a model trained with layers dropped",
                values_of(trained, "speedup", batch=1),
                ">",
                1.0,
            ),
            *faster(plain),
            tasks,
            factor,
        ],
        rows_of([*plain, *trained]),
        baseline="greedy decoding of the same model, token by token",
        models=[*PAPER.works],
        notes=[
            "A trial costs two to three calls, and each text is searched anew; the paper's search goes on for ever."
        ],
    )


PAPER = publish(
    Paper(
        slug="swift",
        title="SWIFT: On-the-Fly Self-Speculative Decoding for LLM Inference Acceleration",
        year=2024,
        part="decoding",
        domain="language",
        does="The model drafts with some of its attentions and feed-forwards skipped, in its own decode state; which "
        "ones is searched for while it writes, by how well a set retells what was just written.",
        claims="Many models and tasks are decoded 1.3 to 1.6 times faster, without training, with the very "
        "distribution of the model; which sublayers can go depends on the task.",
        needs="Large pretrained models (13 billion parameters and more), whose layers are redundant.",
        name="SWIFT",
        training="none",
        sought="self-speculative decoding without training; skip layers of the same LLM to draft; "
        "plug and play acceleration",
        related={
            "layerskip": "the model drafts for itself",
            "unified-layer-skipping": "layers skipped",
            "finercut": "which parts can be left out",
            "first": "layers skipped by input",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
