"""Lossy acceptance: rules by which a greedy guess may stand although it is not the target's own choice.

Each is made from its options and then asked `rule(logits, token)`, the logits being the target's at that place, of
guesses that differ from the target's likeliest token; that one always stands. The text is then no longer the target's.
By sampling they are not asked: there the target's distribution is kept.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError


@dataclass(frozen=True)
class NearBest:
    """A guess stands among the `beta` likeliest tokens, at most `tau` nats less likely than the likeliest.

    `log p(best) - log p(token) <= tau`, and fewer than `beta` tokens are likelier (Xia et al., "Speculative Decoding",
    2023). With beta = 1 or tau = 0 nothing but the target's own choice stands.
    """

    beta: int = 3
    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 1 or not self.tau >= 0:
            raise FormeryError(f"a relaxed acceptance needs beta >= 1 and tau >= 0, not {self.beta} and {self.tau}.")

    def __call__(self, logits: Float[Tensor, "vocabulary"], token: int) -> bool:
        if self.beta == 1 or self.tau == 0:  # said outright: rounding may put a tie above the target's choice
            return False
        own = logits[token]
        return bool(logits.amax() - own <= self.tau) and int((logits > own).sum()) < self.beta


@dataclass(frozen=True)
class Rollback:
    """A guess stands where it costs the target at most `rollback` nats: `-log p(token) <= rollback`.

    From the first guess on that costs more everything is taken back (Kim et al., "Big Little Decoder", 2023). Below
    log 2 nothing but the target's own choice stands, since no other token can have half of the probability; with
    infinity every guess does.
    """

    rollback: float = 5.0

    def __post_init__(self) -> None:
        if not self.rollback >= 0:
            raise FormeryError(f"guesses are rolled back from a cost of 0 nats or more on, not {self.rollback}.")

    def __call__(self, logits: Float[Tensor, "vocabulary"], token: int) -> bool:
        if self.rollback < math.log(2):
            return False
        return bool(logits.logsumexp(-1) - logits[token] <= self.rollback)
