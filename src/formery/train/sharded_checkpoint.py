"""Checkpoints of a training by many processes: each writes its own part, while the training goes on.

PyTorch's distributed checkpoints do it, in safetensors files; nothing is pickled. A folder `step-N` counts when every
process has written its part: `last.json` then names it, and is replaced as a whole. Any number of processes can read
what any number wrote.
"""

import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from formery.errors import FormeryError, first_line
from formery.files import atomic_write
from formery.train import checkpoint
from formery.train.checkpoint import Tensors

POINTER = "last.json"


class Saver:
    """Writes the checkpoints of a run in `out` one at a time, each while the training goes on.

    group: the processes, talking over a line of their own. leads: whether this one says what counts.
    """

    def __init__(self, out: Path, group: dist.ProcessGroup, leads: bool) -> None:
        self.out, self.group, self.leads = out, group, leads
        self.pending: Future[None] | None = None

    def begin(self, tensors: Mapping[str, Tensor], data: dict[str, Any]) -> None:
        """Copies the tensors and starts to write them; waits first for what is still being written."""
        self.wait()
        folder = self.out / f"step-{data['step']:08d}"
        if self.leads:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier try that did not come to its end
        dist.barrier(self.group)
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        writing = distributed.async_save(dict(tensors), storage_writer=writer, process_group=self.group)
        assert isinstance(writing, Future)
        counted: Future[None] = Future()
        self.pending = counted
        writing.add_done_callback(lambda done: self._written(done, counted, folder, data))

    def wait(self) -> None:
        """Waits until everything is written; raises FormeryError where the disk refused."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()
        except FormeryError:
            raise
        except Exception as error:
            raise FormeryError(
                f"cannot write a checkpoint into {self.out}: {first_line(_reason(error))}; the last one is whole."
            ) from error
        dist.barrier(self.group)

    def _written(self, done: Future[Any], counted: Future[None], folder: Path, data: dict[str, Any]) -> None:
        """Has the checkpoint count, in the thread that wrote it, before anybody begins another."""
        try:
            done.result()
            if self.leads:
                self._count(folder, data)
            counted.set_result(None)
        except BaseException as error:  # raised where the run waits
            counted.set_exception(error)

    def _count(self, folder: Path, data: dict[str, Any]) -> None:
        with atomic_write(self.out / POINTER) as temporary:
            temporary.write_text(json.dumps({"folder": folder.name, **data}, indent=1) + "\n")
        (self.out / checkpoint.LAST).unlink(missing_ok=True)
        for older in steps(self.out):
            if older != folder:
                shutil.rmtree(older, ignore_errors=True)


def _reason(error: BaseException) -> BaseException:
    """What failed in the process where it failed."""
    failures = getattr(error, "failures", None)
    return next((one for one, _ in failures.values()), error) if failures else error


def steps(out: Path) -> list[Path]:
    """The folders of checkpoints, whole or not."""
    return sorted(path for path in out.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def read_data(out: Path) -> dict[str, Any] | None:
    """The data of the checkpoint that counts, its folder's name among them; None where there is none.

    Raises FormeryError where `last.json` is damaged.
    """
    path = out / POINTER
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        whole = isinstance(data["step"], int) and isinstance(data["plan"], dict)
        if not whole or not re.fullmatch(r"step-\d+", data["folder"]):
            raise ValueError("it does not say which step")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormeryError(f"{path} is damaged ({first_line(error)}); start anew in another folder.") from error
    return dict(data)


def load(out: Path, tensors: dict[str, Tensor]) -> None:
    """Fills the tensors, whole or this process's parts, from the checkpoint that counts.

    Raises FormeryError where it is not whole, or has tensors of other names or shapes.
    """
    folder, found = _contents(out)
    shapes = {name: list(one.size) for name, one in found.items()}
    for name in sorted(tensors.keys() | shapes.keys()):
        here = str(list(tensors[name].shape)) if name in tensors else "absent"
        there = str(shapes[name]) if name in shapes else "absent"
        if here != there and not name.startswith("random/"):
            raise FormeryError(f"{folder} belongs to another model: {name} is {there} there and {here} in this one.")
    known = {name: tensor for name, tensor in tensors.items() if name in shapes}
    try:
        distributed.load(
            known, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized()
        )
    except Exception as error:
        raise _damaged(folder, _reason(error)) from error


def read(out: Path) -> Tensors:
    """All tensors of the checkpoint that counts, whole."""
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in _contents(out)[1].items()}
    load(out, tensors)
    return tensors


def discard(out: Path) -> None:
    """Removes the checkpoints of many processes, once another counts."""
    (out / POINTER).unlink(missing_ok=True)
    for folder in steps(out):
        shutil.rmtree(folder, ignore_errors=True)


def _contents(out: Path) -> tuple[Path, dict[str, TensorStorageMetadata]]:
    """The folder that counts, and shape and type of each whole tensor in it."""
    data = read_data(out)
    assert data is not None
    folder = out / data["folder"]
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        return folder, {name: one for name, one in found.items() if isinstance(one, TensorStorageMetadata)}
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: BaseException) -> FormeryError:
    return FormeryError(f"{folder} is no whole checkpoint ({first_line(error)}); start anew in another folder.")
