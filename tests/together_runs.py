"""Trainings of small models, one after the other, as the processes of `torchrun` run them: jobs come as JSON."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formery.__main__ import one_sentence
from formery.data.batching import PairBatches, WindowBatches
from formery.models.compose import language_model, translator
from formery.train import Plan, mean_loss, next_token, train, translate
from formery.train.layout import Layout, laid_out
from formery.train.objective import Batch, Batches
from formery.train.world import world

PLAN = Plan(steps=8, learning_rate=1e-2, warmup=2, evaluate_every=4, checkpoint_every=4, accumulate=2, seed=1)
TRANSLATES = translate(label_smoothing=0.1)


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return language_model(97, 32, 2, 4, 2, 64, 64)


def encoder_decoder() -> nn.Module:
    torch.manual_seed(0)
    return translator(61, 32, 1, 2, 4, 64, 64, start_token=1)


def texts() -> WindowBatches:
    ids = torch.randint(0, 97, (5000,), generator=torch.Generator().manual_seed(1))
    return WindowBatches(ids, 16, 8, 3)


def pairs() -> PairBatches:
    random = torch.Generator().manual_seed(2)

    def drawn() -> list[int]:
        return torch.randint(3, 61, (int(torch.randint(2, 9, (), generator=random)),), generator=random).tolist()

    return PairBatches([(drawn(), [1, *drawn(), 2]) for _ in range(90)], 60, pad=0, seed=3)


class Deadly:
    """Batches of which one kills the process that reads it: the given rank, the first time."""

    def __init__(self, batches: Batches, at: int, rank: int) -> None:
        self.batches, self.at, self.rank = batches, at, rank

    def batch(self, index: int) -> Batch:
        if index == self.at and (world().rank, world().restarts) == (self.rank, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.batches.batch(index)


def run(
    out: str,
    model: str = "decoder",
    stop: int | None = None,
    resume: bool = False,
    deadly: int | None = None,
    **layout: Any,
) -> None:
    """One training into the folder `out`."""
    made, objective = (decoder(), next_token) if model == "decoder" else (encoder_decoder(), TRANSLATES)
    batches: Batches = texts() if model == "decoder" else pairs()
    held_out = [batches.batch(1000)]
    if deadly is not None:
        batches = Deadly(batches, deadly, rank=world().size - 1)
    plan = replace(PLAN, label=model)
    with laid_out(Layout(**layout)):
        evaluate = mean_loss(objective, held_out)
        train(made, objective, batches, plan, out, evaluate, stop_after=stop, resume=resume, progress=False)
    digest = float(sum(one.detach().double().abs().sum() for one in made.parameters()))
    Path(out, f"whole-{world().rank}.txt").write_text(repr(digest))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_sentence():
        for job in json.loads(sys.argv[1]):
            run(**job)
