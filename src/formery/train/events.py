"""TensorBoard event files, written at once: a kill loses none, a full disk is told where it happens."""

import os
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from formery.errors import FormeryError


class Events:
    """Appends each step's scalars to a new event file in `folder`; idle without `formery[tensorboard]`.

    Events of steps after `done` in older files of the folder are void from then on.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.installed = find_spec("tensorboard") is not None
        if self.installed:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            self._write(file_version="brain.Event:2")
            self._write(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def append(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars of one step; raises FormeryError when the disk refuses."""
        if self.installed:
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._write(step=step, summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                RecordWriter(file).write(Event(wall_time=time.time(), **fields).SerializeToString())
        except OSError as error:
            raise FormeryError(f"cannot write {self.path}: {error.strerror}.") from error
