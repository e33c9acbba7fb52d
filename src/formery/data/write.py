"""The works `write` (WikiText-2) and `write-shakespeare` (tiny Shakespeare): going on with English prose."""

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import ClassVar, Literal

from formery.data.base import Example, Split, Work, check_outputs, check_split
from formery.data.scoring import LanguageModel, text_cost
from formery.data.sources import read
from formery.data.tokenizer import Tokenizer

# An article's title has one "=" on each side and a blank line above and below; sections have more of them.
TITLE = re.compile(r"(?<=^ \n) = [^=\n]+ = \n(?= \n)", re.MULTILINE)
PROMPT_CHARACTERS = 400
DOCUMENT_CHARACTERS = 4000


def repeated_4grams(words: Sequence[str]) -> float:
    """The share of 4-grams that came before: 1 - |unique| / |all| (seq-rep-4 of Welleck et al. 2020)."""
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


class Prose(Work[str]):
    """What the two works share: examples cut between two words, and what is measured on the outputs."""

    kind: ClassVar[Literal["decoder"]] = "decoder"

    @abstractmethod
    def texts(self, split: Split) -> Iterator[str]:
        """Documents that, joined, are the split's whole text."""

    def candidates(self, split: Split) -> Iterator[Example]:
        for number, text in enumerate(self.texts(split)):
            for begin in range(0, len(text) - 2 * PROMPT_CHARACTERS, 2 * PROMPT_CHARACTERS):
                piece = text[begin : begin + 2 * PROMPT_CHARACTERS]
                start = piece.find(" ") + 1 if begin else 0
                cut = piece.rfind(" ", start + 1, PROMPT_CHARACTERS)
                if cut > 0 and piece[cut:].strip():
                    yield Example(piece[start:cut], piece[cut:], f"{split}:{number}:{begin + cut}")

    def quality(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float | str]:
        """`next_word_exact`: share with the reference's first word; `repeated_4grams`: mean share."""
        check_outputs(outputs, examples)
        hits = sum(o.split()[:1] == e.reference.split()[:1] for o, e in zip(outputs, examples, strict=True))
        repeated = sum(repeated_4grams(output.split()) for output in outputs)
        return {"next_word_exact": hits / len(examples), "repeated_4grams": repeated / len(examples)}


class WikiText(Prose):
    """WikiText-2 (Merity et al. 2016), one article a document, split as published."""

    name: ClassVar = "write"
    description: ClassVar = "go on with Wikipedia articles (WikiText-2)"
    higher_is_better: ClassVar = {"next_word_exact": True, "repeated_4grams": False, "word_perplexity": False}

    def texts(self, split: Split) -> Iterator[str]:
        check_split(split)
        text = read(f"lm_wikitext2/{split}.txt")
        starts = [match.start() for match in TITLE.finditer(text)][1:]
        return (text[i:j] for i, j in zip([0, *starts], [*starts, len(text)], strict=True))

    def evaluate(
        self, model: LanguageModel, tokenizer: Tokenizer, split: Split = "test", limit: int | None = None
    ) -> dict[str, float]:
        """`word_perplexity`: exp(-ln p(text) / words), whatever the vocabulary of the model.

        Words are the published ones: what blanks separate, and one <eos> a line (245,569 in the test split).
        """
        texts = list(islice(self.texts(split), limit))
        words = sum(len(text.split()) + text.count("\n") for text in texts)
        return {"word_perplexity": math.exp(text_cost(model, tokenizer, texts) / words), "words": words}


class Shakespeare(Prose):
    """Tiny Shakespeare (Karpathy 2015), split as usual: the first 90 % train, the rest is `valid` and `test`.

    A document is a run of whole speeches, about 4,000 characters.
    """

    name: ClassVar = "write-shakespeare"
    description: ClassVar = "go on with Shakespeare's plays (tiny Shakespeare)"
    higher_is_better: ClassVar = {
        "next_word_exact": True,
        "repeated_4grams": False,
        "nats_per_character": False,
    }

    def texts(self, split: Split) -> Iterator[str]:
        check_split(split)
        text = read("lm_tinyshakespeare/input.txt")
        cut = len(text) * 9 // 10
        text = text[:cut] if split == "train" else text[cut:]
        begin = 0
        while begin < len(text):
            found = text.find("\n\n", begin + DOCUMENT_CHARACTERS)
            end = found + 2 if found >= 0 else len(text)
            yield text[begin:end]
            begin = end

    def evaluate(
        self, model: LanguageModel, tokenizer: Tokenizer, split: Split = "test", limit: int | None = None
    ) -> dict[str, float]:
        """`nats_per_character`: -ln p(text) / characters, whatever the vocabulary of the model."""
        texts = list(islice(self.texts(split), limit))
        characters = sum(map(len, texts))
        return {
            "nats_per_character": text_cost(model, tokenizer, texts) / characters,
            "characters": characters,
        }
