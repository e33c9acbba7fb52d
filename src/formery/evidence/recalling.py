"""Questions on long texts, answered by many variants of one model from a single reading of each text."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.data.long import Long
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError
from formery.models.phased import Phased
from formery.parts import Attention, State
from formery.parts.selective import PROMPT, Observing


@dataclass(frozen=True)
class Due:
    """What a model reads, and what it should write behind it."""

    task: str
    prompt: list[int]
    answer: list[int]

    @property
    def written(self) -> Int[Tensor, "1 time"]:
        """The tokens behind which each token of the answer is due: the prompt's last, and all answers before."""
        return torch.tensor([[self.prompt[-1], *self.answer[:-1]]])


def questions(tokenizer: Tokenizer, length: int, task: str, number: int, seed: int) -> list[Due]:
    """So many questions of a task of the work `long`, of `length` tokens, on texts that are not learned from."""
    if tokenizer.bos is None:
        raise FormeryError("questions begin with <bos>, which this tokenizer does not have.")
    asked = Long(length, (task,), tokenizer=tokenizer).questions("test", seed)
    return [
        Due(task, [tokenizer.bos, *tokenizer.encode(one.prompt)], tokenizer.encode(one.answer))
        for one in islice(asked, number)
    ]


def passages(ids: Int[Tensor, " total"], read: int, written: int, number: int, seed: int) -> list[Due]:
    """Pieces of a text: `read` tokens, and the `written` tokens that follow them."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - read - written, (number,), generator=draw).tolist()
    return [Due("text", ids[at : at + read].tolist(), ids[at + read : at + read + written].tolist()) for at in starts]


def read(model: Phased, due: Due) -> State:
    """The state of a model that has read the prompt but for its last token."""
    state, _ = model.begin([due.prompt], len(due.prompt) + len(due.answer))
    if len(due.prompt) > 1:
        model.read(torch.tensor([due.prompt[:-1]]), state)
    return state


def carried(state: State, source: Phased, target: Phased) -> State:
    """The same memory for another variant of the model: they share slots, keys and values."""
    other = copy.copy(state)
    other.pieces = other.out = None
    other.layers = {(PROMPT, 0): state.layers[PROMPT, 0]}
    kinds: tuple[type[Attention] | type[Observing], ...] = (Attention, Observing)
    for kind in kinds:
        for own, its in zip(_parts(source, kind), _parts(target, kind), strict=False):
            other.layers[its, 0] = state.layers[own, 0]
    return other


def _parts(model: Phased, kind: type[Attention] | type[Observing]) -> list[Attention | Observing]:
    return [part for part in model.layers.modules() if isinstance(part, kind)]


@dataclass(frozen=True)
class Answer:
    """How a variant continued a prompt: whether each token of the answer was its likeliest, and its loss on each."""

    right: list[bool]
    losses: list[float]

    @property
    def whole(self) -> bool:
        """Whether all of it was right, which is when greedy decoding writes the answer."""
        return all(self.right)

    @property
    def loss(self) -> float:
        """The mean loss of a token, in nats."""
        return sum(self.losses) / len(self.losses)


def continued(model: Phased, state: State, due: Due) -> Answer:
    """What a variant makes of the answer, given the tokens before each; the state is then as it was."""
    before = state.lengths
    logits: Float[Tensor, "time vocabulary"] = model.step(due.written, state)[0].float()
    state.rollback(before)
    target = torch.tensor(due.answer)
    losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return Answer((logits.argmax(-1) == target).tolist(), losses.tolist())


def answers(reader: Phased, variants: Sequence[Phased], due: Due) -> Iterator[Answer]:
    """The answers of all variants, of a prompt that `reader` reads once."""
    state = read(reader, due)
    for one in variants:
        yield continued(one, carried(state, reader, one), due)
