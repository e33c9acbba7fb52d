"""A corpus in files, as pieces that can be read apart and in any order: parquet, JSON lines, plain text.

What a document is: a row of a parquet file, a line of a JSON-lines file (its column `text`, or another), the whole of
a plain text file. A long text file is several pieces, each cut before a line that does not begin with white space.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from formery.errors import FormeryError, first_line

PIECE = 2**25  # bytes of a file in a piece, about
SUFFIXES = (".parquet", ".jsonl", ".txt", ".md", ".py")


@dataclass(frozen=True)
class Piece:
    """A part of a corpus file: row groups of a parquet file, or bytes of another, from `start` to `end`.

    size: of the file. bytes: of the piece.
    """

    file: str
    start: int
    end: int
    size: int
    bytes: int


@dataclass(frozen=True)
class Document:
    """A text, and whether it begins and ends in this piece."""

    text: str
    begins: bool = True
    ends: bool = True


def files(sources: Sequence[str | Path]) -> list[Path]:
    """The corpus files that are named, and those in the folders that are named, in order.

    Raises FormeryError where there is none, or one of a kind that is not read.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        elif not source.is_file():
            raise FormeryError(f"there is no file or folder {source}.")
        elif source.suffix not in SUFFIXES:
            raise FormeryError(f"{source} is none of {', '.join(SUFFIXES)}: give it as one of them.")
        else:
            found.append(source)
    if not found:
        where = ", ".join(map(str, sources))
        raise FormeryError(f"there is no corpus in {where}: no file ends in {' '.join(SUFFIXES)}.")
    return found


def pieces(path: Path, most: int = PIECE) -> list[Piece]:
    """The pieces of a file, each of about `most` bytes; raises FormeryError for a file that is damaged."""
    size = path.stat().st_size
    if path.suffix != ".parquet":
        cuts = [*range(0, size, most), size]
        return [Piece(str(path), at, end, size, end - at) for at, end in pairwise(cuts)]
    groups = _parquet(path).metadata
    found, start, held = [], 0, 0
    for group in range(groups.num_row_groups):
        held += groups.row_group(group).total_byte_size
        if held >= most or group == groups.num_row_groups - 1:
            found.append(Piece(str(path), start, group + 1, size, held))
            start, held = group + 1, 0
    return found


def documents(piece: Piece, column: str = "text") -> Iterator[Document]:
    """The documents of a piece; raises FormeryError where it has no such column, or no text in it."""
    path = Path(piece.file)
    if path.suffix == ".parquet":
        yield from _rows(path, piece, column)
    elif path.suffix == ".jsonl":
        yield from _lines(path, piece, column)
    elif text := _text(path, piece):
        yield Document(text, begins=piece.start == 0, ends=piece.end == piece.size)


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise FormeryError(f"{path} is read with pyarrow: pip install 'formery[parquet]'.") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise FormeryError(f"{path} is no whole parquet file: {first_line(error)}.") from error


def _rows(path: Path, piece: Piece, column: str) -> Iterator[Document]:
    file = _parquet(path)
    if column not in file.schema_arrow.names:
        raise FormeryError(f"{path} has no column {column!r}, but {', '.join(file.schema_arrow.names)}: name one.")
    for group in range(piece.start, piece.end):
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
            for value in batch.column(0).to_pylist():
                yield Document(_checked(value, path, column))


def _lines(path: Path, piece: Piece, column: str) -> Iterator[Document]:
    """The lines that begin in the piece."""
    with path.open("rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            file.readline()  # the rest of a line that began before
        while file.tell() < piece.end and (line := file.readline()):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                at = file.tell() - len(line)
                raise FormeryError(f"{path} has a line that is no JSON, at byte {at}: {first_line(error)}.") from error
            if not isinstance(row, dict) or column not in row:
                raise FormeryError(f"{path} has a line without {column!r}, at byte {file.tell() - len(line)}.")
            yield Document(_checked(row[column], path, column))


def _text(path: Path, piece: Piece) -> str:
    with path.open("rb") as file:
        start, end = (_cut(file, at, piece.size) for at in (piece.start, piece.end))
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormeryError(f"{path} is not text in UTF-8: byte {start + error.start} fits no character.") from error


def _cut(file: Any, at: int, size: int) -> int:
    """The first place from `at` on where a line begins that does not begin with white space; the end if none does."""
    if at in (0, size):
        return at
    file.seek(at - 1)
    file.readline()
    while line := file.readline():
        if not line[:1].isspace():
            return int(file.tell()) - len(line)
    return size


def _checked(value: object, path: Path, column: str) -> str:
    if not isinstance(value, str):
        raise FormeryError(f"{path} has {type(value).__name__} in {column!r}, where text should be.")
    return value
