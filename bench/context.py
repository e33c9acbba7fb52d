"""Long contexts: tokens a second while the context grows, and the memory that decode states really take.

Speeds are of one row, one token at a time, systems in turn within each round. They depend on the shapes and not on the
weights, so that models of one size with random weights stand for those that would have to be trained.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bench.context_plot import draw
from bench.scale import GIVEN_BACK, say
from formery.errors import FormeryError
from formery.evidence.machine import machine, versions
from formery.files import atomic_write
from formery.methods.cache.evict import bounded
from formery.methods.cache.tova import Tova
from formery.models import Decoder, Model
from formery.models.compose import language_model
from formery.parts import State
from formery.parts.eviction import Eviction, HeavyHitters, Latest, Sinks
from formery.web.table import listing
from formery.web.words import size

LAYERS, WIDTH, VOCABULARY = 6, 192, 2048  # of the model `long`
CONTEXTS, ROUNDS, STEPS = (512, 1024, 2048, 4096, 8192), 5, 16
BATCH, LONGEST, KEPT = 8, 8192, 1024  # where memory is measured; slots that bounded caches keep there
BLOCK = 16
Make = Callable[[int, int], Model]


def plain(layers: int, width: int, compiled: bool = True) -> Decoder:
    """The architecture of `long`, of any depth and width."""
    model = language_model(VOCABULARY, width, layers, 6, 6, width * 8 // 3, 2 * LONGEST).eval()
    model.compiled = "auto" if compiled else False
    return model


def limited(rule: Eviction, layers: int, width: int, kept: int = KEPT) -> Model:
    """The same with a bounded cache."""
    return bounded(plain(layers, width), rule, kept, BLOCK)


SYSTEMS: dict[str, Make] = {
    "whole cache": plain,
    "whole cache, no kernels": partial(plain, compiled=False),
    f"window, {KEPT}": partial(limited, Latest()),
    f"window and first tokens, {KEPT}": partial(limited, Sinks()),
    f"h2o, {KEPT}": partial(limited, HeavyHitters()),
    f"tova, {KEPT}": partial(limited, Tova()),
}


@torch.inference_mode()
def reading(model: Model, tokens: Tensor, capacity: int, chunk: int) -> State:
    """A state that has read these tokens."""
    state, _ = model.begin([row[:1].tolist() for row in tokens], capacity)
    for piece in tokens.split(chunk, 1):
        model.read(piece, state)
    return state


def memory(
    name: str, batch: int = BATCH, context: int = LONGEST, layers: int = LAYERS, width: int = WIDTH
) -> dict[str, Any]:
    """What the state of a system takes in a process of its own."""
    given = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(__file__).parents[1]), **GIVEN_BACK}
    code = [sys.executable, "-m", "bench.context_step", json.dumps([name, batch, context, layers, width])]
    told = subprocess.run(code, check=True, capture_output=True, text=True, env=given).stdout.splitlines()[-1]
    return {"system": name, "batch": batch, "context": context, **json.loads(told)}


@torch.inference_mode()
def speeds(contexts: tuple[int, ...], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Tokens a second of each system at each context, systems in turn in each round."""
    found = []
    for context in contexts:
        say(f"context of {context}")
        going = {}
        for name, make in SYSTEMS.items():
            torch.manual_seed(0)
            model = make(LAYERS, WIDTH)
            tokens = torch.randint(VOCABULARY, (1, context))
            going[name] = (model, reading(model, tokens, context + rounds * steps + 8, 256))
        taken: dict[str, list[float]] = {name: [] for name in going}
        for _ in range(rounds):
            for name, (model, state) in going.items():
                model.step(torch.tensor([[1]]), state)
                began = time.perf_counter()
                for _ in range(steps):
                    model.step(torch.tensor([[1]]), state)
                taken[name].append(steps / (time.perf_counter() - began))
        for name, values in taken.items():
            (_, state), ratios = going[name], [a / b for a, b in zip(values, taken["whole cache"], strict=True)]
            found.append({
                "system": name, "context": context, "tokens_per_second": statistics.median(values), "low": min(values),
                "high": max(values), "over_whole_cache": statistics.median(ratios), "state_bytes": state.nbytes,
            })  # fmt: skip
    return found


def measure(asked: Namespace) -> int:
    """Measures all, prints it, keeps it and draws it."""
    if asked.again is not None:
        return draw_again(asked.again, asked.plot)
    quick = asked.quick
    names = [name for name in SYSTEMS if name != "whole cache, no kernels"]
    where = {"batch": 2, "context": 1024, "layers": 2} if quick else {}
    kept = []
    for name in names[:2] if quick else names:
        say(f"memory of {name}")
        kept.append(memory(name, **where))
    found = {
        "memory": kept,
        "speed": speeds(CONTEXTS[:2] if quick else CONTEXTS, 2 if quick else ROUNDS, STEPS),
        "machine": machine(),
        "versions": versions(),
    }
    if asked.json:
        with atomic_write(asked.json) as path:
            path.write_text(json.dumps(found, indent=1) + "\n")
    show(found)
    if asked.plot is not None:
        draw(found, asked.plot)
    return 0


def draw_again(results: Path, out: Path | None) -> int:
    """Draws what was measured before."""
    if out is None:
        raise FormeryError("--again draws what was measured before: name the picture with --plot.")
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        found["speed"], found["memory"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormeryError(
            f"{results} holds no results of `python -m bench context`: measure them with --json."
        ) from error
    draw(found, out)
    return 0


def show(found: dict[str, Any]) -> None:
    """The two tables."""
    console = Console()
    whole = found["memory"][0]
    rows = [
        [one["system"], size(one["accounted"]), size(one["measured"]), f"{whole['accounted'] / one['accounted']:.2f}",
         f"{whole['measured'] / one['measured']:.2f}"]
        for one in found["memory"]
    ]  # fmt: skip
    head = ["system", "accounted", "resident", "times less,\naccounted", "times less,\nresident"]
    console.print(f"The state of {whole['batch']} rows of {whole['context']:,} tokens")
    console.print(listing(head, rows, numbers=4))
    contexts = sorted({one["context"] for one in found["speed"]})
    known = {(one["system"], one["context"]): one["tokens_per_second"] for one in found["speed"]}
    rows = [[name, *(f"{known[name, at]:.0f}" for at in contexts)] for name in dict.fromkeys(s for s, _ in known)]
    console.print("Tokens a second of one row, by the length of its context")
    console.print(listing(["system", *(f"{at:,}" for at in contexts)], rows, numbers=len(contexts)))
