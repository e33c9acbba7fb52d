"""Lexical unit decoding: placeholders behind a text guess what follows, and what is guessed with confidence stands.

Sun, Zhang, Lin, Zhang, Zhang, Wang, Chen, Song, Zhang, Gai and Xiong, "Decoding at the Speed of Thought: Harnessing
Parallel Decoding of Lexical Units for LLMs", 2024. A lexical unit is a run of tokens of the training text to each of
which the model gives more than `SURE` of the probability, `p(y_i | y_<i) > SURE`. The text is rearranged: behind a
prefix y_<i stand placeholders z_1 … z_k, and where y_i … y_{i+j} lie in one unit, z_j learns y_{i+j}; the text itself
goes on being learned. No part is added: a placeholder is a token that never occurs.

Decoding, the last token is read with k placeholders behind it. What the model says after the token is written, and then
the longest run of the placeholders' likeliest tokens that have more than `threshold` of the probability, unseen by the
model. That is another text than token by token. In the lossless form a run is a draft: the next call reads it, with
placeholders behind the last token and behind each guess, keeps what the model itself would say, and goes on from the
placeholders behind that.

The paper reports 33 % faster generation of natural language at no loss, and 30 % faster generation of code at 3 % lower
quality, with models of LLaMA's size.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from formery.errors import FormeryError
from formery.evidence.checks import Result, Setting, criterion, model_named, rows, survey, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.race import Laps
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.method import Method, drafting, register
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.generate.verify import Decoding, Event, draft_and_verify
from formery.methods.decoding.draft.checks import faster, fewer_calls, lossless
from formery.methods.decoding.draft.training import behind
from formery.models import Decoder, Model, Source
from formery.parts import Context
from formery.parts.native.stack import plainly
from formery.train.continued import continued
from formery.train.objective import Batch

SURE = 0.5  # what each token of a unit has of the probability
LONGEST = 4  # placeholders that are learned
PLACES = 40  # of a window, behind which placeholders stand
STEPS = 400


def placeholder_of(model: Model) -> int:
    """A token that no text has: padding, or where there is no tokenizer that says which this is, the last one."""
    pad = None if model.tokenizer is None else model.tokenizer.pad
    return model.vocabulary - 1 if pad is None else pad


class UnitDrafter:
    """Drafts what placeholders of the last call guessed, with new placeholders among the guesses.

    Placeholders are drafted as well: the target then says what follows each of them, and never chooses one. length: how
    many stand behind a token. threshold: a run of guesses ends before one that has no more of the probability.
    everywhere: they stand behind each guess too, not only behind the last one.
    """

    def __init__(self, length: int = 3, threshold: float = 0.0, everywhere: bool = True):
        if length < 1 or not 0 <= threshold <= 1:
            raise FormeryError(
                f"lexical units need length >= 1 and a threshold from 0 to 1, not length {length}, "
                f"threshold {threshold}."
            )
        self.length, self.threshold, self.everywhere = length, threshold, everywhere

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.target, self.placeholder = target, placeholder_of(target.model)
        self.guesses: list[list[int]] = [[] for _ in rows]
        self.drafts: list[Draft] = []

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        self.drafts = [self._draft(guesses[:room], room) for guesses, room in zip(self.guesses, rooms, strict=True)]
        return self.drafts

    def _draft(self, guesses: Sequence[int], room: int) -> Draft:
        tokens, parents = list(guesses), list(range(-1, len(guesses) - 1))
        for place in range(-1 if self.everywhere else len(guesses) - 1, len(guesses)):
            above = place
            for _ in range(min(self.length, room - place - 1)):
                parents.append(above)
                above = len(tokens)
                tokens.append(self.placeholder)
        chain = parents == list(range(-1, len(parents) - 1))
        return Draft(tokens, None, None if chain else parents)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        self.guesses = []
        for number, (draft, verdict) in enumerate(zip(self.drafts, verdicts, strict=True)):
            place = verdict.path[-1] if verdict.path else -1
            behind: list[int] = []
            while found := [one for one in draft.children(place) if draft.tokens[one] == self.placeholder]:
                place = found[-1]
                behind.append(place)
            guesses = [verdict.choices[one + 1] for one in behind]
            self.guesses.append(guesses[: self._sure(number, behind, guesses)])

    def _sure(self, number: int, behind: Sequence[int], guesses: Sequence[int]) -> int:
        """How many of the guesses of that row of the latest call come before the first that is not confident."""
        if self.threshold == 0 or not guesses:
            return len(guesses)
        assert self.target.hidden is not None
        hidden = self.target.hidden[number : number + 1, [place + 1 for place in behind]]
        chances = self.target.model.logits(hidden, self.target.state)[0].float().softmax(-1)
        sure = (chances[range(len(guesses)), guesses] > self.threshold).tolist()
        return [*sure, False].index(False)

    def select(self, rows: Sequence[int]) -> None:
        self.guesses = [self.guesses[row] for row in rows]


def trusting(*, length: int = 3, threshold: float = 0.8) -> Decoding:
    """At temperature 0 confident guesses stand whatever the model would have said; by sampling they are drafts."""
    make = partial(UnitDrafter, length, threshold, everywhere=False)

    def decode(model: Model, prompts: Sequence[Source], settings: Settings, first: int) -> Iterator[list[Event]]:
        placeholder = placeholder_of(model)

        def stands(logits: Float[Tensor, "vocabulary"], token: int) -> bool:
            return token != placeholder

        return draft_and_verify(model, prompts, settings, first, make(), relaxed=stands)

    make()  # complains of bad options before any work
    return decode


METHOD = register(
    Method(
        "lexical-unit-decoding",
        "placeholders guess the tokens to come, and confident guesses stand unchecked",
        lossless=False,
        make=trusting,
        variants=("threshold=0.5", "threshold=0.95"),
        paper="lexical-unit-decoding",
    )
)
LOSSLESS = register(
    Method(
        "lexical-unit-drafting",
        "placeholders guess the tokens to come, and the next call checks the guesses",
        lossless=True,
        make=drafting(UnitDrafter),
        variants=("length=2", "length=3:everywhere=false"),
        paper="lexical-unit-decoding",
    )
)


def rearranged(
    tokens: Int[Tensor, "batch time"], at: Int[Tensor, "batch places"], length: int, placeholder: int
) -> tuple[Int[Tensor, "batch all"], Context]:
    """Texts, and behind them placeholders for each prefix that ends at one of the places; they see nothing else."""
    positions, visible = behind(torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens), at, length)
    added = torch.full_like(positions[:, tokens.shape[1] :], placeholder)
    return torch.cat((tokens, added), 1), Context(positions, visible=visible.tril())


def in_unit(sure: Bool[Tensor, "batch time"], length: int) -> Bool[Tensor, "batch time length"]:
    """Behind each place, for each placeholder there, whether its token and all since the place are in one unit.

    sure: whether the token after each place has more than `SURE` of the probability.
    """
    padded = torch.nn.functional.pad(sure, (0, length))
    ahead = torch.stack([padded[:, i : i + sure.shape[1]] for i in range(length + 1)], -1)
    return ahead.cumprod(-1)[..., 1:].bool()


def objective(model: Decoder, batch: Batch, units: bool = True) -> Float[Tensor, ""]:
    """The loss of the text, and of placeholders whose tokens lie in a unit; of all where units are not asked for."""
    tokens, following = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    texts, time = tokens.shape
    chance = torch.Generator().manual_seed(int(batch["step"]) if "step" in batch else 0)
    at = torch.rand(texts, time - LONGEST, generator=chance).argsort(1)[:, :PLACES]
    whole, context = rearranged(tokens, at, LONGEST, placeholder_of(model))
    hidden = plainly(model.layers, model.norm, model.embedding(whole, context), context)
    logits = model.output(hidden[:, :time]).float()
    text = cross_entropy(logits.flatten(0, 1), following.flatten())
    row = torch.arange(texts)[:, None]
    counting = torch.ones(*at.shape, LONGEST, dtype=torch.bool)
    if units:
        own = logits.detach().log_softmax(-1).gather(-1, following[..., None])[..., 0].exp()
        counting = in_unit(own > SURE, LONGEST)[row, at]
    coming = following[row[..., None], at[..., None] + 1 + torch.arange(LONGEST)]
    guessed = model.output(hidden[:, time:].unflatten(1, counting.shape[1:])[counting]).float()
    return text + cross_entropy(guessed, coming[counting], reduction="sum") / max(1, int(counting.sum()))


def recipe(name: str, units: bool) -> str:
    """The name of a recipe that trains the model `code` on."""
    guessed = "lexical units" if units else "blocks of one length"
    learn = partial(objective, units=units)
    description = f"the model `code`, whose placeholders guess {guessed}"
    return continued(f"code/{name}", description, lambda *_: None, learn, STEPS, batch_size=4).name


UNITS, FIXED = recipe("lexical-unit-decoding", True), recipe("fixed/lexical-unit-decoding", False)


def quality(
    model: Model, draft: Model | None, prompts: Sequence[str | list[int]], laps: Laps, temperature: float
) -> dict[str, float]:
    """What the texts cost under the model before the training, in nats a token, and how often four tokens recur."""
    original, nats, count, repeated, pieces = model_named("code"), 0.0, 0, 0, 0
    for prompt, one in zip(prompts, laps.outputs, strict=True):
        read = original.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
        if not one.tokens:
            continue
        with torch.inference_mode():
            logits = original(torch.tensor([[*read, *one.tokens[:-1]]]))[0, len(read) - 1 :].float()
        nats += float(cross_entropy(logits, torch.tensor(one.tokens), reduction="sum"))
        count += len(one.tokens)
        fours = [tuple(one.tokens[n : n + 4]) for n in range(len(one.tokens) - 3)]
        repeated, pieces = repeated + len(fours) - len(set(fours)), pieces + len(fours)
    return {"nats a token": nats / max(1, count), "four tokens recur": repeated / max(1, pieces)}


def costlier(results: Sequence[Result], setting: Setting, other: Setting) -> list[float]:
    """How many times the perplexity of another setting's texts that of this one's is, by seed, one text at a time."""

    def nats(one: Setting) -> dict[int, float]:
        return {r.seed: r.values["nats a token"] for r in results if r.setting.label == one.label and r.batch == 1}

    own, theirs = nats(setting), nats(other)
    return [math.exp(own[seed] - theirs[seed]) for seed in own]


def check(budget: Budget) -> Measured:
    """Thresholds against token by token, and against fixed blocks; and the form that checks its guesses."""
    lossy = [Setting(f"{METHOD.name}:threshold={one}", extra=quality, model=UNITS) for one in (0.5, 0.8, 0.95)]
    control = Setting(lossy[1].method, extra=quality, model=FIXED)
    plain = {name: Setting("greedy", extra=quality, model=name) for name in (UNITS, FIXED)}
    drafts = [Setting(f"{LOSSLESS.name}:{one}", model=UNITS) for one in LOSSLESS.variants]
    results = survey(budget, [*lossy, control, *drafts, *plain.values()], PAPER.works)
    chosen, checked = ([one for one in results if one.setting in some] for some in (lossy[1:2], drafts))
    cost, of_fixed = costlier(results, lossy[1], plain[UNITS]), costlier(results, control, plain[FIXED])
    criteria = [
        *faster(chosen, PAPER.works, than=1.3, essential=True),
        criterion(
            "quality",
            "at a threshold of 0.8 the text's perplexity, under the model before the training, is at most 3 % above "
            "that of the text written token by token; by seed",
            cost,
            "<=",
            1.03,
            essential=True,
        ),
        criterion(
            "units",
            "trained on units, that perplexity rises by a smaller factor than trained on fixed blocks; by seed",
            [one - other for one, other in zip(cost, of_fixed, strict=True)],
            "<",
            0.0,
        ),
        *fewer_calls(chosen, PAPER.works),
        lossless(checked),
        *(replace(one, name=f"checked, {one.name}") for one in faster(checked, PAPER.works)),
        untestable(
            "natural language",
            "natural language is generated 33 % faster at no loss of quality",
            ">=",
            1.33,
            "needs a model of billions of parameters that follows instructions in natural language",
            essential=True,
        ),
    ]
    return Measured(
        criteria,
        rows(results),
        baseline="greedy decoding of the same model, token by token",
        models=["code"],
        notes=[f"`{UNITS}` and `{FIXED}` are the model `code`, trained on for {STEPS} steps when first needed."],
    )


PAPER = publish(
    Paper(
        slug="lexical-unit-decoding",
        title="Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs",
        year=2024,
        part="decoding",
        domain="language",
        does="A model is trained on to guess, at placeholders behind a text, the next tokens of runs that it is sure "
        "of; decoding, the longest run of confident guesses is written at once, or checked by the next call.",
        claims="Natural language is generated 33 % faster at no loss of quality, and code 30 % faster at a loss of "
        "3 %, with no part added to the model.",
        needs="Models of LLaMA's size, for the stated speeds.",
        name="Lexical Unit Decoding",
        training="added",
        sought="generate contiguous words at once when confident; parallel text generation with a fine-tuned LLM; "
        "trade quality for speed",
        related={
            "hidden-transfer": "places for tokens to come",
            "parallel-jacobi-decoding": "several tokens a call",
            "ftp": "several tokens at once",
            "medusa": "several tokens at once",
        },
        added="2026-11-27",
        check=check,
        works=("code",),
    )
)
