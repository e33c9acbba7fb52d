"""Big little decoder: a small model writes until it is unsure; the large one checks, and takes back what is far off.

Kim, Mangalam, Moon, Malik, Mahoney, Gholami and Keutzer, "Speculative Decoding with Big Little Decoder", 2023. Two
thresholds decide who writes:

    fallback: the small model writes token by token while `max p_small >= fallback`, at most `length` tokens;
              then the large one reads all of them in a single call and adds a token of its own
    rollback: from the first token on with `-log p_large(token) > rollback` everything is taken back, and the large
              model's likeliest token stands there instead

so that small differences of taste stand: the text is not the large model's own. The small model is left as it is here;
the paper also trains it on the large one's texts. By sampling, guesses are drawn and tested as in speculative sampling,
and the distribution is the large model's. The paper reports up to 2.12 times faster decoding on a T4 at little loss.
"""

from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.checks import criterion, rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Draft, Row
from formery.generate.drafters import ModelDrafter
from formery.generate.method import Method, drafting, register
from formery.generate.relaxed import Rollback
from formery.methods.decoding.draft.checks import (
    faster_at_little_loss,
    fewer_calls,
    qualities,
    quality_rows,
    surveyed,
)
from formery.models import Model


class BigLittleDrafter(ModelDrafter):
    """Drafts with a small model until the largest probability of its next token is below `fallback`."""

    def __init__(self, draft: Model, length: int = 10, fallback: float = 0.6):
        if not 0 <= fallback <= 1:
            raise FormeryError(f"fallback is a probability between 0 and 1, not {fallback}.")
        super().__init__(draft, length)
        self.fallback = fallback

    def _choose(self, i: int, row: Row, draft: Draft, logits: Float[Tensor, "vocabulary"]) -> int | None:
        # Of the model's own distribution, not of what will be drawn: a draft's end must not favour any token.
        if float((logits.amax() - logits.logsumexp(-1)).exp()) < self.fallback:
            return None
        return super()._choose(i, row, draft, logits)


METHOD = register(
    Method(
        "bild",
        "a small model writes until it is unsure; a large one checks and takes back what is too far off",
        lossless=False,
        make=drafting(BigLittleDrafter, Rollback),
        variants=("fallback=0.6:rollback=2", "fallback=0.6:rollback=inf"),
        paper="bild",
    )
)


def check(budget: Budget) -> Measured:
    """A sweep of both thresholds, rollback off, and exact speculative sampling, against the large model alone."""
    sweep = [f"{METHOD.name}:fallback={fallback:g}:rollback=2" for fallback in (0.3, 0.6, 0.9)]
    sweep.append(f"{METHOD.name}:fallback=0.6:rollback=5")
    off, exact = f"{METHOD.name}:fallback=0.6:rollback=inf", "speculative-sampling:length=4"
    results = surveyed(budget, [*sweep, off, exact])
    own = [one for one in results if one.setting.method in sweep]
    scores = qualities(budget, ["greedy", *sweep, off, exact], "translate")
    calls = {
        method: sum(one.values["calls_per_token"] for one in results if one.setting.method == method)
        for method in (sweep[1], off, exact)
    }
    factor = untestable(
        "factor",
        "translators and summarisers of T5's size are up to 2.12 times as fast on a T4",
        ">=",
        2.12,
        "needs such models and such a card, on which a call costs the reading of the weights",
        essential=True,
    )
    return Measured(
        [
            *faster_at_little_loss(results, scores, sweep, "translate", faster=1.5, loss=0.5),
            *fewer_calls(own),
            criterion(
                "rollback keeps quality",
                f"without rollback translations lose more BLEU than with it ({sweep[1]}); the difference",
                [scores[sweep[1]] - scores[off]],
                ">",
                0.0,
            ),
            criterion(
                "fewer calls than exactly",
                f"the large model is called less often than by {exact} ({sweep[1]}); the ratio, over works and batches",
                [calls[sweep[1]] / calls[exact]],
                "<",
                1.0,
            ),
            factor,
        ],
        [*rows(results), *quality_rows(scores, "translate")],
        baseline="greedy decoding by the large model, token by token",
        models=[*PAPER.works, *(METHOD.draft_of(work) for work in PAPER.works)],
        notes=[
            "The small models ship with the large ones and were trained on the same texts, not on what the large ones "
            "write.",
            "BLEU is of whole test translations; the speeds are of the few texts of the other rows.",
        ],
    )


PAPER = publish(
    Paper(
        slug="bild",
        title="Speculative Decoding with Big Little Decoder",
        year=2023,
        part="decoding",
        domain="translation",
        does="A small model writes while it is sure of its tokens; a large one then reads them all in one call, and "
        "takes back everything from the first token on that it finds too unlikely.",
        claims="Translation and summarisation are up to 2.12 times faster on a T4 with minimal loss of quality, and "
        "neither model is trained anew or changed.",
        needs="Models of T5's size and a T4, for the size of the speed-up.",
        name="BiLD",
        training="added",
        sought="big little decoder; small model writes and big model corrects; accept small quality loss for speed",
        related={
            "speculative-sampling": "a small and a large model together",
            "specdec": "a looser rule of acceptance",
            "mue": "cheap where it is sure",
            "hybrid-decoding": "a light decoder and a check",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
