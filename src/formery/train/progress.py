"""What a run says while it goes: a live line in a terminal, a plain line now and then elsewhere."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10


class Reporter:
    """Reports the steps `done + 1` to `last` on stderr; says nothing when `quiet`."""

    def __init__(self, label: str, done: int, last: int, quiet: bool) -> None:
        self.label, self.done, self.last = label, done, last
        self.console = Console(stderr=True, quiet=quiet)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self.bar = Progress(
                TextColumn(label, markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False), TimeRemainingColumn(compact=True),
                TextColumn("left"), console=self.console, speed_estimate_period=300,
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=last, completed=done, figures="")
        self.began = time.monotonic()
        self.spoke = -float(SECONDS_BETWEEN_LINES)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Tells that a step is done."""
        figures = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=step, figures=figures)
        elif now - self.spoke >= SECONDS_BETWEEN_LINES or step == self.last:
            self.spoke = now
            left = (now - self.began) / (step - self.done) * (self.last - step)
            self.say(f"{self.label}: step {step}/{self.last}  {figures}  {duration(left)} left")

    def evaluation(self, step: int, scores: dict[str, float], best: bool) -> None:
        """Tells what an evaluation found."""
        found = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.say(f"{self.label}: step {step} evaluated: {found}{'  (best so far)' if best else ''}")

    def say(self, text: str) -> None:
        """Prints one line, above the live line where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """A time span in the largest unit that fits: '45 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
