"""One case from beginning to end: systems loaded, raced against each other and the machine's limits, judged."""

import contextlib
import gc
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from bench.cases import Case
from bench.limits import arithmetic, bandwidth
from bench.race import Entrant, Tell, lap, race
from bench.rows import Row, rows_of
from bench.systems import KNOWN, Refused, System
from formery.errors import first_line

REPEATS = {"verify": 15, "prefill": 2}


@dataclass
class Outcome:
    """The rows of a case, and who did not take part and why."""

    rows: list[Row] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def skip(self, case: Case, system: str, why: str) -> None:
        """Notes that a system did not take part."""
        self.skipped.append({"case": case.title, "system": system, "why": why})


def run(case: Case, names: Sequence[str], rounds: int, tell: Tell) -> Outcome:
    """Races the systems of these names that take part in the case."""
    outcome, entrants = Outcome(), []
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            tell(0, 0, f"{name}: warming up")
            try:
                entrants += _ready(name, case, stack)
            except Refused as refusal:
                outcome.skip(case, name, str(refusal))
            except Exception as error:  # whatever a peer breaks on, the others still run
                outcome.skip(case, name, f"failed: {type(error).__name__}: {first_line(error)}.")
        if entrants:
            limits = [bandwidth(), arithmetic(case.dtype)]
            for limit in limits:
                lap(limit)
            *laps, reading, product = race([*entrants, *limits], rounds, tell)
            outcome.rows = rows_of(case, entrants, laps, reading, product)
    del entrants
    gc.collect()
    return outcome


def _ready(name: str, case: Case, stack: contextlib.ExitStack) -> list[Entrant]:
    """The system's entrants, warm, none where it does not do such cases; raises Refused where it cannot now."""
    known = KNOWN[name]
    if not known.installed:
        raise Refused(f"not installed; pip install {known.pip}")
    kind = known.find()
    if not kind.takes(case):
        return []
    system = kind(case)
    stack.callback(system.close)
    found = entrants_of(name, system)
    for entrant in found:
        entrant.prepare()
        entrant.output = entrant.run()
        _check_length(case, entrant)
        entrant.detail = system.detail
    return found


def entrants_of(name: str, system: System) -> list[Entrant]:
    """What of a system is timed in its case."""
    case = system.case
    repeats = REPEATS.get(case.work, 1)
    if case.work == "verify":
        return [
            Entrant(name, partial(system.extend, draft(case, width)), system.rewind, repeats, width)
            for width in case.widths
        ]
    work = {"train": system.step, "prefill": system.read}.get(case.work, system.write)
    return [Entrant(name, work, repeats=repeats)]


def draft(case: Case, width: int) -> list[int]:
    """The tokens that a timed call reads, the same for all systems."""
    draw = random.Random(f"{case.shape.name} {width}")
    return [draw.randrange(1, case.shape.vocabulary - 1) for _ in range(width)]


def _check_length(case: Case, entrant: Entrant) -> None:
    """Raises ValueError where fewer or more tokens came than the timing counts."""
    if case.work == "train":
        return
    asked = entrant.width or case.new or 1
    for row in entrant.output:
        if len(row) != asked:
            raise ValueError(f"{len(row)} tokens came where {asked} were asked for")
