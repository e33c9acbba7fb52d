"""Aggressive decoding: drafts copied from the input, or from the text so far.

Ge, Xia, Sun, Chen and Wei, "Lossless Acceleration for Seq2seq Generation with Aggressive Decoding", 2022. In
its input-guided form the whole input is proposed as the output and verified in one call; the longest prefix
that equals the greedy choice stands. After a difference decoding goes on token by token until the end of the
output occurs in the input, and from there the input's continuation is proposed again. A decoder alone has its
prompt for input, and what it has written counts too.

The paper reports 7 to 9 times faster grammatical error correction, where the output mostly repeats the input,
with identical text. Its generalised form drafts with a non-autoregressive model instead; that is another
drafter for the same loop.
"""

from formery.evidence.checks import Setting, best, criterion, rows, survey, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.drafters import CopyDrafter
from formery.generate.method import Method, drafting, register

METHOD = register(
    Method(
        "aggressive-decoding",
        "drafts copied from the input or the text so far",
        lossless=True,
        make=drafting(CopyDrafter),
        paper="aggressive-decoding",
    )
)


def check(budget: Budget) -> Measured:
    """Code, which repeats itself, and translation, which repeats nothing, against greedy decoding."""
    options = ("length=8", "length=16", "length=8:unique=true")
    results = survey(budget, [Setting(f"{METHOD.name}:{one}") for one in options])
    setting, ratios = best(results, "speedup", work="code", batch=1)
    criteria = [
        criterion(
            "identical",
            "the share of texts with the very tokens of greedy decoding is 1, on both works",
            values_of(results, "identical"),
            "==",
            1.0,
            essential=True,
        ),
        criterion(
            "calls where text repeats",
            "going on with code, the model is called less than once for each token, in every setting",
            values_of(results, "calls_per_token", work="code"),
            "<",
            1.0,
        ),
        criterion(
            "faster where text repeats",
            f"one text at a time, code is faster than token by token in the best setting ({setting})",
            ratios,
            ">",
            1.0,
        ),
        untestable(
            "factor",
            "a corrector of grammar, whose output is nearly its input, decodes at least 7 times as fast",
            ">=",
            7.0,
            "needs a trained corrector, and hardware on which a call costs the reading of the weights",
            essential=True,
        ),
    ]
    return Measured(
        criteria,
        rows(results),
        baseline="greedy decoding, token by token",
        models=PAPER.works,
        notes=["A translation repeats nothing of its input: its cost there is shown, not judged."],
    )


PAPER = publish(
    Paper(
        slug="aggressive-decoding",
        title="Lossless Acceleration for Seq2seq Generation with Aggressive Decoding",
        year=2022,
        part="decoding",
        domain="translation",
        does="The input, or what followed the same words before, is proposed as the output and checked in "
        "one call; what equals the greedy choice stands.",
        claims="Where the output mostly repeats the input, as in correcting grammar, decoding is 7 to 9 "
        "times faster and the text identical.",
        needs="A trained corrector of grammar with its corpora, and accelerators.",
        name="Aggressive Decoding",
        training="none",
        sought="output mostly repeats the input; fast grammar correction, code editing, rewriting; "
        "copy from the prompt as draft",
        related={
            "aded": "drafts without a network",
            "stree": "drafts copied from the text",
            "parallel-jacobi-decoding": "faster without training",
            "specdec": "guesses checked on an encoder-decoder",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
