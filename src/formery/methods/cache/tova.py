"""TOVA: the token that the latest query looks at least is dropped from a full cache.

Oren, Hassid, Yarden, Adi and Schwartz, "Transformers are Multi-State RNNs", 2024. A decoder is a recurrent network
whose state grows by a key and a value for each token; with a bound on it, it is an ordinary one. TOVA ("token omission
via attention") bounds it without training: when a layer holds more than `budget` tokens, the one with the smallest
weight in the attention of the current query, averaged over the heads, goes. No window, no first token is protected.

The paper reports that this beats window, window with first tokens, and H2O on long-range tasks of 7 B models, nearly on
par with the whole cache, in some cases with an eighth of it.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.method import Method, register
from formery.methods.cache.evict import evicting
from formery.methods.cache.keeping import (
    LENGTH,
    MODEL,
    RULES,
    SHARES,
    SMALLER,
    bytes_saved,
    foreseen,
    gain,
    rows,
    survey,
    whole_is_whole,
)
from formery.parts.eviction import Eviction, Held


@dataclass(frozen=True)
class Tova(Eviction):
    """`score = attention of the latest query, averaged over the heads`."""

    forget: ClassVar[float | None] = 0.0

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return held.notes


METHOD = register(
    Method(
        "tova",
        "drops what the latest query looks at least from the cache",
        lossless=False,
        make=evicting(Tova),
        variants=("budget=128", "budget=256"),
        paper="tova",
    )
)


def check(budget: Budget) -> Measured:
    """TOVA against the rules that the paper names, on prose and on questions far back."""
    found = survey(budget, {"tova": lambda layer: Tova(), **RULES})
    for share in SHARES:
        found["oracle", share] = [
            budget.units.measure(f"oracle, 1/{share}, seed {seed}", partial(foreseen, LENGTH // share, seed))
            for seed in budget.seeds
        ]
    others = [name for name in RULES if name != "random"]
    return Measured(
        [
            whole_is_whole(budget, lambda layer: Tova()),
            bytes_saved(found, "tova", 8),
            *(
                criterion(
                    f"loss, {name}",
                    f"at 1/8 of the cache prose costs less than with {name}, in nats a token",
                    gain(found, "loss", ("tova", 8), (name, 8)),
                    "<",
                    0.0,
                )
                for name in others
            ),
            *(
                criterion(
                    f"answers, {name}",
                    f"at 1/8 of the cache at least as many questions are answered as with {name}",
                    gain(found, "answered", ("tova", 8), (name, 8)),
                    ">=",
                    0.0,
                )
                for name in others
            ),
            criterion(
                "on par, loss",
                "with 1/8 of the cache prose costs at most 0.05 nats a token more than with all of it",
                gain(found, "loss", ("tova", 8), ("whole cache", 1)),
                "<=",
                0.05,
            ),
            criterion(
                "on par, answers",
                "with 1/8 of the cache at most a tenth fewer questions are answered than with all of it",
                gain(found, "answered", ("tova", 8), ("whole cache", 1)),
                ">=",
                -0.1,
            ),
            criterion(
                "equal bytes",
                "with 1/4 of the cache prose costs less than in a smaller dense model with a cache of the same bytes",
                gain(found, "loss", ("tova", 4), ("smaller dense model", 4)),
                "<",
                0.0,
            ),
            untestable(
                "long-range tasks",
                "on summaries and questions about books models of 7 B parameters do as well with 1/8 of the cache",
                ">=",
                0.0,
                "needs models of that size and length",
            ),
        ],
        rows(found),
        baseline="the same model with its whole cache",
        models=[MODEL, SMALLER],
        notes=[
            f"Texts of {LENGTH:,} tokens; rules drop a token at each step once the budget is full, in prompts too.",
            "`answered` counts a question whose whole answer greedy decoding writes; seeds choose texts and questions.",
            "The oracle keeps what the whole model's coming queries will look at; it knows the text to its end.",
        ],
    )


PAPER = publish(
    Paper(
        slug="tova",
        title="Transformers are Multi-State RNNs",
        year=2024,
        part="cache",
        domain="language",
        does="Bounds the key-value cache of a trained model: in every layer, each step drops the token to which the "
        "newest query pays least attention, with no window or first tokens protected.",
        claims="Better than all other rules for what to keep on long tasks, and nearly as good as the whole cache with "
        "an eighth of it.",
        needs="A language model such as LLaMA-2 or Mistral, long texts.",
        name="TOVA (multi-state RNN)",
        training="none",
        sought="fixed-size KV cache for any pretrained LLM; drop least attended tokens; long generation out of memory",
        related={
            "a2sf": "which cached tokens stay",
            "tidaldecode": "few tokens attended to",
            "retrieval-heads": "which heads need the whole cache",
            "retnet": "a state that does not grow",
        },
        added="2026-11-28",
        check=check,
        works=("long",),
    )
)
