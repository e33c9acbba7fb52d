"""Steps of a training in one of the processes that `torchrun` starts: what they take, as a line of JSON."""

import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formery.data.batching import PairBatches, WindowBatches
from formery.models.compose import language_model, translator
from formery.parts import kernel
from formery.train.layout import Layout, Training, laid_out
from formery.train.loop import adamw, running, update
from formery.train.objective import Batch, next_token, translate
from formery.train.plan import Plan
from formery.train.world import world

VOCABULARY, ROWS, LENGTH = 4096, 16, 256


def training(model: str, precision: Any, rows: int = ROWS) -> Training:
    """A model of 11 M parameters and more, and batches of that many rows: of 4,096 tokens unless told."""
    torch.manual_seed(0)
    plan = Plan(steps=1000, learning_rate=1e-3, precision=precision, label=model)
    random = torch.Generator().manual_seed(1)
    if model == "decoder":
        ids = torch.randint(VOCABULARY, (100_000,), generator=random)
        made: nn.Module = language_model(VOCABULARY, 384, 6, 6, 2, 1024, 512)
        return Training(made, eager_next_token, WindowBatches(ids, LENGTH, rows), plan)
    texts = torch.randint(3, VOCABULARY, (64, 128), generator=random).tolist()
    made = translator(VOCABULARY, 384, 3, 3, 6, 1024, 512, start_token=1)
    pairs = [(text, [1, *text[1:]]) for text in texts]
    return Training(made, eager_translate, PairBatches(pairs, rows * LENGTH, pad=0), plan)


def eager_next_token(model: nn.Module, batch: Batch) -> torch.Tensor:
    """As the recipes compute it."""
    with kernel("eager"):
        return next_token(model, batch)


def eager_translate(model: nn.Module, batch: Batch) -> torch.Tensor:
    """As the recipes compute it."""
    with kernel("eager"):
        return translate()(model, batch)


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def steps(what: Training, layout: Layout, count: int) -> float:
    """The median seconds of a step, the first two aside."""
    taken = []
    with laid_out(layout), running(what.model, what.objective, what.plan) as run:
        optimizer = adamw(run.module, what.plan)
        for step in range(1, count + 1):
            began = time.perf_counter()
            update(run, [what.batches.batch(step)], optimizer, step)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def main() -> None:
    """The steps, after some of a tiny model, so that what PyTorch builds once is not counted."""
    model, precision, recompute, tensor_parallel, count, threads, *rows = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    plan = Plan(steps=10, learning_rate=1e-3)
    tiny = Training(language_model(64, 32, 1, 2, 2, 64, 32), next_token, WindowBatches(torch.arange(64), 16, 8), plan)
    steps(tiny, Layout(), 3)
    del tiny
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here
    before = resident("VmRSS")
    seconds = steps(training(model, precision, *rows), Layout(recompute, tensor_parallel), count)
    found = {"peak": resident("VmHWM") - before, "seconds": seconds}
    peaks = [found] if world().size == 1 else _from_all(found)
    if world().leads:
        print(json.dumps({"peak": max(one["peak"] for one in peaks), "seconds": seconds}))


def _from_all(found: dict[str, float]) -> list[dict[str, float]]:
    box: list[Any] = [None] * world().size
    torch.distributed.all_gather_object(box, found)
    return box


if __name__ == "__main__":
    main()
