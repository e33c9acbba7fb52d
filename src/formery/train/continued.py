"""A shipped text model that is trained on, for a while, on the text that it was trained on."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from formery.data.batching import WindowBatches
from formery.data.works import work as work_named
from formery.models import Decoder, load
from formery.parts import kernel
from formery.train.loop import train
from formery.train.objective import Batch, Objective, mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Recipe, Trained, register
from formery.train.text import joined

LICENCES = {"code": "Python Software Foundation License 2.0 (the training text)"}
LENGTH, EVALUATED = 256, 8  # tokens of a window; batches on which it is evaluated


class Numbered:
    """Windows of a text, and with each batch its number, for objectives that change from step to step."""

    def __init__(self, batches: WindowBatches):
        self.batches = batches

    def batch(self, step: int) -> Batch:
        return {**self.batches.batch(step), "step": torch.tensor(step)}


def continued(
    name: str,
    description: str,
    change: Callable[[Decoder, Batch], None],
    objective: Callable[[Decoder, Batch], torch.Tensor],
    steps: int,
    learning_rate: float = 5e-4,
    batch_size: int = 8,
) -> Recipe:
    """Registers the recipe "work/method", which trains the shipped model of that work on.

    change: what is done to the model first, in place, given a batch of the text. objective: (model, batch) -> loss;
    while training a batch has the number of its step, as "step".
    """
    work_name = name.partition("/")[0]
    plan = Plan(
        steps=steps,
        learning_rate=learning_rate,
        warmup=min(20, steps),
        final_learning_rate_ratio=0.02,
        precision="bfloat16",
        evaluate_every=steps,
        checkpoint_every=100,
        seed=2,
        label=name,
    )

    def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
        model: Decoder = load(work_name)
        work, tokenizer = work_named(work_name), model.tokenizer
        assert tokenizer is not None
        ids, others = (joined(tokenizer, work.texts(split)) for split in ("train", "valid"))
        batches = Numbered(WindowBatches(ids, LENGTH, batch_size, plan.seed))
        held_out = WindowBatches(others, LENGTH, batch_size)
        change(model, batches.batch(0))
        evaluate = mean_loss(_eagerly(objective), [held_out.batch(step) for step in range(EVALUATED)])
        result = train(
            model, _eagerly(objective), batches, plan, out, evaluate, stop_after=max_steps, resume=resume
        )
        return Trained(model, result, plan.steps, (plan,), work_name, LICENCES[work_name])

    return register(Recipe(name, description, run, (change, objective)))


def _eagerly(objective: Callable[[Decoder, Batch], torch.Tensor]) -> Objective:
    """At these lengths a processor computes written-out attention fastest."""

    def computed(model: nn.Module, batch: Batch) -> torch.Tensor:
        assert isinstance(model, Decoder)
        with kernel("eager"):
            return objective(model, batch)

    return computed
