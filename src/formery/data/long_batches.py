"""What a model learns the work `long` from: words said twice, then rows of text and rows that end in questions."""

import random
from itertools import cycle, islice

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from formery.data.base import Split
from formery.data.batching import WindowBatches
from formery.data.long import WORDS, Long, Question
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError

ROOM = 48  # tokens of a row for the questions behind the first one


class Repetitions:
    """Batches of rows of a few random words, said twice, then of others, until the row is full; endless.

    most: words that are said twice, at least 3. Models with random weights learned from these, within a hundred steps,
    to look up what came after a word before; one that had learned text first did not in three times as many.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, batch_size: int, seed: int = 0, most: int = 8) -> None:
        self.words = [tokenizer.encode(f" {word}") for word in WORDS]
        if tokenizer.bos is None:
            raise FormeryError("rows begin with <bos>, which this tokenizer does not have.")
        self.bos, self.length, self.batch_size, self.seed, self.most = tokenizer.bos, length, batch_size, seed, most

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"tokens", "answers"}: Int and Bool[Tensor, "batch length+1"]; answers: what comes again, but its start."""
        rows = [self.row(random.Random(f"{self.seed} {step} {row}")) for row in range(self.batch_size)]
        tokens, answers = zip(*rows, strict=True)
        return {"tokens": torch.tensor(tokens), "answers": torch.tensor(answers)}

    def row(self, draw: random.Random) -> tuple[list[int], list[bool]]:
        """One row."""
        row, due = [self.bos], [False]
        while len(row) <= self.length:
            said = [token for word in draw.sample(self.words, draw.randint(3, self.most)) for token in word]
            row += said + said
            due += [False] * (len(said) + 1) + [True] * (len(said) - 1)
        return row[: self.length + 1], due[: self.length + 1]


class LongBatches:
    """Batches of windows of a text, and of as many rows of questions; endless, the same for the same step.

    ids: the text. share: of the rows that hold questions. work: whose tasks and depth they have. room: tokens of a row
    that are left for further questions. rounds: how often these are asked, one after the other; what comes again can be
    copied from where it was answered before, which is easier than to look it up in the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: Int[Tensor, " total"],
        length: int,
        batch_size: int,
        seed: int = 0,
        share: float = 0.5,
        work: Long | None = None,
        split: Split = "train",
        room: int = ROOM,
        rounds: int = 1,
    ) -> None:
        if tokenizer.bos is None:
            raise FormeryError("questions begin with <bos>, which this tokenizer does not have.")
        self.tokenizer, self.length, self.seed, self.split, self.rounds = tokenizer, length, seed, split, rounds
        self.asked = round(share * batch_size)
        self.windows = WindowBatches(ids, length, batch_size - self.asked, seed) if self.asked < batch_size else None
        tasks = Long().tasks if work is None else work.tasks
        self.work = Long(length - room, tasks, tokenizer=tokenizer, depth=None if work is None else work.depth)

    def batch(self, step: int) -> dict[str, Tensor]:
        """{"tokens", "answers"}: Int and Bool[Tensor, "batch length+1"]; answers: which tokens answer a question."""
        tokens = [] if self.windows is None else [self.windows.batch(step)["tokens"]]
        answers = [torch.zeros_like(one, dtype=torch.bool) for one in tokens]
        first = step * self.asked
        asking = self.work.questions(self.split, self.seed, first)
        for _, question in zip(range(self.asked), asking, strict=False):
            row, due = self.row(question)
            tokens.append(row[None])
            answers.append(due[None])
        return {"tokens": torch.cat(tokens), "answers": torch.cat(answers)}

    def row(self, question: Question) -> tuple[Int[Tensor, " window"], Bool[Tensor, " window"]]:
        """A text with its question and answer, then further ones."""
        assert self.tokenizer.bos is not None
        row, due = [self.tokenizer.bos], [False]

        def add(text: str, answer: bool) -> None:
            ids = self.tokenizer.encode(text)
            row.extend(ids)
            due.extend([answer] * len(ids))

        add(question.prompt, False)
        add(question.answer, True)
        for asked, answer in islice(cycle(question.more), self.rounds * len(question.more)):
            add("." + asked, False)
            add(answer, True)
        # What is left is filled with what nobody is asked for.
        row += [self.tokenizer.bos] * (self.length + 1 - len(row))
        due += [False] * (self.length + 1 - len(due))
        return torch.tensor(row[: self.length + 1]), torch.tensor(due[: self.length + 1])
