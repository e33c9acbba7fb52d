"""Small models that a check trains: variants of one another, from several seeds, each on the same tokens."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.data.batching import WindowBatches
from formery.data.sources import cache
from formery.errors import FormeryError
from formery.train.loop import train
from formery.train.objective import Batches, Objective, next_token
from formery.train.plan import Plan

Trained = TypeVar("Trained", bound=nn.Module)


def grown(
    name: str,
    make: Callable[[], Trained],
    batches: Batches,
    plan: Plan,
    objective: Objective = next_token,
    sources: Sequence[Callable[..., Any]] = (),
) -> Trained:
    """The model that `make` makes, trained after `plan`; its random weights follow from the plan's seed.

    It is trained in the cache, goes on where it was interrupted, and is not trained again while its name, description,
    plan, and the files that define `make`, `objective` and `sources` are the same. It is given in evaluation mode.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(plan.seed)
        model = make()
        files = sorted({_file(one) for one in (make, objective, *sources)})
        described = json.dumps([getattr(model, "describe", lambda: "")(), plan.describe(), _told(batches)])
        parts = [described.encode(), *(Path(file).read_bytes() for file in files)]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        out = cache() / "studies" / f"{name.replace('/', '-')}-{digest}"
        train(model, objective, batches, plan, out, resume=out.exists())
    return model.eval()


def _told(batches: Batches) -> dict[str, Any]:
    """The settings of a source of batches."""
    plain = {key: value for key, value in vars(batches).items() if isinstance(value, int | float | str | bool)}
    return {"kind": type(batches).__name__, **plain}


def _file(made: Any) -> str:
    while isinstance(made, partial):
        made = made.func
    return inspect.getfile(inspect.unwrap(made))


@torch.inference_mode()
def losses(model: nn.Module, windows: WindowBatches, number: int) -> Float[Tensor, "rows time"]:
    """The loss of each token of `number` batches of held-out windows, in nats."""
    if number < 1:
        raise FormeryError(f"losses are of at least 1 batch, not of {number}.")
    found = []
    for step in range(number):
        tokens = windows.batch(step)["tokens"]
        logits = model(tokens[:, :-1])
        found.append(nn.functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none"))
    return torch.cat(found)
