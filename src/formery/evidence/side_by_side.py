"""Runs one function in several processes of this machine that can send each other tensors."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from formery.errors import FormeryError


def side_by_side(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` gives in each of `size` processes, of which each computes with one thread.

    They have met through torch.distributed (gloo). `function` must be importable by name, and it, what it is given and
    what it gives picklable. Raises FormeryError for size < 1, for what one of them raises, and when one of them dies;
    the others are then ended.
    """
    if size < 1:
        raise FormeryError(f"at least 1 process must run, not {size}.")
    context = multiprocessing.get_context("spawn")
    found: dict[int, Any] = {}
    lines: dict[Connection, int] = {}
    processes: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                here, there = context.Pipe(duplex=False)
                given = (rank, size, str(Path(folder, "store")), there, function, arguments)
                process: BaseProcess = context.Process(target=_one, args=given, daemon=True)
                process.start()
                there.close()  # else its end would not be seen here when the process dies
                processes.append(process)
                lines[here] = rank
            while lines:
                for line in cast(list[Connection], wait(list(lines))):
                    found[lines.pop(line)] = _heard(line)
        finally:
            for process in processes:
                if len(found) < size:
                    process.kill()
                process.join()
    return [found[rank] for rank in range(size)]


def _heard(line: Connection) -> Any:
    try:
        failed, value = pickle.loads(line.recv_bytes())
    except EOFError as error:
        raise FormeryError("one of the processes that work together has died.") from error
    if failed:
        raise FormeryError(value)
    return value


def _one(
    rank: int, size: int, store: str, line: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        answer = False, function(*arguments)
        dist.barrier()  # nobody leaves while another may still be sending to it
        dist.destroy_process_group()
    except FormeryError as error:
        answer = True, str(error)
    except Exception:
        answer = True, f"a process that works with others failed:\n{traceback.format_exc()}"
    # As bytes: a tensor would otherwise stay here, in a process that ends.
    line.send_bytes(pickle.dumps(answer))
