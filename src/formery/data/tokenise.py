"""A corpus becomes token shards, on all cores; what was done stays done when it is stopped."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from formery.data.corpus import PIECE, Document, Piece, documents, files, pieces
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError
from formery.files import atomic_write

PLAN, TOKENIZER, INDEX = "plan.json", "tokenizer.json", "index.json"
AT_ONCE = 2**20  # characters that are encoded in one call

if TYPE_CHECKING:
    from formery.data.shards import Shards

Tell = Callable[[int, int, str], None]


def tokenise(
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    column: str = "text",
    jobs: int | None = None,
    tell: Tell | None = None,
    piece: int = PIECE,
) -> "Shards":
    """Writes the tokens of a corpus into shards in the folder `out`, every document between <bos> and <eos>.

    sources: files and folders (`corpus`). jobs: processes, one a core unless given. tell: is told how many shards are
    done, of how many, and what comes. Pieces of about `piece` bytes become a shard each; when the same corpus is
    tokenised again into the same folder, the shards that are done stay. Raises FormeryError for a corpus that cannot
    be read, for a folder that holds another one, and where the disk refuses.
    """
    from formery.data.shards import Shards  # PyTorch, which the processes that tokenise do without

    out = Path(out)
    if jobs is not None and jobs < 1:
        raise FormeryError(f"tokenising takes at least 1 process, not {jobs}.")
    parts = packed([one for path in files(sources) for one in pieces(path, piece)], piece)
    kind = "uint16" if tokenizer.vocabulary_size <= 2**16 else "uint32"
    listed = [[*map(asdict, some)] for some in parts]
    plan = {"tokenizer": tokenizer.digest, "column": column, "dtype": kind, "shards": listed}
    _begin(out, plan, tokenizer)
    names = [f"shard-{number:06d}.bin" for number in range(len(parts))]
    waiting = [(part, name) for part, name in zip(parts, names, strict=True) if not (out / name).exists()]
    done = len(parts) - len(waiting)
    if tell:
        tell(done, len(parts), "the tokenizer")
    for name in _in_parallel(waiting, out, column, kind, jobs or os.cpu_count() or 1):
        done += 1
        if tell:
            tell(done, len(parts), name)
    width = numpy.dtype(kind).itemsize
    counts = [{"file": name, "tokens": (out / name).stat().st_size // width} for name in names]
    index = {"format": 1, "dtype": kind, "tokenizer": tokenizer.digest, "shards": counts}
    with atomic_write(out / INDEX) as path:
        path.write_text(json.dumps(index, indent=1) + "\n")
    return Shards(out)


def packed(parts: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Pieces in their order, put together as long as they have `most` bytes at most."""
    found: list[list[Piece]] = []
    held = 0
    for one in parts:
        if not found or held + one.bytes > most:
            found.append([])
            held = 0
        found[-1].append(one)
        held += one.bytes
    return found


def _begin(out: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Writes the plan into `out`, or finds the very same there."""
    path = out / PLAN
    said = json.dumps({**plan, "digest": hashlib.sha256(json.dumps(plan).encode()).hexdigest()}, indent=1) + "\n"
    if path.exists():
        if path.read_text(errors="replace") != said:
            raise FormeryError(
                f"{out} holds another corpus, or this one as it was before or by another tokenizer; choose another "
                "folder."
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(said)
    tokenizer.save(out / TOKENIZER)


def _in_parallel(
    waiting: Sequence[tuple[list[Piece], str]], out: Path, column: str, kind: str, jobs: int
) -> Iterator[str]:
    """The names of the shards, each when it is written; no more are begun than there are processes, and one."""
    if not waiting:
        return
    # Forked processes would inherit the threads of PyTorch and of the tokenizer, locked.
    context = multiprocessing.get_context("spawn")
    start = (str(out / TOKENIZER),)
    pool = ProcessPoolExecutor(min(jobs, len(waiting)), context, initializer=_start, initargs=start)
    left = iter(waiting)
    running: set[Future[str]] = set()
    try:
        while True:
            while len(running) <= jobs and (one := next(left, None)):
                with _uninterrupted():
                    running.add(pool.submit(_write, one[0], out / one[1], column, kind))
            if not running:
                return
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                yield future.result()
    except BrokenProcessPool as error:
        raise FormeryError(
            "a process that tokenises was killed, perhaps for memory; the same command goes on, --jobs 1 takes less."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # what is being written is finished


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C does not reach processes that begin in the block: one that died of it could hold what others wait for."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_tokenizer: list[Tokenizer] = []  # of a process that tokenises


def _start(path: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes fill the cores already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer[:] = [Tokenizer.load(path)]


def _end_with_parent() -> None:
    """Ends this process when the one that began it is gone, killed perhaps."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(parts: list[Piece], path: Path, column: str, kind: str) -> str:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        texts = chain.from_iterable(documents(piece, column) for piece in parts)
        for ids in encoded(texts, _tokenizer[0]):
            file.write(numpy.asarray(ids, kind).tobytes())
    return path.name


def encoded(texts: Iterator[Document], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of documents, some at a time, with <bos> where one begins and <eos> where one ends, if there are such."""
    held: list[Document] = []
    characters = 0
    for one in texts:
        held.append(one)
        characters += len(one.text)
        if characters >= AT_ONCE:
            yield _framed(held, tokenizer)
            held, characters = [], 0
    if held:
        yield _framed(held, tokenizer)


def _framed(held: Sequence[Document], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for one, row in zip(held, tokenizer.encode_batch([one.text for one in held]), strict=True):
        if one.begins and tokenizer.bos is not None:
            ids.append(tokenizer.bos)
        ids += row
        if one.ends and tokenizer.eos is not None:
            ids.append(tokenizer.eos)
    return ids
