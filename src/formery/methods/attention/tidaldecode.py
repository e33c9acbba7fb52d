"""TidalDecode: tokens that matter are looked up in two layers; all layers behind attend to these alone.

Yang, Zhang, Chen, Li and Jia, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
2024 (ICLR 2025), algorithm 1. A prompt is read with full attention. Of each token written then, the first two layers
see everything; the third does too, and keeps the slots of its `budget` largest attention weights; the layers behind it
read the keys and values of those slots alone, until one layer in the middle sees everything and chooses anew.

The premise is that consecutive layers look at the same tokens. The paper reports quality close to full attention, and
up to 2.1 times lower latency on models of 32 and 64 layers. Its code chooses for each query head; here heads that share
keys and values share the slots too, which are chosen by the sum of their weights, so that each is read once. The
periodic correction of the cache, which the paper leaves off in its experiments, is left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.checks import criterion, model_named, untestable
from formery.evidence.choices import random_asked
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.recalling import questions
from formery.generate import generate
from formery.generate.draft import NoDraft
from formery.generate.method import Method, register
from formery.generate.settings import Settings
from formery.generate.verify import Decoding, Event, draft_and_verify
from formery.methods.attention.comparing import (
    ENOUGH,
    TASKS,
    TEXT,
    among,
    attentions,
    common,
    due,
    layers_of,
    less,
    means,
    on_answers,
    plainly,
    steps,
    survey,
    whole,
)
from formery.models import Decoder, EncoderDecoder, Model, Source
from formery.models.phased import Phased, phased
from formery.parts import Attention, Context, Part
from formery.parts.asking import Asked, Chosen
from formery.parts.selection import Largest, Pages, Recent
from formery.parts.selective import Asking

FULL = 2  # layers at the beginning that see everything; the next one chooses

MODEL = "long"
LENGTHS, LONG, BUDGETS = (512, 1024, 2048), 8192, (16, 32, 64, 128, 256)
SMALL, LARGE = 64, 256  # budgets that the criteria speak of
TIMED = tuple(product((LENGTHS[-1], LONG), (SMALL, LARGE)))
PAGE = 16


@dataclass
class Latest:
    """What was chosen last in a pass; None: everything."""

    chosen: Chosen | None = None


def latest(context: Context) -> Latest:
    """What was chosen last in this pass."""
    return context.once("latest chosen", Latest)


class Choosing(Asking):
    """An attention to everything that chooses, for each written token, the `budget` slots that it looks at most."""

    def __init__(self, attention: Attention, budget: int):
        super().__init__(attention)
        self.budget = budget

    def mixed(self, asked: Asked, context: Context) -> Float[Tensor, "batch head time value"]:
        if self.budget >= asked.keys.shape[2] or not bool(asked.written.any()):
            latest(context).chosen = None
            return asked.everything()
        mixed, weights = asked.weighed()
        latest(context).chosen = Chosen.largest(asked.grouped(weights), asked.allowed, self.budget)
        return mixed


class Following(Asking):
    """An attention of which written tokens see only what a layer before has chosen last."""

    def mixed(self, asked: Asked, context: Context) -> Float[Tensor, "batch head time value"]:
        chosen = latest(context).chosen
        if chosen is None:
            return asked.everything()
        if asked.writing:
            return chosen.attended(asked)
        return asked.only(chosen.mask(asked.keys.shape[2]) | ~asked.written[:, None, :, None])


def tidal(model: Decoder, budget: int, again: int | None = None) -> Phased:
    """A twin of `model` that writes so.

    again: the layer, counted from 0, that chooses anew; by default the one in the middle of those that follow, and none
    does where it is the one that chooses first. Raises FormeryError for a budget below 1 and a layer that is not there.
    """
    if budget < 1:
        raise FormeryError(f"tidaldecode's budget is of at least 1 token, not of {budget}.")
    places = [part for _, part in model.layers.named_modules(remove_duplicate=False) if isinstance(part, Attention)]
    if len(set(places)) < len(places):
        raise FormeryError("tidaldecode counts layers, but this model runs the same attention in several of them.")
    middle = (FULL + len(places)) // 2
    chosen = middle if again is None else again
    if again is not None and not FULL <= again < max(len(places), FULL + 1):
        raise FormeryError(f"again={again} is no layer that chooses: they go from {FULL} to {len(places) - 1} here.")

    def change(attention: Attention, number: int) -> Part:
        if number < FULL:
            return attention
        return Choosing(attention, budget) if number in (FULL, chosen) else Following(attention)

    return phased(model, change)


def decoding(budget: int = 256, again: int | None = None) -> Decoding:
    """How `tidaldecode` decodes."""

    def decode(model: Model, prompts: Sequence[Source], settings: Settings, first: int) -> Iterator[list[Event]]:
        if isinstance(model, EncoderDecoder):
            raise FormeryError(
                "tidaldecode is for decoders: it chooses among the tokens of the text that is continued."
            )
        return draft_and_verify(tidal(model, budget, again), prompts, settings, first, NoDraft())

    if budget < 1:
        raise FormeryError(f"tidaldecode's budget is of at least 1 token, not of {budget}.")
    return decode


METHOD = register(
    Method(
        "tidaldecode",
        "two layers choose the tokens that all layers behind them attend to",
        lossless=False,
        make=decoding,
        variants=("budget=64", "budget=256"),
        paper="tidaldecode",
        kinds=("decoder",),
    )
)


def variants(model: Decoder) -> dict[str, Phased]:
    """All that are compared: each of them sees everything in the first two layers."""
    made = {}
    for budget in BUDGETS:
        made[f"tidaldecode, {budget}"] = tidal(model, budget)
        made[f"largest in each layer, {budget}"] = among(model, Largest(budget), FULL)
        made[f"pages, {budget}"] = among(model, Pages(budget, PAGE), FULL)
        made[f"window and sinks, {budget}"] = among(model, Recent(budget), FULL)
    for again in range(FULL, layers_of(model)):
        made[f"tidaldecode, {SMALL}, chosen anew in layer {again}"] = tidal(model, SMALL, again)
    return {"full attention": whole(model)} | {name: plainly(one) for name, one in made.items()}


def answered(model: Decoder, length: int, seed: int, number: int) -> dict[str, Any]:
    """The share of answers that each variant gets right, its loss on text, and what the layers have in common."""
    made, dues = variants(model), due(model, length, seed, number)
    reader = made["full attention"]
    found = survey(reader, made, dues)
    for one in dues:
        for name, value in common(model, reader, one, SMALL, FULL).items():
            found.setdefault(f"overlap|{name}", []).append(value)
    return means(found)


def same(model: Decoder, number: int, tokens: int) -> dict[str, Any]:
    """Whether a budget that holds the whole text writes the very tokens of full attention."""
    assert model.tokenizer is not None
    prompts = [due.prompt for task in TASKS for due in questions(model.tokenizer, 512, task, number, 0)]
    plain, own = (
        generate(model, prompts, name, max_new_tokens=tokens) for name in ("greedy", "tidaldecode:budget=8192")
    )
    return {"same": sum(a.tokens == b.tokens for a, b in zip(plain, own, strict=True)) / len(prompts)}


def timed(model: Decoder, length: int, budget: int, rounds: int) -> dict[str, Any]:
    """Seconds of full attention over those of TidalDecode behind so many tokens: a step, and one attention alone."""
    own = plainly(tidal(model, budget))
    part = next(part for part in own.modules() if isinstance(part, Following)).attention
    asked = random_asked(part.groups, part.dim, length)
    chosen = Chosen.largest(torch.rand(1, part.groups, 1, length), asked.allowed, budget)
    return {
        "step": steps(whole(model), own, length, rounds),
        "attention": attentions(chosen.attended, asked, rounds),
    }


def reads(name: str, length: int, layers: int) -> float:
    """The share of all keys and values that a token reads, those that serve to choose counted."""
    if name == "full attention":
        return 1.0
    kind, budget = name.split(", ")[:2]
    part = min(1.0, int(budget) / length)
    if kind == "tidaldecode":
        own = FULL + 1 if name.endswith(f"layer {FULL}") else FULL + 2
        return (own + (layers - own) * part) / layers
    # To choose, every key is read, or of each page a least and a greatest entry, as much as one key and one value.
    extra = {"largest in each layer": (1 - part) / 2, "pages": 1 / PAGE}.get(kind, 0.0)
    return (FULL + (layers - FULL) * min(1.0, part + extra)) / layers


@torch.inference_mode()
def check(budget: Budget) -> Measured:
    """TidalDecode against full attention and three ways to choose in each layer, on answers and on text."""
    model = model_named(MODEL)
    units, number = budget.units, 2 * budget.examples
    units.expect(1 + len(LENGTHS) * len(budget.seeds) + len(TIMED))
    exact = units.measure("a budget for everything", lambda: same(model, 1, budget.max_new_tokens))
    found, times = dict[tuple[int, int], Any](), dict[tuple[int, int], Any]()
    for length, seed in product(LENGTHS, budget.seeds):
        run = partial(answered, model, length, seed, number)
        found[length, seed] = units.measure(f"answers at {length}, seed {seed}", run)
    for length, most in TIMED:
        run = partial(timed, model, length, most, budget.rounds)
        times[length, most] = units.measure(f"times at {length}, {most} tokens", run)
    longest, layers = LENGTHS[-1], layers_of(model)

    def right(name: str, length: int = longest) -> list[float]:
        """The share of answers that are right, for each seed."""
        return [sum(found[length, seed][f"{name}|{task}"] for task in TASKS) / len(TASKS) for seed in budget.seeds]

    def loss(name: str) -> list[float]:
        return [found[longest, seed][f"{name}|{TEXT}"] for seed in budget.seeds]

    own, none = f"tidaldecode, {SMALL}", f"tidaldecode, {SMALL}, chosen anew in layer {FULL}"
    rivals = {name: f"{name}, {SMALL}" for name in ("largest in each layer", "pages", "window and sinks")}
    lost, more = less(right("full attention"), right(own)), less(loss(f"tidaldecode, {LARGE}"), loss("full attention"))
    gain = {name: less(right(own), right(rival)) for name, rival in rivals.items()}
    places = [f"overlap|layer {layer} and the layer before" for layer in range(FULL + 1, layers)]
    overlap = [found[longest, seed][place] for seed in budget.seeds for place in places]
    step = times[LONG, SMALL]["step"]
    able = sum(right("full attention")) >= ENOUGH * len(budget.seeds)
    criteria = [
        criterion("exact", "a budget for all tokens writes those of full attention", [exact["same"]], "==", 1.0, True),
        criterion("premise", f"layers share half of their {SMALL} tokens with the layer before", overlap, ">=", 0.5),
        on_answers(
            able, "answers", f"{SMALL} of {longest} tokens cost at most 5 of 100 answers", lost, "<=", 0.05, True
        ),
        criterion("text", f"{LARGE} of {longest} tokens cost at most 0.02 nats a token of text", more, "<=", 0.02),
        criterion(
            "largest", "choosing in every layer gains at most 5 of 100", gain["largest in each layer"], ">=", -0.05
        ),
        on_answers(able, "pages", "it gives at least as many answers as pages", gain["pages"], ">=", 0.0),
        on_answers(able, "window", "it gives more answers than window and sinks", gain["window and sinks"], ">", 0.0),
        criterion(
            "again", "choosing anew in the middle lowers the loss of text", less(loss(none), loss(own)), ">", 0.0
        ),
        criterion("faster", f"{SMALL} of {LONG} tokens make a step faster than full attention", step, ">", 1.0),
        untestable("latency", "up to 2.1 times lower latency", ">=", 2.1, "needs 32 layers and a kernel on a GPU"),
    ]
    rows = []
    for length, name in product(LENGTHS, dict.fromkeys(key.split("|")[0] for key in found[longest, budget.seeds[0]])):
        some = [found[length, seed] for seed in budget.seeds]
        keys = {key: key.split("|")[1] for key in some[0] if key.split("|")[0] == name}
        numbers = {own_name: spread([one[key] for one in some]) for key, own_name in keys.items()}
        if name != "overlap":
            numbers |= {"answered": spread(right(name, length)), "reads": spread([reads(name, length, layers)])}
        rows.append(Row("long", f"{name}, at {length}", 1, numbers))
    for (length, most), values in times.items():
        numbers = {f"{name}, full over own seconds": spread(values[name]) for name in values}
        rows.append(Row("long", f"tidaldecode, {most}, behind {length}", 1, numbers))
    return Measured(
        criteria,
        rows,
        baseline="full attention of the same model, behind the same reading of the prompt",
        models=[MODEL],
        notes=[
            "Four of the six layers here read everything (two at first, two that choose), so that a token reads at "
            "least two thirds of all keys and values, and no step can be more than 1.5 times as fast.",
            "An answer is right where each of its tokens is the likeliest behind those before it, which is when greedy "
            "decoding writes it. `tokens` is the share of single tokens of answers that are right, `loss` that of 64 "
            "tokens of WikiText-2 behind a prompt of the rest of the length, `reads` the share of all keys and values.",
            "Steps are timed without the compiled kernels on both sides: those know no chosen slots. One layer's "
            "attention alone is timed beside them; in a step of so small a model calls weigh more than reading.",
            "Keys and values that are not read stay in memory: the cache is as large as with full attention.",
        ],
    )


PAPER = publish(
    Paper(
        slug="tidaldecode",
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        year=2024,
        part="attention",
        domain="language",
        does="Decodes long contexts faster: two layers look at everything and choose the few tokens that matter, and "
        "all following layers attend to these alone, chosen anew once in the middle.",
        claims="Quality close to full attention with up to 2.1 times lower latency.",
        needs="A language model of 32 layers for long contexts, and a kernel for the factor.",
        name="TidalDecode",
        training="none",
        sought="sparse attention in decoding; pick important tokens once per step; faster long-context generation",
        related={
            "sparse-frontier": "sparse attention without training",
            "tova": "few tokens kept",
            "masformer": "full attention in few layers",
            "spark-transformer": "attention to few tokens",
        },
        added="2026-11-28",
        check=check,
        works=("long",),
    )
)
