"""Decoding with a bounded cache: the shared form of methods that say which keys and values stay.

A method is a rule of eviction (`parts/eviction.py`) and a line here: `register(Method(NAME, …, make=evicting(Rule)))`.
The baselines that nobody's paper is about here are registered below: window, sinks, random, and heavy hitters (H2O).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from torch import nn

from formery.errors import FormeryError
from formery.generate.method import Method, bound, find, register
from formery.generate.settings import Settings
from formery.generate.verify import Decoding, Event
from formery.models import Model, Source
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.bounded import Bounded, Compacted, Original
from formery.parts.eviction import Anything, Eviction, HeavyHitters, Latest, Sinks
from formery.parts.mask import Everything

Whole = TypeVar("Whole", bound=nn.Module)
Budgets = int | Sequence[int | Sequence[int]]  # one for all, or one for each layer, or for each head of each layer


def bounded(
    model: Whole,
    rule: Eviction | Callable[[int], Eviction],
    budget: Budgets,
    block: int = 1,
    compacted: bool = False,
) -> Whole:
    """The same model, with the very same weights, whose self-attention keeps `budget` slots a head.

    rule: for all layers, or what makes one for each layer's number. budget: for all layers, or one for each, which may
    have one for each head. block, compacted: as in `Bounded`. Raises FormeryError where there is no self-attention to
    bound, or budgets do not fit.
    """

    def change(part: Attention, number: int) -> Attention:
        if isinstance(part.mask, Everything):  # an encoder reads its text at once, and remembers nothing
            return part
        own = budget if isinstance(budget, int) else budget[number]
        chosen = rule if isinstance(rule, Eviction) else rule(number)
        return Bounded.of(part, chosen, own, block, Compacted() if compacted else Original())

    try:
        return rewritten(model, Attention, change)
    except (ValueError, IndexError) as error:
        raise FormeryError(f"these budgets do not fit this model: {error}.") from error


def evicting(rule: Callable[..., Eviction]) -> Callable[..., Decoding]:
    """The decoding that a rule makes; its options are the rule's, and these.

    budget: slots a head keeps. block: after how many tokens slots are given up. compacted: whether positions are
    counted within the cache. by: the method that decodes with it, "greedy" or one that drafts chains.
    """

    def make(
        budget: int = 256, block: int = 1, compacted: bool = False, by: str = "greedy", **options: Any
    ) -> Decoding:
        if budget < 1 or block < 1:
            raise FormeryError(
                f"a cache of {budget} slots, in blocks of {block} tokens, keeps nothing; give 1 or more."
            )
        chosen, named = find(by)
        if chosen.needs_draft:
            raise FormeryError(f"{by} needs a second model; a bounded cache is decoded by methods that need none.")
        decode, kept = bound(chosen, named), partial(rule, **options)
        kept()  # complains of bad options before any work

        def limited(model: Model, prompts: Sequence[Source], settings: Settings, first: int) -> Iterator[list[Event]]:
            yield from decode(bounded(model, _layered(kept), budget, block, compacted), prompts, settings, first)

        return limited

    own = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in inspect.signature(rule).parameters.values()]
    known = [one for one in inspect.signature(make).parameters.values() if one.name != "options"]
    make.__signature__ = inspect.Signature([*known, *own])  # type: ignore[attr-defined]
    return make


def _layered(rule: Callable[[], Eviction]) -> Callable[[int], Eviction]:
    """What is drawn at random is drawn for each layer by itself."""

    def make(layer: int) -> Eviction:
        made = rule()
        return Anything(made.seed * 1009 + layer) if isinstance(made, Anything) else made

    return make


METHODS = (
    register(
        Method("cache-window", "keeps the latest tokens in the cache", lossless=False, make=evicting(Latest)),
    ),
    register(
        Method(
            "cache-sinks", "keeps the first and the latest tokens in the cache", lossless=False, make=evicting(Sinks)
        ),
    ),
    register(
        Method("cache-random", "keeps tokens drawn at random in the cache", lossless=False, make=evicting(Anything)),
    ),
    register(
        Method(
            "cache-h2o",
            "keeps the latest tokens, and those that were paid most attention",
            lossless=False,
            make=evicting(HeavyHitters),
        ),
    ),
)
