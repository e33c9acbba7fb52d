"""A2SF: attention that was paid long ago counts for less in what stays in the cache.

Jo and Shin, "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
2024. Adding up the attention that each token has been paid (as H2O does) favours old tokens, since under a causal mask
more queries have looked at them. A2SF lets the sum fade:

    score = forget · score + weights        for each query; forget = 1: plain accumulation

so that tokens are compared by what recent queries made of them. The paper reports up to 7.8 points more accuracy of
LLaMA-2 with one example, 5.1 with none, than plain accumulation with a cache of the same size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.checks import criterion, model_named, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.method import Method, register
from formery.methods.cache.evict import bounded, evicting
from formery.methods.cache.keeping import (
    LENGTH,
    MODEL,
    SMALLER,
    bytes_saved,
    gain,
    rows,
    survey,
    texts,
    whole_is_whole,
)
from formery.parts.bounded import BoundedKeyValues
from formery.parts.eviction import Eviction, HeavyHitters, Held, Latest

FORGET = (0.5, 0.9, 0.99)
SHARES = (4, 8)


@dataclass(frozen=True)
class Fading(Eviction):
    """`score = forget · score + weights`, and the latest `recent` of the budget always stay.

    forgets: what is left of a score after one query, from 0 (the latest query alone counts) to 1 (all count alike).
    """

    forgets: float = 0.9
    recent: float = 0.0
    apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.forgets <= 1 or not 0 <= self.recent < 1:
            raise FormeryError(
                f"scores fade to between 0 and 1 of what they were, not {self.forgets}, and the latest take from 0 to "
                f"less than all of the budget, not {self.recent}."
            )

    @property
    def memory(self) -> float | None:
        return self.forgets

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return held.notes.masked_fill(held.age < round(self.recent * held.budget), torch.inf)


METHOD = register(
    Method(
        "a2sf",
        "keeps what recent queries paid most attention to in the cache",
        lossless=False,
        make=evicting(Fading),
        variants=("budget=128:forgets=0.9", "budget=128:forgets=0.99"),
        paper="a2sf",
    )
)


@torch.inference_mode()
def bias(forget: float, seed: int) -> dict[str, float]:
    """The rank correlation of a token's score with its age when a text was read: mean over rows, heads and layers."""
    model = bounded(model_named(MODEL), Fading(forget), LENGTH)
    read, found = texts(seed), []
    state, _ = model.begin([row[:1].tolist() for row in read.tokens], LENGTH)
    model.read(read.tokens[:, :LENGTH], state, read.positions[:, :LENGTH])
    for layer in state.layers.values():
        assert isinstance(layer, BoundedKeyValues)
        held = layer.bands[0][1].held
        assert held.notes is not None
        # The last tokens have been looked at too seldom to be compared, by any rule.
        scores = held.notes[:, :, : LENGTH - 64]
        ranks = scores.argsort(-1).argsort(-1).double()
        ages = torch.arange(ranks.shape[-1], 0, -1, dtype=torch.float64)
        pair = torch.stack((ranks.flatten(0, 1), ages.expand_as(ranks).flatten(0, 1)), 1)
        centred = pair - pair.mean(-1, keepdim=True)
        norms = centred.norm(dim=-1)
        found.append((centred[:, 0] * centred[:, 1]).sum(-1) / (norms[:, 0] * norms[:, 1]))
    return {"age_correlation": float(torch.cat(found).mean())}


def check(budget: Budget) -> Measured:
    """Fading scores against scores that add up, a window, and H2O, which keeps both."""
    fading = {f"a2sf {forget:g}": (lambda layer, forget=forget: Fading(forget)) for forget in FORGET}
    rules = {**fading, "a2sf 1 (adding up)": lambda layer: Fading(1.0), "h2o": lambda layer: HeavyHitters()}
    found = survey(budget, {**rules, "window": lambda layer: Latest()}, SHARES)
    ages = {
        forget: [
            float(budget.units.measure(f"age, {forget:g}, seed {seed}", partial(bias, forget, seed))["age_correlation"])
            for seed in budget.seeds
        ]
        for forget in (0.9, 1.0)
    }
    best = best_of(found, list(fading))
    return Measured(
        [
            whole_is_whole(budget, lambda layer: Fading()),
            bytes_saved(found, best, 8),
            criterion(
                "bias",
                "scores that add up rank tokens by age more than fading ones do (rank correlations, in magnitude)",
                [abs(one) - abs(other) for one, other in zip(ages[1.0], ages[0.9], strict=True)],
                ">",
                0.0,
            ),
            *(
                criterion(
                    f"loss, 1/{share}",
                    f"at 1/{share} of the cache, with the best of {len(FORGET)} factors ({best}), prose costs less "
                    "than with scores that add up, in nats a token",
                    gain(found, "loss", (best, share), ("a2sf 1 (adding up)", share)),
                    "<",
                    0.0,
                )
                for share in SHARES
            ),
            *(
                criterion(
                    f"loss against {other}",
                    f"at 1/8 of the cache prose costs less than with {other}",
                    gain(found, "loss", (best, 8), (other, 8)),
                    "<",
                    0.0,
                )
                for other in ("h2o", "window")
            ),
            criterion(
                "answers",
                "at 1/8 of the cache more questions are answered than with scores that add up",
                gain(found, "answered", (best, 8), ("a2sf 1 (adding up)", 8)),
                ">",
                0.0,
            ),
            untestable(
                "accuracy",
                "LLaMA-2 gains up to 7.8 points of accuracy with one example, 5.1 with none",
                ">",
                0.0,
                "needs LLaMA-2 and its benchmarks",
            ),
        ],
        rows(found),
        baseline="the same model with its whole cache",
        models=[MODEL, SMALLER],
        notes=[
            f"Texts of {LENGTH:,} tokens; scores decide at each step once the budget is full, in the prompt too.",
            f"`{best}` is the factor with the lowest median loss at 1/8 of the {len(FORGET)} that were tried.",
            "Rank correlations of score and age at the end of a text: "
            + "; ".join(
                f"factor {forget:g}: {', '.join(f'{one:.2f}' for one in ones)}" for forget, ones in ages.items()
            )
            + ".",
        ],
    )


def best_of(found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]], names: Sequence[str]) -> str:
    """The rule with the lowest median loss at 1/8 of the cache."""
    return min(names, key=lambda name: sorted(float(one["loss"]) for one in found[name, 8])[len(found[name, 8]) // 2])


PAPER = publish(
    Paper(
        slug="a2sf",
        title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
        year=2024,
        part="cache",
        domain="language",
        does="Keeps a bounded key-value cache by attention scores that fade: older tokens no longer win only because "
        "more queries have looked at them.",
        claims="LLaMA-2 gains up to 7.8% accuracy with one example and 5.1% with none over scores that only add up, at "
        "the same cache size.",
        needs="A language model such as LLaMA-2 or OPT.",
        name="A2SF",
        training="none",
        sought="KV cache eviction; keep important tokens only; run long prompts in limited memory; H2O improvement",
        related={
            "tova": "which cached tokens stay",
            "tidaldecode": "few tokens attended to",
            "sparse-frontier": "sparse attention without training",
            "porag-atlas-critic": "cache kept by importance",
        },
        added="2026-11-28",
        check=check,
        works=("long",),
    )
)
