"""What comparisons of sparse attention share: variants of one model on questions and on text, and times of a step."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.tokenizer import Tokenizer
from formery.data.write import WikiText
from formery.evidence.checks import criterion, untestable
from formery.evidence.choices import Noting, ratio
from formery.evidence.recalling import Due, answers, carried, continued, passages, questions, read
from formery.evidence.verdict import Criterion, Relation
from formery.models import Decoder
from formery.models.phased import Phased, phased
from formery.parts import Attention
from formery.parts.asking import Asked
from formery.parts.selection import Rule
from formery.parts.selective import Selective
from formery.train.text import joined

TASKS = ("recall", "copy", "count", "track")
TEXT, WRITTEN = "text", 64  # held-out prose beside the tasks, and how many of its tokens are written

ENOUGH = 0.2  # of all questions, that a model must answer to have something to lose

Found = dict[str, list[float]]


def layers_of(model: Decoder) -> int:
    """How many layers of attention it has."""
    return sum(isinstance(part, Attention) for part in model.modules())


def whole(model: Decoder) -> Phased:
    """A twin that sees everything and knows where prompts end."""
    return plainly(phased(model, lambda part, _: part))


def among(model: Decoder, rule: Rule, first: int) -> Phased:
    """A twin whose layers from `first` on choose each by itself, by that rule, what written tokens see."""
    return plainly(phased(model, lambda part, number: part if number < first else Selective(part, None, rule)))


def plainly(model: Phased) -> Phased:
    """The model, run without the compiled kernels: these know no chosen slots, so that all variants do without."""
    model.compiled = False
    return model


@cache
def prose(tokenizer: Tokenizer) -> Int[Tensor, " total"]:
    """Prose that was not learned from."""
    return joined(tokenizer, WikiText().texts("test"))


def due(model: Decoder, length: int, seed: int, number: int) -> list[Due]:
    """Questions of all tasks, and pieces of text, of that length, that the model did not learn from."""
    assert model.tokenizer is not None
    asked = [one for task in TASKS for one in questions(model.tokenizer, length, task, number, seed)]
    return [*asked, *passages(prose(model.tokenizer), length - WRITTEN, WRITTEN, number, seed)]


def survey(reader: Phased, variants: Mapping[str, Phased], dues: Sequence[Due]) -> Found:
    """For each variant and task 1 where an answer was right, for text the losses; "tokens": right ones of an answer."""
    found: Found = {}
    for one in dues:
        for name, answer in zip(variants, answers(reader, list(variants.values()), one), strict=True):
            value = answer.loss if one.task == TEXT else float(answer.whole)
            found.setdefault(f"{name}|{one.task}", []).append(value)
            if one.task != TEXT:
                found.setdefault(f"{name}|tokens", []).append(sum(answer.right) / len(answer.right))
    return found


def common(model: Decoder, reader: Phased, one: Due, number: int, first: int) -> dict[str, float]:
    """How much the layers' sets of so many most looked at tokens have in common behind a prompt.

    Of each layer with the one before it, and with the layer `first`.
    """
    noting, only = Noting(number), Due(one.task, one.prompt, one.answer[:1])
    watched = among(model, noting, 0)
    continued(watched, carried(read(reader, only), reader, watched), only)
    layers = range(1, len(noting.sets))
    found = {f"layer {layer} and the layer before": noting.overlap(layer, layer - 1) for layer in layers}
    return found | {
        f"layer {layer} and layer {first}": noting.overlap(layer, first) for layer in layers if layer > first
    }


def steps(plain: Phased, own: Phased, length: int, rounds: int, times: int = 20) -> list[float]:
    """Seconds of a step of `plain` over those of `own`, behind so many random tokens, in each round."""
    tokens = torch.randint(plain.vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    state, _ = plain.begin([tokens[0]], length + 1)
    for piece in tokens[:, :-1].split(512, 1):
        plain.read(piece, state)

    def step(one: Phased) -> Callable[[], object]:
        its = carried(state, plain, one)

        def run() -> None:
            one.step(tokens[:, -1:], its)
            its.rollback([length - 1])

        return run

    return [ratio(step(plain), step(own), times) for _ in range(rounds)]


def attentions(own: Callable[[Asked], object], asked: Asked, rounds: int, times: int = 20) -> list[float]:
    """Seconds of attention to everything over those of `own`, in each round."""
    return [ratio(asked.everything, lambda: own(asked), times) for _ in range(rounds)]


def means(found: Mapping[str, Any]) -> dict[str, float]:
    """The mean of each list."""
    return {name: sum(values) / len(values) for name, values in found.items()}


def less(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Differences, one by one."""
    return [a - b for a, b in zip(first, second, strict=True)]


def on_answers(
    able: bool, name: str, says: str, values: Sequence[float], relation: Relation, bound: float, essential: bool = False
) -> Criterion:
    """A criterion on answers; untested where full attention gives fewer than `ENOUGH` of them."""
    if not able:
        return untestable(
            name, says, relation, bound, "the model answers too little to have something to lose", essential
        )
    return criterion(name, says, values, relation, bound, essential)
