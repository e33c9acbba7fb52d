"""What a training needs of each process, as a table."""

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from formery.errors import FormeryError
from formery.train.estimate import Need
from formery.web.table import listing
from formery.web.words import counted, size

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
NAMES = {
    "parameters": "parameters, its part",
    "gathered": "parameters, gathered",
    "gradients": "gradients, its part",
    "optimiser": "optimiser",
    "activations": "activations",
}


def memory(text: str) -> int:
    """The bytes that "80GB", "24 GiB" or "512MiB" mean; raises FormeryError for what is no amount of memory."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if not found or float(found[1]) <= 0:
        raise FormeryError(f"{text!r} is no amount of memory; write it as 80GB or 24GiB.")
    return int(float(found[1]) * UNITS[found[2] or ""])


def needs(found: Sequence[Need], within: int | None) -> RenderableType:
    """What each layout needs, and which fit."""
    first = found[0]
    processes = "1 process" if first.processes == 1 else f"{first.processes} processes"
    batch = counted(first.rows, "row")
    heading = Text(f"{first.label}: {first.parameters:,} parameters, {processes}, {batch} of a batch in each")
    head = ("at the most, in each process", *(_layout(one) for one in found))
    rows: list[tuple[str, ...]] = [
        (says, *(size(one.held[name]) for one in found)) for name, says in NAMES.items()
    ]
    rows.append(("together", *(size(one.total) for one in found)))
    if within is not None:
        rows.append((f"fits {size(within)}", *("yes" if one.total <= within else "no" for one in found)))
        rows.append(("rows that would fit", *(f"{one.rows_within(within):,}" for one in found)))
    rows.append(("received in a step", *(size(one.sent) for one in found)))
    lines: list[RenderableType] = [heading, Text(), listing(head, rows, numbers=len(found))]
    if first.state[0]:
        fixed = f" and {size(first.state[1])} for a text of any length" if first.state[1] else ""
        lines.append(Text(f"\nDecoding keeps {size(first.state[0])} of each token{fixed}."))
    lines.append(Text("Tensors alone: Python and PyTorch take some 0.4 GiB besides, a card's driver as much again."))
    return Group(*lines)


def _layout(one: Need) -> str:
    asked = [f"{one.layout.tensor_parallel} share layers"] if one.layout.tensor_parallel > 1 else []
    asked += ["recomputed"] if one.layout.recompute else []
    return ", ".join(asked) or "kept"
