"""The verdict on a claim, computed from criteria that are stated before anything is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Relation = Literal["<", "<=", "==", ">=", ">"]
Verdict = Literal["holds", "holds in part", "does not hold", "not testable here"]


@dataclass(frozen=True)
class Criterion:
    """One thing that must be true for a claim to hold: `measured relation threshold`.

    measured, low, high: the median and the range over seeds and rounds; None where it cannot be tested here,
    for the reason `untestable`. essential: the claim falls with it.
    """

    name: str
    statement: str
    relation: Relation
    threshold: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    essential: bool = False
    untestable: str = ""

    def __post_init__(self) -> None:
        found = (self.measured, self.low, self.high)
        if self.untestable:
            if any(number is not None for number in found):
                raise ValueError(f"criterion {self.name!r} has a measurement and a reason why it has none")
        elif self.measured is None or self.low is None or self.high is None:
            raise ValueError(
                f"criterion {self.name!r} has neither a measurement nor a reason why it has none"
            )
        elif not self.low <= self.measured <= self.high:
            raise ValueError(f"criterion {self.name!r}: {self.measured} is outside of its range")

    @property
    def holds(self) -> bool | None:
        """Whether all that was seen meets the threshold, the worse end too; None where it was not tested."""
        if self.low is None or self.high is None:
            return None
        match self.relation:
            case "<":
                return self.high < self.threshold
            case "<=":
                return self.high <= self.threshold
            case ">=":
                return self.low >= self.threshold
            case ">":
                return self.low > self.threshold
            case "==":
                return self.low == self.high == self.threshold


def judge(criteria: Sequence[Criterion]) -> Verdict:
    """The verdict that the criteria give.

    - "not testable here": none could be tested.
    - "does not hold": an essential one failed, or all that were tested did.
    - "holds": all that were tested hold, and no essential one is left untested.
    - "holds in part": anything else.
    """
    tested = [one for one in criteria if one.holds is not None]
    if not tested:
        return "not testable here"
    if any(one.essential and not one.holds for one in tested) or not any(one.holds for one in tested):
        return "does not hold"
    if all(one.holds for one in tested) and not any(one.essential and one.untestable for one in criteria):
        return "holds"
    return "holds in part"
