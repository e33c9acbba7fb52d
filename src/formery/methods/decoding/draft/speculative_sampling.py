"""Speculative sampling: a small model drafts, the large one checks the draft in a single call.

Chen, Borgeaud, Irving, Lespiau, Sifre and Jumper, "Accelerating Large Language Model Decoding with
Speculative Sampling", 2023. The draft model proposes `length` tokens one by one; the target scores them all,
and the place after them, at once. Token x, drawn from draft[x], stands with probability `min(1, target[x] /
draft[x])`; at the first that falls, a replacement is drawn from `max(0, target - draft)`, normalised
(algorithm 2); if none falls the target adds a token of its own. What comes out is distributed exactly as the
target alone would have it. Greedily the rule reads: a draft token stands while it is the target's own choice.

The paper reports 2 to 2.5 times faster decoding of a model of 70 billion parameters on accelerators, where a
call costs the reading of the weights and scoring a few more tokens is nearly free.
"""

from formery.evidence.acceptance import acceptance
from formery.evidence.checks import Setting, best, criterion, pooled, rows, survey, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.drafters import ModelDrafter
from formery.generate.method import Method, drafting, register

METHOD = register(
    Method(
        "speculative-sampling",
        "a small model drafts, one call of the large one checks",
        lossless=True,
        make=drafting(ModelDrafter),
        paper="speculative-sampling",
    )
)


def check(budget: Budget) -> Measured:
    """Drafts of 2, 4 and 8 tokens, greedily and sampling, against decoding token by token."""
    methods = [f"{METHOD.name}:length={length}" for length in (2, 4, 8)]
    settings = [Setting(method) for method in methods]
    settings += [Setting(method, temperature=1.0, extra=acceptance) for method in methods]
    results = survey(budget, settings)
    criteria = [
        criterion(
            "identical",
            "greedily, the share of texts with the very tokens of greedy decoding is 1",
            values_of(results, "identical"),
            "==",
            1.0,
            essential=True,
        ),
        criterion(
            "distribution",
            "sampled tokens are as likely under the target as its own would be, within 4 standard errors",
            pooled(results, "surprise", None, "surprise_variance"),
            "<=",
            4.0,
            essential=True,
        ),
        criterion(
            "acceptance",
            "drafts stand as often as the overlap of both distributions predicts, within 4 standard errors",
            pooled(results, "accepted", "expected", "expected_variance"),
            "<=",
            4.0,
        ),
        criterion(
            "calls",
            "the target is called less than once for each token, in every setting",
            values_of(results, "calls_per_token"),
            "<",
            1.0,
        ),
    ]
    for work in PAPER.works:
        setting, ratios = best(results, "speedup", work=work, batch=1)
        statement = f"one text at a time, {work} is faster than token by token in the best setting, {setting}"
        criteria.append(criterion(f"faster on {work}", statement, ratios, ">", 1.0))
    factor = untestable(
        "factor",
        "a target of 70 billion parameters on accelerators is decoded at least twice as fast",
        ">=",
        2.0,
        "needs such a model, and hardware on which a call costs the reading of the weights",
        essential=True,
    )
    return Measured(
        [*criteria, factor],
        rows(results),
        baseline="greedy decoding, or sampling at the same temperature, token by token",
        models=[*PAPER.works, *(f"{work}-draft" for work in PAPER.works)],
        notes=[
            "On a processor, scoring several tokens costs more than scoring one, and each step of the draft "
            "costs a good part of a step of the target: less time is saved than calls."
        ],
    )


PAPER = publish(
    Paper(
        slug="speculative-sampling",
        title="Accelerating Large Language Model Decoding with Speculative Sampling",
        year=2023,
        part="decoding",
        domain="language",
        does="A small draft model proposes several tokens; the large model scores them in one call and keeps "
        "those that pass a modified rejection test, so that its own distribution comes out.",
        claims="A model of 70 billion parameters decodes 2 to 2.5 times faster, and the distribution of what "
        "it writes is unchanged.",
        needs="A target of 70 billion parameters on accelerators, for the size of the speed-up.",
        name="Speculative sampling",
        training="added",
        sought="small draft model plus large model; same distribution as the large model; "
        "standard speculative decoding",
        related={
            "specdec": "a small drafter checked by the target",
            "bild": "a small and a large model together",
            "aggressive-decoding": "guesses checked in one call",
            "medusa": "guesses checked in one call",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
