"""Advice for one model on this machine and these prompts: what would make it faster, by how much, at what cost.

The model's own text is decoded once, token by token. What a lossless method would do with it is replayed, what calls
cost is measured, and the factor is computed from both (`prediction`); no method is run for it. Other forms of the
weights are loaded, timed against the model in turn, and read the same text.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from formery.data.base import Example
from formery.data.prompts import read_prompts
from formery.data.works import WORKS
from formery.errors import FormeryError
from formery.evidence import profile_cost
from formery.evidence.compare import draft_for
from formery.evidence.measured import Progress, quiet
from formery.evidence.paper import PAPERS
from formery.evidence.prediction import (
    Advice,
    Confirmed,
    Option,
    batching,
    drafting,
    measured,
    option,
    rewriting,
)
from formery.evidence.profile_cost import Costs, Profile, Standing, held
from formery.evidence.race import fitted, shortened
from formery.evidence.replay import Known, Replay, drafter_of, learn, lossless, quality, replay, scores, settings_of
from formery.generate import Drafter, Settings
from formery.generate.method import find
from formery.generate.prompts import encoded
from formery.generate.run import never_written
from formery.generate.target import START, full_length
from formery.models import Guide, Model, guides, load, shipped, writing
from formery.models.inspection import state_bytes
from formery.parts import Codes
from formery.parts.native import build

FORMS: dict[str, dict[str, Any]] = {"bfloat16": {"dtype": "bfloat16"}}
FORMS |= {bits: {"quantize": bits} for bits in ("int8", "int4")}
PROMPTS, LEAST_PROMPTS, LEAST_TOKENS = 8, 2, 8
ASKED = 3  # prompts on which a drafter is replayed that has the target asked, which takes as long as decoding
LONGEST = 2048  # tokens of context that are read to see what state costs
TOP = 3  # how many recommendations are run where that is asked for


def own_examples(model: str) -> list[Example]:
    """Examples of the work that a shipped model is for; FormeryError for any other model."""
    work = model.removesuffix("-draft")
    if model not in shipped() or work not in WORKS:
        raise FormeryError(f"{model} is no shipped model with examples of its own: give a file of prompts, --prompts.")
    return WORKS[work]().examples("test", limit=PROMPTS)


def advise(
    model: str,
    prompts: str | Sequence[Example] | None = None,
    draft: str | None = None,
    max_new_tokens: int = 64,
    seconds: float = 40.0,
    confirm: bool = False,
    methods: Sequence[str] | None = None,
    progress: Progress = quiet,
) -> Advice:
    """Profiles a model on this machine and says what would help.

    model: as `load` takes it. prompts: a file of them, or examples; by default those of a shipped model's own work.
    draft: for methods that need one; by default the one that ships. seconds: about as long the profile may take; slow
    models get fewer and shorter texts. confirm: run the best recommendations too. methods: the settings that are
    predicted, by default each lossless method in a few lengths. Raises FormeryError for an encoder, where there are no
    prompts, and where `load` does.
    """
    if max_new_tokens < 2:
        raise FormeryError(f"a text of {max_new_tokens} new tokens tells nothing of decoding; ask for 2 or more.")
    began, loaded = time.perf_counter(), writing(load(model), model)
    if prompts is None:
        given = own_examples(model)
    else:
        given = read_prompts(prompts, lines=loaded.reads_apart) if isinstance(prompts, str) else list(prompts)
    if not given:
        raise FormeryError("there are no prompts to profile the model on; give at least one.")
    advisor = _Advisor(model, loaded, given[:PROMPTS], draft, max_new_tokens, seconds, methods, progress)
    advice = advisor.advice()
    advice = replace(advice, seconds=time.perf_counter() - began)
    if confirm:
        best = advice.recommended[:TOP]
        for number, one in enumerate(best):
            progress(number, len(best), f"running {one.name}")
            sources = [known.source for known in advisor.known]
            found = measured(one, model, loaded, advisor.drafts, sources, advisor.settings.max_new_tokens)
            advice.confirmed.append(Confirmed(one, found))
    return advice


class _Advisor:
    """One profile under way."""

    def __init__(
        self,
        name: str,
        model: Model,
        examples: Sequence[Example],
        draft: str | None,
        max_new_tokens: int,
        seconds: float,
        methods: Sequence[str] | None,
        progress: Progress,
    ) -> None:
        self.name, self.model, self.seconds, self.progress = name, model, seconds, progress
        self.methods = methods
        self.notes: list[str] = []
        self._option = partial(option, name, draft)
        self.drafts = self._drafts(draft)
        self.steps, self.done = len(examples) + 4 + len(FORMS), 0
        self._build()
        prompts, self.shortened = fitted(model, [*self.drafts.values()], examples, max_new_tokens)
        self.sources = [encoded(model, prompt, number) for number, prompt in enumerate(prompts, 1)]
        self.settings = Settings(max_new_tokens=max_new_tokens, **never_written(model))  # type: ignore[arg-type]
        self.references = [self._reference(one) for one in examples]

    def _step(self, what: str) -> None:
        self.progress(self.done, self.steps, what)
        self.done += 1

    def _drafts(self, draft: str | None) -> dict[str, Model | Guide]:
        """What each method drafts with, where there is one."""
        found, missing = {}, []
        given = None if draft is None else load(draft)
        for method in lossless(self.model):
            if method.takes_draft:
                fits = given is not None and method.guided == isinstance(given, Guide)
                if not fits and method.needs_draft and method.draft_of(self.name) not in (*shipped(), *guides()):
                    missing.append(method.name)
                elif (own := draft_for(self.name, given if fits else None, method.name)) is not None:
                    found[method.name] = own
        if missing:
            self.notes.append(
                f"{', '.join(missing)}: needs a smaller model with this one's tokenizer, or a guide that was trained "
                "on it, and none ships: name one with --draft."
            )
        return found

    def _build(self) -> None:
        self.kernels = True
        try:
            build.build()
        except FormeryError as error:
            self.kernels = False
            self.notes.append(str(error))

    def _reference(self, example: Example) -> list[int]:
        """What a person wrote, as the decoder would have written it, as far as it fits."""
        tokenizer = self.model.tokenizer
        if tokenizer is None or not self.model.reads_apart:
            return []
        return tokenizer.encode(example.reference)[: full_length(self.model, START, self.settings)]

    def advice(self) -> Advice:
        """Measures everything, and puts it together."""
        self._learn()
        at = sorted(self.known, key=lambda one: len(one.prefix) + one.steps)[len(self.known) // 2]
        profile = self._profile(at)
        options = [*self._forms(at), *self._batches(), *self._methods(profile.calls)]
        self.progress(self.steps, self.steps, "done")
        return Advice(
            model=self.name,
            prompts=len(self.known),
            max_new_tokens=self.settings.max_new_tokens,
            tokens=sum(one.steps for one in self.known),
            shortened=self.shortened,
            profile=profile,
            options=options,
            notes=self.notes,
            cache_methods=sorted(paper.slug for paper in PAPERS.values() if paper.part == "cache"),
            seconds=0.0,
        )

    def _learn(self) -> None:
        """Decodes the prompts, and replays every method on each right after, so that a busy minute hits both alike."""
        # The first calls of a program are slow ones.
        brief = replace(self.settings, max_new_tokens=4)
        looks = [learn(self.model, self.sources[0], brief) for _ in range(3)]
        first = min(looks, key=lambda one: one.seconds)
        self._shorten(first)
        affordable = int(self.seconds / 40 / (first.call + first.rest))
        if affordable < self.settings.max_new_tokens:
            self.settings = replace(self.settings, max_new_tokens=max(LEAST_TOKENS, affordable))
        self.known: list[Known] = []
        self.replays: dict[str, list[Replay]] = {}
        drafters = dict(self._drafters())
        self._warm(drafters, brief)
        end = time.perf_counter() + 0.45 * self.seconds
        untried = set(drafters)
        for number, source in enumerate(self.sources):
            if number >= LEAST_PROMPTS and time.perf_counter() > end:
                break
            self._step(f"prompt {number + 1}")
            known = learn(self.model, source, self.settings, number)
            self.known.append(known)
            call = Standing(self.model, known, self.settings).call
            for name, make in drafters.items():
                # Each is tried once, unless that alone would take far longer than was asked for.
                if time.perf_counter() > end + (self.seconds if name in untried else 0):
                    continue
                self.progress(self.done, self.steps, f"prompt {number + 1}, {name}")
                untried.discard(name)
                done, called = self.replays.setdefault(name, []), call if find(name)[0].needs_draft else None
                if len(done) < ASKED or not done[-1].asked:
                    done.append(replay(self.model, known, make(), self.settings, called))
        if untried:
            self.notes.append(f"for want of time not tried: {', '.join(sorted(untried))}.")
        self.done = len(self.sources)

    def _warm(self, drafters: Mapping[str, Callable[[], Drafter]], brief: Settings) -> None:
        """Has what drafters are given ready: what is built once, such as an index, is no part of a text's time."""
        known = learn(self.model, self.sources[0], brief)
        for name, make in drafters.items():
            if find(name)[0].takes_draft:
                self.progress(0, self.steps, f"what {name} needs")
                replay(self.model, known, make(), brief)

    def _shorten(self, first: Known) -> None:
        """Cuts prompts down to their ends where reading one takes long, since they are read a hundred times."""
        times = first.prefill / (self.seconds / 200)
        if times > 1 and not self.model.reads_apart:
            room = max(LEAST_TOKENS, int(len(first.prefix) / times))
            begin = None if self.model.tokenizer is None else self.model.tokenizer.bos
            cut = [shortened(list(map(int, one)), room, begin) if len(one) > room else one for one in self.sources]
            self.shortened = max(self.shortened, sum(len(one) > room for one in self.sources))
            self.sources = cut

    def _drafters(self) -> Iterator[tuple[str, Callable[[], Drafter]]]:
        """The name of each setting of each lossless method, and what makes its drafter."""
        for method in lossless(self.model):
            make = drafter_of(method)
            if method.needs_draft and method.name not in self.drafts:
                continue
            if make is None:
                self.notes.append(f"{method.name} is no drafter on the shared loop: `formery compare` measures it.")
                continue
            own = {"draft": self.drafts[method.name]} if method.name in self.drafts else {}
            known = settings_of(method) if self.methods is None else self.methods
            for name in (one for one in known if find(one)[0] is method):
                yield name, partial(make, **find(name)[1], **own)

    def _profile(self, at: Known) -> Profile:
        self._step("calls of many widths")
        widest = max(max(one.widths) for some in self.replays.values() for one in some) if self.replays else 1
        calls, context = profile_cost.call_costs(self.model, at, self.settings, widest, 0.1 * self.seconds)
        self._step("contexts")
        contexts = None
        with suppress(FormeryError):  # a recurrent state, which costs the same at any context
            quick = int(0.05 * self.seconds / (calls.medians()[-1] / calls.at[-1]))
            most = min(LONGEST, (self.model.max_length or LONGEST) - 1, quick)
            if most > 2 * profile_cost.SHORT:
                contexts = profile_cost.context_costs(self.model, at, self.settings, most, 0.05 * self.seconds)
        self.scores = scores(self.model, self.known, self.references[: len(self.known)])
        return Profile(
            calls=calls,
            context=context,
            contexts=contexts,
            step_seconds=median(one.call + one.rest for one in self.known),
            prefill_seconds=median(one.prefill for one in self.known),
            weight_bytes=held([self.model]),
            read_bytes=profile_cost.bytes_read(self.model),
            streaming=profile_cost.streaming_read(),
            nats=float(self.scores.losses.mean()),
            sure=self.scores.sure,
            on=self.scores.on,
            state=state_bytes(self.model),
            positions=self.model.max_length,
        )

    def _forms(self, at: Known) -> list[Option]:
        """The compiled kernels against PyTorch's own, and the weights in fewer bits."""
        options, base, share = [], Standing(self.model, at, self.settings), 0.05 * self.seconds
        self._step("kernels")
        if self.kernels:
            timed = profile_cost.against(base, Standing(self.model, at, self.settings, mode=False), share)
            gained = rewriting(self.known, *timed, turned=True)
            options.append(self._option("kernels", "compiled kernels", gained, in_use=True))
            slower = rewriting(self.known, *timed)
            if slower.value > 1:
                options.append(self._option("kernels", "no compiled kernels", slower, load={"compile": False}))
        for name, how in FORMS.items():
            self._step(name)
            if any(isinstance(part, Codes) for part in self.model.modules()):
                self.notes.append(f"{name} is left out: the weights are codes of few bits already.")
                continue
            form = load(self.name, **how)
            gained = rewriting(self.known, *profile_cost.against(base, Standing(form, at, self.settings), share))
            cost = quality(self.scores, scores(form, self.known, self.references[: len(self.known)]))
            bytes_ = {"weight_bytes": held([form])}
            options.append(self._option("weights", name, gained, load=how, quality=cost, detail=bytes_))
        return options

    def _batches(self) -> list[Option]:
        self._step("batches")
        costs = profile_cost.batch_costs(self.model, self.known, self.settings, 0.15 * self.seconds)
        options = []
        for batch, state in list(zip(costs.calls.at, costs.state_bytes, strict=True))[1:]:
            gained = batching(self.known, costs, batch)
            detail = {"state_bytes": state, "one_takes": batch / gained.value}
            options.append(self._option("batch", f"batches of {batch}", gained, batch=batch, detail=detail))
        return options

    def _methods(self, calls: Costs) -> list[Option]:
        options = []
        for name, replays in self.replays.items():
            known, drafted = self.known[: len(replays)], sum(one.drafted for one in replays)
            detail = {
                "calls_per_token": sum(len(one.widths) for one in replays) / sum(one.steps for one in known),
                "accepted": sum(one.accepted for one in replays) / max(1, drafted),
                "drafting_seconds": sum(one.drafting for one in replays) / sum(one.steps for one in known),
                "prompts": len(known),
            }
            gained = drafting(known, replays, calls)
            options.append(self._option("method", name, gained, method=name, detail=detail))
        return options
