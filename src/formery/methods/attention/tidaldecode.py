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

from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.generate.draft import NoDraft
from formery.generate.method import Method, register
from formery.generate.settings import Settings
from formery.generate.verify import Decoding, Event, draft_and_verify
from formery.models import Decoder, EncoderDecoder, Model, Source
from formery.models.phased import Phased, phased
from formery.parts import Attention, Context, Part
from formery.parts.asking import Asked, Chosen
from formery.parts.selective import Asking

FULL = 2  # layers at the beginning that see everything; the next one chooses


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
    does where it is the layer that chooses first. Raises FormeryError for a budget below 1 and a layer that there is not.
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
