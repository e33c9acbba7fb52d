"""Retrieval heads: the few attention heads by which a model copies what it was told far back.

Wu, Wang, Xiao, Peng and Fu, "Retrieval Head Mechanistically Explains Long-Context Factuality", 2024. A text holds a
needle (a sentence), and the model writes tokens of it. A head copies a token where, as that token is written, its
strongest attention lies inside the needle on that very token. Its *retrieval score* is the share of the needle's tokens
that it copies (section 2):

    score(head) = |{i : token[argmax attention(head, i)] = written[i], the argmax inside the needle}| / |needle tokens|

The paper finds scores above 0.1 in 3 to 6 % of heads of models of 6 to 34 billion parameters, the same heads before and
after a model learns a longer context. Cutting the best breaks recall and makes models invent; cutting others does not.

Here the needles are facts of the work `long` (recall: one token, copy: a list), and a token counts as written where the
model finds it and those before it likeliest: what greedy decoding writes, read in one pass.
"""

import random
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from formery.data.batching import WindowBatches
from formery.data.long import TASKS, Question
from formery.data.long_text import prose
from formery.errors import FormeryError
from formery.evidence.checks import criterion, model_named, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import losses
from formery.methods.lens.extended import LONGER, SHORTER, extended
from formery.methods.lens.needles import COPYING, Asked, laid_out, questions, rows, with_needle
from formery.methods.lens.picture import Scores
from formery.models import Decoder
from formery.models.attention_maps import Head, attention_maps, heads, without

ACTIVE = 0.1  # the score from which the paper calls a head one of retrieval
LENGTH, SCORED, ASKED = 1024, 24, 16  # tokens of a text; questions to score heads with, and of each task to answer
CUTS, CUT = (2, 4, 8), 4  # heads that are cut at once, of the 36 of `long`, and those that are judged


def scores(model: Decoder, questions: Sequence[Question | Asked]) -> Scores:
    """The retrieval score of each head over all questions, from 0 to 1.

    questions: of the tasks recall and copy, or laid out as tokens already. Raises FormeryError for other tasks, and
    where the model writes no token of any needle.
    """
    asked = [one if isinstance(one, Asked) else with_needle(model, one) for one in questions]
    found = [copied(model, one) for one in asked]
    if not sum(map(len, found)):
        raise FormeryError("the model writes no token of any needle, so that no head can be seen copying one.")
    return dict(zip(heads(model), torch.cat(found).double().mean(0).tolist(), strict=True))


def copied(model: Decoder, asked: Asked) -> Bool[Tensor, "written head"]:
    """For each needle token that the model writes, which heads copy it."""
    tokens, start, needle = asked.tokens, asked.start, asked.needle
    maps, logits = attention_maps(model, tokens[None, :-1], range(start - 1, len(tokens) - 1))
    answer = tokens[start:]
    written = (logits[0].argmax(-1) == answer).long().cumprod(0).bool()
    counted = written & torch.isin(answer, tokens[needle.start : needle.stop])
    looked = torch.cat([one[0].argmax(-1) for one in maps]).T[counted]
    inside = (looked >= needle.start) & (looked < needle.stop)
    return inside & (tokens[looked] == answer[counted, None])


def ranked(found: Scores) -> list[Head]:
    """The heads from the best to the worst; equal ones in the order of the layers."""
    return sorted(found, key=lambda head: (-found[head], head))


@torch.no_grad()
def answered(model: Decoder, questions: Sequence[Question | Asked]) -> float:
    """The share of questions whose answer greedy decoding writes."""
    right = []
    for one in questions:
        asked = one if isinstance(one, Asked) else laid_out(model, one)
        hidden = model.hidden(asked.tokens[None, :-1])[:, asked.start - 1 :]
        right.append(bool((model.logits(hidden)[0].argmax(-1) == asked.tokens[asked.start :]).all()))
    return sum(right) / len(right)


def on_long(seed: int) -> dict[str, float]:
    """The shipped model: its scores on some questions, and its recall on others with heads cut."""
    model = model_named("long")
    found = scores(model, questions(model, COPYING, LENGTH, SCORED, seed, "valid"))
    order, draw = ranked(found), random.Random(seed)
    asked = {task: questions(model, [task], LENGTH, ASKED, seed, "test") for task in TASKS}
    values = {f"score of the head at rank {rank + 1}": found[order[rank]] for rank in range(max(CUTS))}
    values["share of heads above 0.1"] = sum(value > ACTIVE for value in found.values()) / len(found)
    values |= told(model, "whole", asked, TASKS, seed)
    for number in CUTS:
        others = draw.sample(order[number:], number)
        for kind, cut in (("best", order[:number]), ("random", others), ("lowest", order[-number:])):
            tasks = TASKS if number == CUT else COPYING
            values |= told(without(model, cut), f"{number} {kind} cut", asked, tasks, seed)
    return values


def told(
    model: Decoder, name: str, asked: Mapping[str, Sequence[Question]], tasks: Sequence[str], seed: int
) -> dict[str, float]:
    """The share of each task that a model answers, of those that copy together, and its loss on prose."""
    shares = {task: answered(model, asked[task]) for task in tasks}
    text = WindowBatches(prose("test"), 512, 4, seed)
    return {
        **{f"{task}, {name}": share for task, share in shares.items()},
        f"copying, {name}": sum(shares[task] for task in COPYING) / len(COPYING),
        f"loss of prose, {name}": float(losses(model, text, 1).mean()),
    }


