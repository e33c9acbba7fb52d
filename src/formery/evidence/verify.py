"""Runs a paper's check and writes its record; what an interruption left measured is not measured again."""

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from formery.errors import FormeryError
from formery.evidence import record as records
from formery.evidence.digest import digest
from formery.evidence.machine import machine, versions
from formery.evidence.measured import Budget, Progress, Units, quiet
from formery.evidence.paper import paper as paper_named
from formery.evidence.record import Record
from formery.evidence.verdict import judge
from formery.files import atomic_write


class SavedUnits(Units):
    """Units that go into a file as they are measured, one a line, and are recalled from it.

    A file with another header (other code, machine or budget) is begun anew; a line that was cut off is
    dropped.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], progress: Progress = quiet) -> None:
        super().__init__(progress)
        self.path, self.values = path, _lines(path, header)
        with atomic_write(path) as temporary:
            kept = [header, *({"unit": name, "values": values} for name, values in self.values.items())]
            temporary.write_text("".join(json.dumps(one) + "\n" for one in kept), encoding="utf-8")

    def measure(self, name: str, run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        if name in self.values:
            self.done += 1
            return self.values[name]
        values = super().measure(name, run)
        line = json.dumps({"unit": name, "values": values}, allow_nan=False)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FormeryError(f"cannot write {self.path}: {error.strerror or error}.") from error
        # What is judged is what a later run would recall.
        self.values[name] = json.loads(line)["values"]
        return self.values[name]


def verify(
    slug: str, budget: Budget | None = None, progress: Progress = quiet, folder: Path | None = None
) -> Record:
    """Measures a paper's claim, writes the record to `folder` (by default where records are) and gives it.

    Stopped at any moment, it goes on from the last unit that was measured when it is called again. Raises
    FormeryError for an unknown paper, one without a check, and whatever the check lacks.
    """
    paper = paper_named(slug)
    if paper.check is None:
        raise FormeryError(f"the paper {slug} has no check yet, so there is nothing to verify.")
    budget = budget or Budget()
    folder = folder or records.records_folder()
    code, models = digest(paper.module), records.model_digests(records.shipped_names())
    header = {
        "digest": code,
        "models": models,
        "machine": machine(),
        "versions": versions(),
        "budget": budget.plain(),
    }
    path = folder / f".{slug}.part.jsonl"
    began = time.monotonic()
    units = SavedUnits(path, header, progress)
    measured = paper.check(replace(budget, units=units))
    units.progress(units.done, units.total, "done")
    record = Record(
        slug=slug,
        verdict=judge(measured.criteria),
        claims=paper.claims,
        criteria=list(measured.criteria),
        rows=list(measured.rows),
        baseline=measured.baseline,
        notes=list(measured.notes),
        budget=budget.plain(),
        models={name: digested for name, digested in models.items() if name in measured.models},
        machine=machine(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 1),
        digest=code,
    )
    records.write(record, folder)
    path.unlink(missing_ok=True)
    return record


def _lines(path: Path, header: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The units in a file of that header."""
    found: list[Any] = []
    with suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    if not found or found[0] != header:
        return {}
    units = [one for one in found[1:] if isinstance(one, dict) and isinstance(one.get("values"), dict)]
    return {str(one.get("unit")): one["values"] for one in units}
