"""Checks of many papers, each in a process of its own, so that one that dies takes no other along.

Each writes its record when it is done and keeps what it measured meanwhile, so that a sweep that was stopped, or a
check whose process was killed, goes on where it was. Side by side they disturb each other's times: by default they
run one after the other.
"""

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from formery.errors import FormeryError
from formery.evidence import record as records
from formery.evidence.measured import Budget
from formery.evidence.record import Record

ATTEMPTS = 3  # for a check whose process dies
POLL = 0.05  # seconds between two looks at the processes


@dataclass(frozen=True)
class Outcome:
    """What became of a paper's check: its record, or in a sentence why there is none."""

    slug: str
    record: Record | None
    problem: str = ""
    seconds: float = 0.0
    attempts: int = 1


class _Child:
    """A check in a process."""

    def __init__(self, slug: str, budget: Budget, folder: Path, attempts: int = 1) -> None:
        self.slug, self.budget, self.folder, self.attempts = slug, budget, folder, attempts
        self.began = time.monotonic()
        self.said: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read when the process has ended
        given = [slug, str(folder), json.dumps(budget.plain())]
        self.process = subprocess.Popen([sys.executable, "-m", __name__, *given], stderr=self.said, text=True)

    def outcome(self) -> Outcome:
        """What became of it; to be asked for when it has ended."""
        seconds = time.monotonic() - self.began
        if self.process.returncode == 0:
            return Outcome(self.slug, records.read(self.slug, self.folder), "", seconds, self.attempts)
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        killed = f"its process was killed by signal {-self.process.returncode}, {self.attempts} times"
        problem = killed if self.process.returncode < 0 else lines[-1] if lines else "it failed without a word"
        return Outcome(self.slug, None, problem.removeprefix("formery: "), seconds, self.attempts)

    def end(self) -> None:
        """Ends the process, at once."""
        self.process.kill()
        self.process.wait()


def sweep(
    slugs: Sequence[str], jobs: int = 1, budget: Budget | None = None, folder: Path | None = None
) -> Iterator[Outcome]:
    """Runs the checks of these papers, `jobs` at once, and gives each outcome when it is there.

    A process that is killed is started again, and goes on from what it had measured. Left early, or by Ctrl-C, all of
    them end. Raises FormeryError for jobs < 1.
    """
    if jobs < 1:
        raise FormeryError(f"a sweep runs at least 1 check at once, not {jobs}.")
    budget, folder = budget or Budget(), folder or records.records_folder()
    waiting, running = list(slugs), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Child(waiting.pop(0), budget, folder))
            time.sleep(POLL)
            for child in [one for one in running if one.process.poll() is not None]:
                running.remove(child)
                if child.process.returncode < 0 and child.attempts < ATTEMPTS:
                    running.append(_Child(child.slug, budget, folder, child.attempts + 1))
                else:
                    yield child.outcome()
    finally:
        for child in running:
            child.end()


def run(slug: str, folder: Path, plain: dict[str, Any]) -> Record:
    """One check, as a process or a node of a cluster runs it."""
    from formery.evidence.verify import verify
    importlib.import_module("formery.methods").discover()  # papers lie above this room
    return verify(slug, Budget(**{**plain, "seeds": tuple(plain["seeds"])}), folder=folder)


def main() -> None:
    """The process of one check: its slug, the folder of records, and the budget."""
    slug, folder, plain = sys.argv[1:]
    try:
        run(slug, Path(folder), json.loads(plain))
    except FormeryError as error:
        sys.exit(f"formery: {error}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # who began the sweep says so
        main()
