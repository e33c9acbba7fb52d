"""Generated tasks on rows of symbols, of any length, to learn at short lengths and be asked at longer ones.

A row is `<bos>`, the task's name, the input, `=`, the answer, `<eos>`. Symbols are the tokens; there is no text.

- copy, reverse: letters → the same letters, or from the last to the first
- sort: letters from a to j → the same in the order of the alphabet
- add: two binary numbers of as many digits each, most significant first → their sum, of one digit more
- add-carries, add-steps: as `add`, with a scratchpad before the sum (`carries`, `steps`)
"""

import random
from collections.abc import Callable, Iterator, Sequence
from string import ascii_letters

import torch
from torch import Tensor

from formery.errors import FormeryError, unknown

Row = tuple[list[str], list[str]]
BITS = ("0", "1")


def copy(length: int, draw: random.Random) -> Row:
    letters = draw.choices(ascii_letters, k=length)
    return letters, letters


def reverse(length: int, draw: random.Random) -> Row:
    letters = draw.choices(ascii_letters, k=length)
    return letters, letters[::-1]


def sort(length: int, draw: random.Random) -> Row:
    letters = draw.choices(ascii_letters[:10], k=length)
    return letters, sorted(letters)


def add(length: int, draw: random.Random) -> Row:
    first, second = draw.choices(BITS, k=length), draw.choices(BITS, k=length)
    total = int("".join(first), 2) + int("".join(second), 2)
    return [*first, "+", *second], list(f"{total:0{length + 1}b}")


def carries(asked: list[str]) -> list[str]:
    """Digit by digit from the last, what to write and what to carry: "0 1 ; 1 0 ;"."""
    return [mark for *_, digit, carry in steps_of(asked) for mark in (digit, carry, ";")]


def steps(asked: list[str]) -> list[str]:
    """As `carries`, with the digits that are added and what was carried before them: "1 1 0 > 0 1 ;"."""
    return [mark for a, b, before, digit, carry in steps_of(asked) for mark in (a, b, before, ">", digit, carry, ";")]


def steps_of(asked: list[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Both digits and the carry before them, the digit of the sum and the carry after it, from the last on."""
    half, carry = len(asked) // 2, 0
    for a, b in zip(asked[:half][::-1], asked[half + 1 :][::-1], strict=True):
        total = int(a) + int(b) + carry
        yield a, b, str(carry), str(total % 2), str(total // 2)
        carry = total // 2


def with_scratchpad(write: Callable[[list[str]], list[str]]) -> Callable[[int, random.Random], Row]:
    """The task `add`, whose answer is what `write` notes on the question, "=", and the sum."""

    def made(length: int, draw: random.Random) -> Row:
        asked, total = add(length, draw)
        return asked, [*write(asked), "=", *total]

    return made


MAKERS: dict[str, Callable[[int, random.Random], Row]] = {
    "copy": copy,
    "reverse": reverse,
    "sort": sort,
    "add": add,
    "add-carries": with_scratchpad(carries),
    "add-steps": with_scratchpad(steps),
}
SYMBOLS = ("<bos>", "<eos>", "=", "+", ">", ";", *BITS, *ascii_letters, *MAKERS)
TOKENS = {symbol: token for token, symbol in enumerate(SYMBOLS)}


class Sequences:
    """Batches of rows of one task, each of a length drawn from `shortest` to `longest`; the same for the same step."""

    def __init__(self, task: str, shortest: int, longest: int, batch_size: int, seed: int = 0) -> None:
        if task not in MAKERS:
            raise unknown("task", task, MAKERS)
        if not 1 <= shortest <= longest or batch_size < 1:
            raise FormeryError(
                f"rows of {shortest} to {longest} symbols in batches of {batch_size} cannot be made; ask for 1 or more."
            )
        self.task, self.shortest, self.longest, self.batch_size, self.seed = task, shortest, longest, batch_size, seed

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"tokens", "answers"}: Int and Bool[Tensor, "batch time"]; answers: what is due, `<eos>` too.

        Rows are filled up with `<eos>`, which is not due; no token before it sees it.
        """
        draw = random.Random(f"{self.task} {self.seed} {step}")
        rows = [self.row(draw) for _ in range(self.batch_size)]
        width = max(len(asked) + len(answer) for asked, answer in rows)
        tokens = torch.full((len(rows), width), TOKENS["<eos>"])
        answers = torch.zeros(len(rows), width, dtype=torch.bool)
        for number, (asked, answer) in enumerate(rows):
            end = len(asked) + len(answer)
            tokens[number, :end] = torch.tensor(ids([*asked, *answer]))
            answers[number, len(asked) : end] = True
        return {"tokens": tokens, "answers": answers}

    def row(self, draw: random.Random) -> Row:
        """What is read, and what is due after it."""
        asked, answer = MAKERS[self.task](draw.randint(self.shortest, self.longest), draw)
        return ["<bos>", self.task, *asked, "="], [*answer, "<eos>"]


def ids(symbols: Sequence[str]) -> list[int]:
    """The tokens of symbols."""
    return [TOKENS[symbol] for symbol in symbols]
