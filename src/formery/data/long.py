"""The work `long`: questions whose answer lies far back in the text, of any length asked for, with exact answers.

A text is prose (WikiText-2) in which facts are planted, and ends in a question:

- recall: "note: river is stone." among other notes; "ask: river is" → " stone"
- copy: "copy: river stone house …" among other lists; "again: river" → " stone house …"
- count: "mark: river." several times, among marks of other words; "count: river is" → " 7"
- track: "set: river is stone.", later "set: cloud is river.", over several hops; "trace: cloud is" → " stone"

Lengths are in tokens of the tokenizer that is given, or in words and marks where there is none.
"""

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import ClassVar, Literal

from formery.data.base import Example, Split, Work, check_outputs, check_split
from formery.data.scoring import LanguageModel
from formery.data.tokenizer import Tokenizer
from formery.data.works import WORKS
from formery.data.write import WikiText
from formery.errors import FormeryError, unknown

TASKS = ("recall", "copy", "count", "track")
WORDS = (  # whole words of our vocabulary; a fixed text, so that a question is always the same
    *("river", "stone", "house", "water", "light", "paper", "music", "horse", "garden", "winter", "summer", "bridge"),
    *("church", "castle", "forest", "island", "market", "school", "window", "street", "village", "valley", "flower"),
    *("silver", "golden", "copper", "iron", "glass", "engine", "signal", "record", "letter", "number", "circle"),
    *("square", "corner", "border", "harbor", "ocean", "desert", "canyon", "meadow", "planet", "comet", "rocket"),
    *("tunnel", "tower", "temple", "palace", "prison", "theatre", "museum", "station", "airport", "railway", "highway"),
    *("tractor", "hammer", "needle", "thread", "button", "ribbon", "basket", "bottle", "kettle", "candle", "mirror"),
    *("carpet", "pillow", "blanket", "jacket", "helmet", "shield", "dagger", "arrow", "cannon", "rifle", "pistol"),
    *("soldier", "captain", "doctor", "lawyer", "farmer", "painter", "singer", "dancer", "writer", "poet", "actor"),
    *("pilot", "sailor", "hunter", "miner", "baker", "butcher", "tailor"),
)
FACTS, COPIED, LISTS, HOPS = 8, 8, 3, 3  # notes; words of a list, and lists; how often a name is handed on
SHORTEST = 96


@dataclass(frozen=True)
class Question:
    """A text that ends in a question, its answer, and how far behind what it asks about the answer is due.

    more: further questions on the same text, with their answers, to learn from.
    """

    task: str
    prompt: str
    answer: str
    distance: int
    more: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Planted:
    """What a task plants: chains of facts that stay in their order, and (question, answer) pairs.

    The first question is the one that is asked; it is about the first chain.
    """

    chains: list[list[str]]
    asked: list[tuple[str, str]]


def recall(draw: random.Random) -> Planted:
    names = draw.sample(WORDS, 2 * FACTS)
    pairs = list(zip(names[:FACTS], names[FACTS:], strict=True))
    return Planted([[f" note: {a} is {b}."] for a, b in pairs], [(f" ask: {a} is", f" {b}") for a, b in pairs])


def copy(draw: random.Random) -> Planted:
    names = draw.sample(WORDS, COPIED * LISTS)
    lists = [names[i : i + COPIED] for i in range(0, len(names), COPIED)]
    texts = [" " + " ".join(one) for one in lists]
    answers = [(f" again: {one[0]}", " " + " ".join(one[1:])) for one in lists]
    return Planted([[f" copy:{text}."] for text in texts], answers)


def count(draw: random.Random) -> Planted:
    names = draw.sample(WORDS, 3)
    times = [draw.randint(1, 9), draw.randint(1, 5), draw.randint(1, 5)]
    chains = [[f" mark: {name}."] * often for name, often in zip(names, times, strict=True)]
    return Planted(chains, [(f" count: {name} is", f" {often}") for name, often in zip(names, times, strict=True)])


def track(draw: random.Random) -> Planted:
    names = iter(draw.sample(WORDS, 3 * (HOPS + 1)))
    chains, asked = [], []
    for _ in range(3):
        chain = [next(names) for _ in range(HOPS + 1)]
        hops = draw.randint(1, HOPS)
        chains.append([f" set: {b} is {a}." for a, b in pairwise(chain[: hops + 1])])
        asked.append((f" trace: {chain[hops]} is", f" {chain[0]}"))
    return Planted(chains, asked)


MAKERS: dict[str, Callable[[random.Random], Planted]] = dict(zip(TASKS, (recall, copy, count, track), strict=True))


