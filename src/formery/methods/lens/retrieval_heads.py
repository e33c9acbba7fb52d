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
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from formery.data.base import Split
from formery.data.batching import WindowBatches
from formery.data.long import Long, Question
from formery.data.long_text import prose
from formery.errors import FormeryError
from formery.evidence.checks import criterion, model_named, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import losses
from formery.methods.lens.extended import LONGER, SHORTER, extended
from formery.models import Decoder
from formery.models.attention_maps import Head, attention_maps, heads, without

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = dict[Head, float]
COPYING = ("recall", "copy")  # the tasks whose answers are words of the text
ACTIVE = 0.1  # the score from which the paper calls a head one of retrieval
LENGTH, SCORED, ASKED = 1024, 24, 32  # tokens of a text; questions to score heads with, and to test recall with
CUTS = (1, 2, 4, 6)  # heads that are cut at once, of the 36 of `long`


def scores(model: Decoder, questions: Sequence[Question]) -> Scores:
    """The retrieval score of each head over all questions, from 0 to 1.

    questions: of the tasks recall and copy. Raises FormeryError where the model writes no token of any needle.
    """
    found = torch.cat([copied(model, question) for question in questions]) if questions else torch.zeros(0, 0)
    if not len(found):
        raise FormeryError("the model writes no token of any needle, so that no head can be seen copying one.")
    return dict(zip(heads(model), found.double().mean(0).tolist(), strict=True))


def copied(model: Decoder, question: Question) -> Bool[Tensor, "written head"]:
    """For each needle token that the model writes, which heads copy it."""
    tokens, start, needle = laid_out(model, question)
    maps, logits = attention_maps(model, torch.tensor([tokens[:-1]]), range(start - 1, len(tokens) - 1))
    answer = torch.tensor(tokens[start:])
    written = int((logits[0].argmax(-1) == answer).long().cumprod(0).sum())
    looked = torch.cat([one[0].argmax(-1).cpu() for one in maps])[:, :written]
    inside = (looked >= needle.start) & (looked < needle.stop)
    return (inside & (torch.tensor(tokens)[looked] == answer[:written])).T


def ranked(found: Scores) -> list[Head]:
    """The heads from the best to the worst; equal ones in the order of the layers."""
    return sorted(found, key=lambda head: (-found[head], head))


@torch.no_grad()
def answered(model: Decoder, questions: Iterable[Question]) -> float:
    """The share of questions whose answer greedy decoding writes."""
    right = []
    for question in questions:
        tokens, start, _ = laid_out(model, question, needed=False)
        hidden = model.hidden(torch.tensor([tokens[:-1]]))[:, start - 1 :]
        right.append(bool((model.logits(hidden)[0].argmax(-1) == torch.tensor(tokens[start:])).all()))
    return sum(right) / len(right)


def laid_out(model: Decoder, question: Question, needed: bool = True) -> tuple[list[int], int, range]:
    """The tokens of a question with its answer, where the answer begins, and where the needle lies."""
    if model.tokenizer is None:
        raise FormeryError("this model has no tokenizer, so that it can be asked nothing.")
    encode, front = model.tokenizer.encode, [] if model.tokenizer.bos is None else [model.tokenizer.bos]
    asked, needle = [*front, *encode(question.prompt)], range(0)
    if needed:
        before, fact = found_needle(question)
        begin = len(front) + len(encode(before))
        needle = range(begin, begin + len(encode(fact)))
    return [*asked, *encode(question.answer)], len(asked), needle


def found_needle(question: Question) -> tuple[str, str]:
    """The text before the fact that a question is about, and that fact. Raises FormeryError for other tasks."""
    if question.task not in COPYING:
        raise FormeryError(f"an answer of the task {question.task!r} is not copied; ask {' or '.join(COPYING)}.")
    name = question.prompt.rsplit(": ", 1)[1]
    fact = f" {'note' if question.task == 'recall' else 'copy'}: {name}{question.answer}."
    before, _, _ = question.prompt.rpartition(fact)
    return before, fact


def questions(
    model: Decoder, tasks: Sequence[str], length: int, number: int, seed: int, split: Split
) -> list[Question]:
    """That many questions of the work `long`, the tasks in turn."""
    work = Long(length, tasks, tokenizer=model.tokenizer)
    return list(islice(work.questions(split, seed), number))


def picture(found: Scores, title: str = "retrieval score") -> "Figure":
    """The scores as a map of layers and heads; a head that a layer does not have is left blank."""
    from matplotlib.figure import Figure

    layers, width = (max(head[i] for head in found) + 1 for i in (0, 1))
    table = torch.full((layers, width), float("nan"))
    for (layer, head), value in found.items():
        table[layer, head] = value
    figure = Figure(figsize=(1.8 + 0.5 * width, 1.2 + 0.42 * layers), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (layer, head), value in found.items():
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value > 0.6 else "k")
    axes.set(title=title, xlabel="head", ylabel="layer", xticks=range(width), yticks=range(layers))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes)
    return figure


def on_long(seed: int) -> dict[str, float]:
    """The shipped model: its scores on some questions, and its recall on others with heads cut."""
    model = model_named("long")
    found = scores(model, questions(model, COPYING, LENGTH, SCORED, seed, "valid"))
    order = ranked(found)
    values = {f"score, {layer}.{head}": value for (layer, head), value in found.items()}
    values["share of heads above 0.1"] = sum(value > ACTIVE for value in found.values()) / len(found)
    draw = random.Random(seed)
    asked = {task: questions(model, [task], LENGTH, ASKED, seed, "test") for task in (*COPYING, "count", "track")}

    def note(name: str, made: Decoder, tasks: Iterable[str]) -> None:
        parts = {task: answered(made, asked[task]) for task in tasks}
        values.update({f"{task}, {name}": value for task, value in parts.items()})
        values[f"copying, {name}"] = sum(parts[task] for task in COPYING) / len(COPYING)

    note("whole", model, asked)
    for number in CUTS:
        others = draw.sample(order[number:], number)
        for kind, cut in (("best", order[:number]), ("random", others), ("lowest", order[-number:])):
            tasks = asked if number == max(CUTS) else COPYING
            made = without(model, cut)
            note(f"{number} {kind} cut", made, tasks)
            if number == max(CUTS):
                values[f"loss, {number} {kind} cut"] = text_loss(made, seed)
    values["loss, whole"] = text_loss(model, seed)
    return values


def text_loss(model: Decoder, seed: int) -> float:
    """Nats a token on prose that was not learned from."""
    return float(losses(model, WindowBatches(prose("test"), 512, 4, seed), 1).mean())


def on_extended(seed: int) -> dict[str, float]:
    """A small model of that seed before and after it learns longer texts, asked at the length that it learned."""
    values: dict[str, float] = {}
    found = []
    for name, model, length in zip(("before", "after"), extended(seed), (SHORTER, LONGER), strict=True):
        own = scores(model, questions(model, COPYING, length, SCORED, seed, "valid"))
        asked = questions(model, COPYING, length, ASKED, seed, "test")
        values[f"copying, {name}"] = answered(model, asked)
        values[f"best score, {name}"] = max(own.values())
        values[f"copying at the longer length, {name}"] = answered(
            model, questions(model, COPYING, LONGER, ASKED, seed, "test")
        )
        found.append(own)
    before, after = (torch.tensor(list(one.values())) for one in found)
    number = max(1, len(before) // 4)
    values["correlation"] = float(torch.corrcoef(torch.stack((before, after)))[0, 1])
    values["overlap of the best quarter"] = (
        len(set(ranked(found[0])[:number]) & set(ranked(found[1])[:number])) / number
    )
    return values
