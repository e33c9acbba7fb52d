"""Questions on a text as tokens, with the place of the needle: what an answer is copied from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.base import Split
from formery.data.long import Long, Question
from formery.data.sequences import Sequences
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError
from formery.models import Decoder

COPYING = ("recall", "copy")  # the tasks of the work `long` whose answers are words of the text


@dataclass(frozen=True)
class Asked:
    """A text with its answer as tokens; start: where the answer begins; needle: where what is copied lies."""

    tokens: Int[Tensor, "time"]
    start: int
    needle: range = range(0)


def laid_out(model: Decoder, question: Question) -> Asked:
    """A question of any task as tokens. Raises FormeryError where the model has no tokenizer."""
    tokenizer, front = tokenizer_of(model)
    asked = [*front, *tokenizer.encode(question.prompt)]
    whole = [*asked, *tokenizer.encode(question.answer)]
    return Asked(torch.tensor(whole, device=next(model.parameters()).device), len(asked))


def with_needle(model: Decoder, question: Question) -> Asked:
    """A question as tokens, with the place of the fact that it is about.

    Raises FormeryError where its answer is not copied, or the fact is not in the text.
    """
    if question.task not in COPYING:
        raise FormeryError(f"an answer of the task {question.task!r} is not copied; ask {' or '.join(COPYING)}.")
    name = question.prompt.rpartition(": ")[2]
    fact = f" {'note' if question.task == 'recall' else 'copy'}: {name}{question.answer}."
    before, found, _ = question.prompt.rpartition(fact)
    if not found:
        raise FormeryError(f"the text does not hold {fact.strip()!r}, which is asked for.")
    # Words of a text are tokens by themselves, so that what comes before is encoded as it is within the whole.
    tokenizer, front = tokenizer_of(model)
    begin = len(front) + len(tokenizer.encode(before))
    return replace(laid_out(model, question), needle=range(begin, begin + len(tokenizer.encode(fact))))


def tokenizer_of(model: Decoder) -> tuple[Tokenizer, list[int]]:
    """The model's tokenizer, and the token that begins a text, where there is one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise FormeryError("this model has no tokenizer, so that it cannot be asked anything.")
    return tokenizer, [] if tokenizer.bos is None else [tokenizer.bos]


def questions(
    model: Decoder, tasks: Sequence[str], length: int, number: int, seed: int, split: Split
) -> list[Question]:
    """That many questions of the work `long`, the tasks in turn."""
    work = Long(length, tasks, tokenizer=model.tokenizer)
    return list(islice(work.questions(split, seed), number))


def rows(length: int, seed: int, number: int) -> list[Asked]:
    """That many rows of letters to copy, all of them the needle."""
    batch = Sequences("copy", length, length, number, seed + 1000).batch(0)
    return [Asked(tokens, length + 3, range(2, length + 2)) for tokens in batch["tokens"]]
