"""How much of a draft stands: the target's word on chains and trees, greedily, by sampling, or relaxed.

Greedily a guess stands where it is the target's own choice. By sampling it stands by modified rejection; where several
guesses follow one token they are tried in turn, each against what the ones before have left of the target's
distribution, so that what comes out is the target's own whatever was drafted. A relaxed acceptance lets greedy guesses
stand that the target would not have made: the text is then another one.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from formery.generate.draft import Draft, Row, Verdict
from formery.generate.sampler import Rule, draw, penalised, probabilities
from formery.generate.settings import Settings
from formery.generate.target import canonical, rounding_bound
from formery.models import Model
from formery.parts import Codes

Relaxed = Callable[[Float[Tensor, "vocabulary"], int], bool]
"""Whether a guessed token may stand where the target's logits are these."""


class Judge:
    """Decides how much of each draft stands, and what comes after it."""

    def __init__(self, model: Model, settings: Settings, rule: Rule, guard: bool, relaxed: Relaxed | None = None):
        self.model, self.settings, self.rule, self.guard, self.relaxed = model, settings, rule, guard, relaxed
        self.coded = guard and any(isinstance(part, Codes) for part in model.modules())

    def __call__(
        self, rows: Sequence[Row], drafts: Sequence[Draft], logits: Float[Tensor, "batch width vocabulary"]
    ) -> list[Verdict]:
        """The verdict on each row's draft; logits[i, 0] are those after its last token, then those after guesses."""
        if self.settings.temperature > 0:
            choices = logits.argmax(-1).tolist()
            return [
                self._sample(row, draft, logits[i], choices[i][: len(draft.tokens) + 1])
                for i, (row, draft) in enumerate(zip(rows, drafts, strict=True))
            ]
        plain = logits
        if self.settings.changes_logits:
            logits = logits.clone()
            for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                for j in range(-1, len(draft.tokens)):
                    before = [draft.tokens[place] for place in draft.line(j)]
                    first = not row.output and j < 0
                    logits[i, j + 1] = penalised(logits[i, j + 1], row.tokens + before, self.settings, first)
        choices, close = self._choices(plain, logits)
        return [
            self._greedy(row, draft, choices[i][: len(draft.tokens) + 1], close[i], logits[i])
            for i, (row, draft) in enumerate(zip(rows, drafts, strict=True))
        ]

    def _choices(self, plain: Tensor, logits: Tensor) -> tuple[list[list[int]], list[list[bool]]]:
        """The likeliest tokens, and which of them are near ties; plain: the logits before penalties."""
        if not self.guard:
            likeliest: list[list[int]] = logits.argmax(-1).tolist()
            return likeliest, [[False] * len(row) for row in likeliest]
        # A penalty multiplies what rounding did to a logit as well.
        penalty = self.settings.repetition_penalty
        bound = rounding_bound(plain, self.coded) * max(penalty, 1 / penalty)
        top = logits.topk(min(2, logits.shape[-1]), -1)
        return top.indices[..., 0].tolist(), (top.values[..., 0] - top.values[..., -1] <= bound).tolist()

    def _greedy(self, row: Row, draft: Draft, choices: list[int], close: list[bool], logits: Tensor) -> Verdict:
        guarded, path = 0, list[int]()
        written: list[int] = []
        place: int | None = -1
        while place is not None:
            at = place + 1
            if close[at]:
                decided = canonical(self.model, row.source, row.tokens + written)
                first = not row.output and place < 0
                choices[at] = int(penalised(decided, row.tokens + written, self.settings, first).argmax())
                guarded += 1
            children = draft.children(place)
            place = next((child for child in children if draft.tokens[child] == choices[at]), None)
            if place is None and self.relaxed is not None:
                place = next((child for child in children if self.relaxed(logits[at], draft.tokens[child])), None)
            if place is not None:
                path.append(place)
                written.append(draft.tokens[place])
        return Verdict(len(path), [*written, choices[at]], choices, guarded, path, draft)

    def _sample(self, row: Row, draft: Draft, logits: Tensor, choices: list[int]) -> Verdict:
        path: list[int] = []
        written: list[int] = []
        place = -1
        while True:
            first = not row.output and place < 0
            left = probabilities(logits[place + 1], row.tokens + written, self.settings, first)
            for child in draft.children(place):
                token = draft.tokens[child]
                drawn_from = None if draft.probabilities is None else draft.probabilities[child]
                rest = self.rule(left, drawn_from, token, row.random.random())
                if rest is None:
                    break
                left = rest / rest.sum()
            else:
                return Verdict(len(path), [*written, draw(left, row.random.random())], choices, 0, path, draft)
            path.append(child)
            written.append(token)
            place = child