def on_extended(seed: int) -> dict[str, float]:
    """A small model of that seed before and after it learns longer inputs, scored at the length that it has learned."""
    values: dict[str, float] = {}
    found = []
    for name, model, length in zip(("before", "after"), extended(seed), (SHORTER, LONGER), strict=True):
        own, asked = scores(model, rows(length, seed, SCORED)), rows(length, seed + 1, ASKED)
        values[f"best score, {name}"] = max(own.values())
        values[f"share of heads above 0.1, {name}"] = sum(value > ACTIVE for value in own.values()) / len(own)
        values |= {f"copied, {SHORTER} letters, {name}": answered(model, rows(SHORTER, seed + 1, ASKED))}
        values |= {f"copied, {LONGER} letters, {name}": answered(model, rows(LONGER, seed + 1, ASKED))}
        order, number = ranked(own), len(own) // 4
        for kind, cut in (("best", order[:number]), ("lowest", order[-number:])):
            values[f"copied, {length} letters, {name}, {number} {kind} cut"] = answered(without(model, cut), asked)
        found.append(own)
    return values | likeness(*found)


def likeness(before: Scores, after: Scores) -> dict[str, float]:
    """How alike the scores of one model's heads are at two times: their correlation, and the best that are the same."""
    table = torch.tensor([[one[head] for head in before] for one in (before, after)])
    number = max(1, len(before) // 4)
    same = set(ranked(before)[:number]) & set(ranked(after)[:number])
    return {"correlation": float(torch.corrcoef(table)[0, 1]), "overlap of the best quarter": len(same) / number}


def check(budget: Budget) -> Measured:
    """Heads of `long` scored and cut, and scores of small models before and after they learn longer inputs."""
    measure = budget.units.measure
    budget.units.expect(2 * len(budget.seeds))
    large = [measure(f"long, seed {seed}", partial(on_long, seed)) for seed in budget.seeds]
    small = [measure(f"extended, seed {seed}", partial(on_extended, seed)) for seed in budget.seeds]

    def less(what: str, than: str) -> list[float]:
        """By how much a share is lower with the best heads cut than otherwise, in each seed."""
        return [one[f"{what}, {than}"] - one[f"{what}, {CUT} best cut"] for one in large]

    return Measured(
        [
            criterion(
                "causal",
                f"cutting the {CUT} best heads costs at least 0.2 more of what is copied than cutting {CUT} others",
                less("copying", f"{CUT} random cut"),
                ">=",
                0.2,
                essential=True,
            ),
            criterion(
                "lowest",
                f"and than cutting the {CUT} lowest",
                less("copying", f"{CUT} lowest cut"),
                ">=",
                0.2,
            ),
            criterion(
                "harmless",
                f"cutting {CUT} others costs at most 0.1 of these answers",
                [one["copying, whole"] - one[f"copying, {CUT} random cut"] for one in large],
                "<=",
                0.1,
            ),
            criterion(
                "fluent",
                f"on prose cutting the {CUT} best costs at most 0.1 nats a token more than cutting {CUT} others",
                [-value for value in less("loss of prose", f"{CUT} random cut")],
                "<=",
                0.1,
            ),
            criterion(
                "sparse",
                "less than 5 % of heads score above 0.1",
                [one["share of heads above 0.1"] for one in large],
                "<",
                0.05,
            ),
            criterion(
                "universal",
                "every small model has a head that scores above 0.1, before and after longer inputs",
                [min(one["best score, before"], one["best score, after"]) for one in small],
                ">",
                ACTIVE,
            ),
            criterion(
                "intrinsic",
                "scores before and after longer inputs correlate by at least 0.8",
                [one["correlation"] for one in small],
                ">=",
                0.8,
            ),
            untestable(
                "reasoning",
                "cutting retrieval heads hurts chains of thought more than answers from memory",
                ">",
                0.0,
                "needs a model that reasons in words",
            ),
        ],
        [
            *(Row("long", name, 1, {"value": spread(one[name] for one in large)}) for name in large[0]),
            *(Row("short, then longer", name, 1, {"value": spread(one[name] for one in small)}) for name in small[0]),
        ],
        baseline="the same model with all heads, with as many random other heads cut, and with the lowest cut",
        models=["long"],
        notes=[
            f"`long` has 36 heads: a head alone is 3 %, so that 5 % is one head. Texts of {LENGTH} tokens; heads are "
            f"scored on {SCORED} questions of recall and copy, and {ASKED} others of each task are asked. Random heads "
            "are drawn from those that are not the best. All shares are of whole answers.",
            f"The small models have 12 heads in 3 layers; they learn to copy rows of up to {SHORTER} letters, then go "
            f"on with up to {LONGER}. All of the row is the needle, and a quarter of their heads is three.",
            "count and track are answered from many places of a text: their rows tell what else the same heads do.",
        ],
    )


PAPER = publish(
    Paper(
        slug="retrieval-heads",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2024,
        part="lens",
        domain="language",
        does="Finds the attention heads that copy facts from a long prompt: a head scores each time its strongest "
        "attention falls on the needle token being generated. Cutting the best scorers shows whether long-context "
        "recall rests on them.",
        claims="Below 5% of heads qualify, and they are there before context extension (12 always active in "
        "Llama-2-7B). Removing them breaks recall and causes hallucination; removing random ones does not.",
        needs="Trained models of 6 to 34 billion parameters, and tasks that need chains of thought.",
        name="Retrieval heads",
        training="none",
        sought="why long-context models fail to find facts; needle in a haystack; which heads matter",
        related={
            "decore": "masks retrieval heads when decoding",
            "inter-layer-communication-channels": "causal study of attention heads",
            "tova": "which cached tokens must stay",
            "cd-t": "heads cut",
            "tidaldecode": "few tokens matter to attention",
            "sparse-frontier": "sparse attention and long-context recall",
        },
        added="2026-11-28",
        check=check,
        works=("long",),
    )
)
