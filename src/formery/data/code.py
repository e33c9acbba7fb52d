"""The work `code`: going on with Python as people write it, on the running interpreter's standard library.

Every machine that has Python has the data. It differs between versions of Python, so numbers are only
comparable under the same one.
"""

import ast
import hashlib
import math
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar, Literal

from formery.data.base import Example, Split, Work, check_outputs, check_split
from formery.data.scoring import LanguageModel, text_cost
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError

SKIPPED_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__"),
        *("test", "tests", "idle_test", "turtledemo", "__phello__"),
        *("encodings", "pydoc_data", "ensurepip"),
    )
)
# Tables, and build settings that name the machine.
MACHINE_MADE = re.compile(r"_sysconfigdata.*|_casefix|stringprep|_compat_pickle")
LARGEST = 200_000
SHARES: tuple[tuple[Split, float], ...] = (("train", 0.92), ("valid", 0.95), ("test", 1.0))
PROMPT_CHARACTERS = 1200


def draw(path: str) -> float:
    """A number in [0, 1) that depends on nothing but `path`: it orders the files and chooses their split."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


def modules(split: Split, root: Path) -> list[str]:
    """The relative paths of the split's modules below `root`, in an order that mixes the packages."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if not MACHINE_MADE.fullmatch(path.stem) and 0 < path.stat().st_size < LARGEST:
                found.append(path.relative_to(root).as_posix())
    return sorted((p for p in found if next(s for s, end in SHARES if draw(p) < end) == split), key=draw)


def functions(source: str) -> Iterator[tuple[str, str, int]]:
    """(prompt, reference, line) for each function that is long enough to be cut in its body.

    The cut is at the end of a line about two fifths into the body, the docstring not counted: the prompt ends
    before the line break and the reference begins with it, so that a tokenizer sees the two as it sees
    whole code.
    """
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        statements = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        if not statements or node.end_lineno is None or node.end_lineno - statements[0].lineno < 7:
            continue
        first, end = statements[0].lineno - 1, node.end_lineno
        earliest, latest = first + (end - first) * 2 // 5, first + (end - first) // 2
        cut = next(
            (i for i in range(earliest, latest + 1) if lines[i - 1].strip() and lines[i].strip()), earliest
        )
        if sum(bool(line.strip()) for line in lines[cut:end]) < 3:
            continue
        before = "\n".join(lines[:cut])
        if len(before) > PROMPT_CHARACTERS:
            before = before[before.index("\n", len(before) - PROMPT_CHARACTERS - 1) + 1 :]
        yield before, "\n" + "\n".join(lines[cut:end]), cut + 1


def next_line(text: str) -> str:
    """The first line of `text` that is not blank, without trailing spaces."""
    return next((line.rstrip() for line in text.split("\n") if line.strip()), "")


class Code(Work[str]):
    """Python's standard library, a module a document, split by file 92 / 3 / 5, without tests and tables."""

    name: ClassVar = "code"
    kind: ClassVar[Literal["decoder"]] = "decoder"
    description: ClassVar = "go on with a Python function (the standard library of the running interpreter)"
    higher_is_better: ClassVar = {"next_line_exact": True, "bits_per_byte": False}

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or sysconfig.get_path("stdlib"))

    def documents(self, split: Split) -> Iterator[tuple[str, str]]:
        """(relative path, source text) of each module of the split."""
        check_split(split)
        paths = modules(split, self.root)
        if not paths:
            raise FormeryError(
                f"{self.root} holds no Python modules for the split {split!r} of the work 'code'."
            )
        for path in paths:
            with tokenize.open(self.root / path) as file:
                yield path, file.read()

    def texts(self, split: Split) -> Iterator[str]:
        return (source for _, source in self.documents(split))

    def candidates(self, split: Split) -> Iterator[Example]:
        for path, source in self.documents(split):
            for prompt, reference, line in functions(source):
                yield Example(prompt, reference, f"{path}:{line}")

    def quality(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float | str]:
        """`next_line_exact`: the share of outputs whose first non-blank line is that of the reference."""
        check_outputs(outputs, examples)
        hits = sum(next_line(o) == next_line(e.reference) for o, e in zip(outputs, examples, strict=True))
        return {"next_line_exact": hits / len(examples)}

    def evaluate(
        self, model: LanguageModel, tokenizer: Tokenizer, split: Split = "test", limit: int | None = None
    ) -> dict[str, float]:
        """`bits_per_byte`: -log2 p(documents) / their UTF-8 bytes, comparable between vocabularies."""
        texts = list(islice(self.texts(split), limit))
        size = sum(len(text.encode()) for text in texts)
        return {"bits_per_byte": text_cost(model, tokenizer, texts) / math.log(2) / size, "bytes": size}
