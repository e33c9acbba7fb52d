"""What the checks of sharing keys and values between layers have in common: what is measured, and the race."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import torch

from formery.data.batching import WindowBatches
from formery.evidence.accounting import account
from formery.evidence.checks import criterion
from formery.evidence.measured import Budget, Row, spread
from formery.evidence.study import losses
from formery.evidence.verdict import Criterion
from formery.methods.cache.sharing_models import (
    BYTES,
    LENGTH,
    MULTI_HEAD,
    Variant,
    made,
    merged,
    text,
    trained,
    uptrained,
)
from formery.models import Decoder

HELD_OUT = 16  # batches of 32 windows
FAST_WIDTH, FAST_ROWS, FAST_LENGTH, FAST_STEPS = 128, 64, 256, 8  # of the models that are timed
UPTRAINED, MERGED = "{}, uptrained", "{}, merged"


@dataclass
class Found:
    """Numbers by the name of a model, one for each seed.

    losses: in nats a byte of held-out text. sizes: bytes of keys and values a token, measured; states: of the whole
    decode state. parameters: of the model. predicted: the share of the multi-head model's bytes that a model should
    take, by name.
    """

    losses: dict[str, list[float]] = field(default_factory=dict)
    sizes: dict[str, list[float]] = field(default_factory=dict)
    states: dict[str, list[float]] = field(default_factory=dict)
    parameters: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, Fraction] = field(default_factory=dict)

    def more(self, first: str, second: str) -> list[float]:
        """How much larger the loss of the first is, seed by seed."""
        return [one - other for one, other in zip(self.losses[first], self.losses[second], strict=True)]

    def rows(self) -> list[Row]:
        """A row for each model."""
        named = {"loss": self.losses, "bytes": self.sizes, "state_bytes": self.states, "parameters": self.parameters}
        return [
            Row("code", name, 1, {number: spread(values[name]) for number, values in named.items()})
            for name in self.losses
        ]

    def bytes_fall(self) -> Criterion:
        """Whether the bytes of keys and values, measured from storage, are the share that was predicted."""
        whole = self.sizes[MULTI_HEAD.name]
        return criterion(
            "bytes",
            "the bytes of keys and values, measured from storage, over those predicted from layers and heads are 1",
            [
                size / full / float(self.predicted[name])
                for name, sizes in self.sizes.items()
                for size, full in zip(sizes, whole, strict=True)
            ],
            "==",
            1.0,
            essential=True,
        )


def surveyed(budget: Budget, scratch: Sequence[Variant], from_multi_head: Sequence[Variant]) -> Found:
    """All models of a check: trained from scratch, merged from the multi-head model, and uptrained."""
    wanted = [(one, one.name, trained) for one in scratch]
    wanted += [(one, MERGED.format(one.name), merged) for one in from_multi_head if one != MULTI_HEAD]
    wanted += [(one, UPTRAINED.format(one.name), uptrained) for one in from_multi_head]
    budget.units.expect(len(wanted) * len(budget.seeds))
    found = Found()
    for seed in budget.seeds:
        for variant, name, make in wanted:
            numbers = budget.units.measure(f"{name}, seed {seed}", partial(measured, make, variant, seed))
            for key, values in vars(found).items():
                if key != "predicted":
                    values.setdefault(name, []).append(numbers[key])
            found.predicted[name] = variant.share
    return found


def measured(make: Callable[[Variant, int], Decoder], variant: Variant, seed: int) -> dict[str, float]:
    """One model's numbers."""
    model = make(variant, seed)
    held_out = WindowBatches(text("test"), LENGTH, 32)
    taken = account(model, LENGTH)
    return {
        "losses": float(losses(model, held_out, HELD_OUT).mean()),
        "sizes": sum(taken.layers) / (taken.batch * taken.length),
        "states": taken.per_token,
        "parameters": float(model.parameter_count()),
    }


def raced(budget: Budget, variants: Sequence[Variant]) -> list[Row]:
    """Tokens a second of wider models of random weights, over those of the first variant, in interleaved rounds.

    speedup: by PyTorch alone; speedup_compiled: with the compiled kernels for the parts that they know. A text of
    FAST_LENGTH bytes has been read in each of FAST_ROWS rows.
    """
    budget.units.expect(2)
    columns: dict[str, Any] = {
        name: budget.units.measure(f"tokens a second, {name}", partial(_race, budget.rounds, variants, compiled))
        for name, compiled in (("speedup", False), ("speedup_compiled", True))
    }
    return [
        Row("random", one.name, FAST_ROWS, {name: spread(found[one.name]) for name, found in columns.items()})
        for one in variants
    ]


@torch.inference_mode()
def _race(rounds: int, variants: Sequence[Variant], compiled: bool) -> dict[str, list[float]]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(BYTES, (FAST_ROWS, FAST_LENGTH + FAST_STEPS), generator=draw)
    running = []
    for one in variants:
        model = made(one, FAST_WIDTH).eval()
        model.compiled = "auto" if compiled else False
        state, _ = model.begin([row[:1] for row in tokens], tokens.shape[1])
        for piece in tokens[:, :FAST_LENGTH].split(64, 1):
            model.read(piece, state)
        running.append((model, state))
    seconds: list[list[float]] = [[] for _ in running]
    for lap in range(rounds + 1):
        for turn in range(len(running)):
            which = (lap + turn) % len(running)
            model, state = running[which]
            began = time.perf_counter()
            for at in range(FAST_LENGTH, FAST_LENGTH + FAST_STEPS):
                model.step(tokens[:, at : at + 1], state)
            seconds[which].append(time.perf_counter() - began)
            state.rollback([FAST_LENGTH] * FAST_ROWS)
    # The first lap warms up.
    return {
        one.name: [first / own for first, own in zip(seconds[0][1:], taken[1:], strict=True)]
        for one, taken in zip(variants, seconds, strict=True)
    }
