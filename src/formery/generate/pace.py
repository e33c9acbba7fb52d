"""How much to draft: as much as makes the most tokens a second, by the costs and the acceptance seen so far.

A step that drafts n tokens writes `1 + Σ chances` of them on average and takes `call(1 + n) + draft(n)` seconds. Both
costs are taken to be straight lines of n, fitted as decoding goes on, older steps fading. What is drafted never changes
what is written greedily. By sampling only the past decides how long a draft may be: cutting it by what was drawn would
favour some tokens over others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from formery.generate.draft import Draft, Verdict

FADE = 0.97  # what an observation counts for after one more
DEEPEST = 32  # depths whose acceptance is told apart
EXPLORE = 24  # every so many steps a draft is as long as the drafter makes it
HOPE = (2.0, 3.0)  # at each depth, before anything is seen: accepted, of so many


@dataclass
class Line:
    """A straight line through points that fade: `seconds(n) = fixed + each · n`.

    steep: until points of several n have come, each · n is that share of the whole for n = 1.
    """

    steep: float
    count: float = 0.0
    sums: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def add(self, n: float, seconds: float) -> None:
        """One more point; one far above the line is not the work's own and counts as twice the line."""
        if self.count > 3:
            seconds = min(seconds, 2 * self(n))
        self.count = FADE * self.count + 1
        new = (n, seconds, n * n, n * seconds)
        self.sums = tuple(FADE * old + one for old, one in zip(self.sums, new, strict=True))  # type: ignore[assignment]

    def __call__(self, n: float) -> float:
        if self.count == 0:
            return 0.0
        x, y, xx, xy = (one / self.count for one in self.sums)
        # A few imagined points on the line that was expected keep the slope sane while n hardly varies.
        expected = self.steep * y / (1 - self.steep + self.steep * x) if x > 0 else 0.0
        spread, weight = xx - x * x, 0.05 * max(1.0, x)
        each = max(0.0, (xy - x * y + weight * expected) / (spread + weight))
        return max(0.0, y + each * (n - x))


class Pace:
    """Chooses the length of drafts; named: whether guesses are named, so that their own chances may decide."""

    def __init__(self, named: bool):
        self.named = named
        self.call, self.draft = Line(steep=0.05), Line(steep=0.5)
        self.tried = [HOPE[1]] * DEEPEST
        self.stood = [HOPE[0]] * DEEPEST
        self.hoped = self.came = (
            4.0  # the sum of chances that the drafter told where they were put to the test; what stood
        )
        self.steps = 0

    def rooms(self, rooms: Sequence[int]) -> list[int]:
        """How deep each row's draft may be."""
        self.steps += 1
        if self.steps % EXPLORE == 1:
            return list(rooms)
        longest = self._longest()
        return [min(room, longest) for room in rooms]

    def _longest(self) -> int:
        written, chance = 1.0, 1.0
        best, rate = 0, written / max(1e-9, self.call(1) + self.draft(0))
        for length in range(1, DEEPEST + 1):
            chance *= self.stood[length - 1] / self.tried[length - 1]
            written += chance
            found = written / max(1e-9, self.call(1 + length) + self.draft(length))
            if found > rate:
                best, rate = length, found
        return max(1, best)

    def trim(self, drafts: Sequence[Draft]) -> list[Draft]:
        """The drafts without the guesses that cost more than they bring."""
        if not self.named or self.steps % EXPLORE == 1:
            return list(drafts)
        return [draft if draft.chances is None else self._trimmed(draft) for draft in drafts]

    def _trimmed(self, draft: Draft) -> Draft:
        assert draft.chances is not None
        reached: list[float] = []
        for place, chance in enumerate(draft.chances):
            parent = draft.parent(place)
            reached.append(chance * (1.0 if parent < 0 else reached[parent]))
        order = sorted(range(len(reached)), key=lambda place: (-reached[place], place))
        written, spent = 1.0, self.draft(max(draft.depths, default=0))
        best, rate = 0, written / max(1e-9, self.call(1) + spent)
        for count, place in enumerate(order, 1):
            written += min(1.0, reached[place] * self.came / self.hoped)
            found = written / max(1e-9, self.call(1 + count) + spent)
            if found > rate:
                best, rate = count, found
        return draft.only(sorted(order[:best]))

    def observe(self, drafts: Sequence[Draft], verdicts: Sequence[Verdict], drafting: float, calling: float) -> None:
        """What became of the drafts, and what they cost."""
        self.call.add(1 + max(len(draft.tokens) for draft in drafts), calling)
        self.draft.add(max(max(draft.depths, default=0) for draft in drafts), drafting)
        for draft, verdict in zip(drafts, verdicts, strict=True):
            for depth in range(min(DEEPEST, max(draft.depths, default=0), verdict.accepted + 1)):
                self.tried[depth] = FADE * self.tried[depth] + 1
                self.stood[depth] = FADE * self.stood[depth] + (depth < verdict.accepted)
            if draft.chances is not None:
                # At each token on the way that stands, the chances of all that was tried there.
                tried = [child for place in (-1, *verdict.path) for child in draft.children(place)]
                self.hoped = FADE * self.hoped + sum(draft.chances[child] for child in tried)
                self.came = FADE * self.came + verdict.accepted