class Long(Work[str]):
    """Recall, copying, counting and variable tracking in texts of `length` tokens, answer and all.

    tasks: which of them, in turn. depth: where in the text its first fact lies, from 0 (its beginning) to 1; drawn
    for each text unless given. tokenizer: measures the texts. number: of examples.
    """

    name: ClassVar = "long"
    kind: ClassVar[Literal["decoder"]] = "decoder"
    description: ClassVar = "answer what was said far back in a long text (facts planted in WikiText-2)"
    higher_is_better: ClassVar = {"exact": True, **dict.fromkeys(TASKS, True), "word_perplexity": False}

    def __init__(
        self,
        length: int = 1024,
        tasks: Sequence[str] = TASKS,
        depth: float | None = None,
        tokenizer: Tokenizer | None = None,
        number: int = 400,
    ) -> None:
        for task in tasks:
            if task not in TASKS:
                raise unknown("task", task, TASKS)
        if length < SHORTEST:
            raise FormeryError(f"a text of the work long takes at least {SHORTEST} tokens, not {length}.")
        if depth is not None and not 0 <= depth <= 1:
            raise FormeryError(f"a depth lies between 0 and 1, not at {depth}.")
        self.length, self.tasks, self.depth, self.number = length, tuple(tasks), depth, number
        self.measure = Measure(tokenizer)

    def texts(self, split: Split) -> Iterator[str]:
        return WikiText().texts(split)

    def questions(self, split: Split, seed: int = 0, first: int = 0) -> Iterator[Question]:
        """Endlessly many, the tasks in turn, from the number `first` on; always the same for one seed."""
        check_split(split)
        haystack = Haystack(split, self.measure)
        number = first
        while True:
            draw = random.Random(f"{split} {seed} {number}")
            yield self.question(self.tasks[number % len(self.tasks)], draw, haystack)
            number += 1

    def question(self, task: str, draw: random.Random, haystack: "Haystack") -> Question:
        """One text of a task, with its question."""
        planted = MAKERS[task](draw)
        question, answer = planted.asked[0]
        facts, asked = order(planted.chains, draw, self.depth)
        room = self.length - self.measure("".join(facts) + question + answer)
        prose = haystack.pieces(draw, room, len(facts), even=self.depth is not None)
        parts = [one for pair in zip(prose, facts, strict=True) for one in pair]
        behind = "".join(parts[2 * asked + 1 :]) + question
        others = list(planted.asked[1:])
        draw.shuffle(others)
        return Question(task, "".join(parts) + question, answer, self.measure(behind), tuple(others))

    def candidates(self, split: Split) -> Iterator[Example]:
        for number, one in zip(range(self.number), self.questions(split), strict=False):
            yield Example(one.prompt, one.answer, f"{split}:{one.task}:{one.distance}:{number}")

    def quality(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float | str]:
        """`exact`: the share of outputs that begin with the answer; and that share of each task which was asked."""
        check_outputs(outputs, examples)
        right: dict[str, list[bool]] = {task: [] for task in TASKS}
        for output, example in zip(outputs, examples, strict=True):
            right[example.name.split(":")[1]].append(output.startswith(example.reference))
        every = [one for ones in right.values() for one in ones]
        found: dict[str, float | str] = {"exact": sum(every) / len(every)}
        return found | {task: sum(ones) / len(ones) for task, ones in right.items() if ones}

    def evaluate(
        self, model: LanguageModel, tokenizer: Tokenizer, split: Split = "test", limit: int | None = None
    ) -> dict[str, float]:
        """As the work `write`: `word_perplexity` of the prose."""
        return WikiText().evaluate(model, tokenizer, split, limit)


def order(chains: list[list[str]], draw: random.Random, depth: float | None) -> tuple[list[str], int]:
    """The facts of all chains in one order, and where the first chain begins in it."""
    own, *others = chains
    total = sum(map(len, chains))
    if depth is None:
        places = sorted(draw.sample(range(total), len(own)))
    else:
        begin = round(depth * (total - len(own)))
        places = [begin, *sorted(draw.sample(range(begin + 1, total), len(own) - 1))]
    turns = [number for number, chain in enumerate(others) for _ in chain]
    draw.shuffle(turns)
    rest = (iterators[turn] for iterators in [[iter(chain) for chain in others]] for turn in turns)
    mine = iter(own)
    return [next(mine) if place in places else next(next(rest)) for place in range(total)], places[0]


class Measure:
    """How long a text is: its tokens, or its words and marks. Words are measured one by one and remembered."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return sum(map(self.word, text.split()))

    def word(self, word: str) -> int:
        """Of a word with the space before it."""
        if word not in self.known:
            if self.tokenizer is None:
                self.known[word] = len(re.findall(r"\w+|[^\w\s]", word))
            else:
                self.known[word] = len(self.tokenizer.encode(f" {word}"))
        return self.known[word]


class Haystack:
    """The prose of a split, from which pieces of any length are taken."""

    def __init__(self, split: Split, measure: Measure) -> None:
        self.words = _words(split)
        self.measure = measure

    def pieces(self, draw: random.Random, room: int, number: int, even: bool) -> list[str]:
        """Pieces that go on from one another, of at most `room` tokens together.

        even: all but the first, which is empty, are of like length.
        """
        cuts = [room * i // max(1, number - 1) for i in range(number)]
        if not even:
            cuts = [*sorted(draw.randrange(max(1, room)) for _ in range(number - 1)), room]
        begin = draw.randrange(max(1, len(self.words) - room))
        words = self.words[begin : begin + max(0, room)]
        sums = list(accumulate(map(self.measure.word, words)))
        edges = [0, *(bisect_left(sums, cut + 1) for cut in cuts)]
        texts = [words[a:b] for a, b in pairwise(edges)]
        return ["".join(f" {word}" for word in text) for text in texts]


@lru_cache(maxsize=3)
def _words(split: Split) -> list[str]:
    return " ".join(WikiText().texts(split)).split()


# As papers do with their methods: the work is known where this file has been imported.
WORKS[Long.name] = Long
