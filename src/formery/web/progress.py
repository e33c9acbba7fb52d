"""How far a long command is: a live line in a terminal, a plain line now and then elsewhere, on stderr."""

import time
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from formery.web.table import console

SECONDS_BETWEEN_LINES = 10


class Steps:
    """Called with how many steps are done, of how many (0: not known yet), and what comes now."""

    def __init__(self, label: str) -> None:
        self.label, self.console = label, console(stderr=True)
        self.spoke = time.monotonic()
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn(label, markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[now]}", markup=False),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task(label, total=None, now="")

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, done: int, total: int, now: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total or None, now=now)
        elif time.monotonic() - self.spoke >= SECONDS_BETWEEN_LINES:
            self.spoke = time.monotonic()
            of = f"{done} of {total}" if total else str(done)
            self.console.print(f"{self.label}: {of} done, now {now}", markup=False, soft_wrap=True)
