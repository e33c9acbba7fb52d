"""What ways to spread attention over processes find, send, hold and take: on one layer, and on a model's texts.

A measurement is a flat dictionary: which processes, way, context and seed it is of, and its values. Bytes and steps are
counted on the line (`Counted`), what is held from the storage of tensors, times from a common beginning to the last
process's end.
"""

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from formery.evidence.accounting import account
from formery.evidence.checks import examples, model_named
from formery.evidence.held import most_held
from formery.evidence.side_by_side import side_by_side
from formery.generate import generate
from formery.methods.runtime.layers import Shape, plain
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.messages import Counted, Messages
from formery.parts.mixing import recast
from formery.parts.spread import Share, SpreadAttention

Measurement = dict[str, Any]
LARGE = 2**24  # bytes of the message by which a line's width is measured
READ = 512  # tokens of the state that is weighed


@dataclass(frozen=True)
class Way:
    """A way to spread attention: the function, the part that uses it, whether a process looks at all shares in turn."""

    run: Callable[[Share], Tensor]
    kind: type[SpreadAttention]
    at_all: bool


def seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """How long it takes in this process, all processes beginning together; after one round to warm up."""
    found = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found[1:]


def layer(ways: Mapping[str, Way], shape: Shape, context: int, seed: int, rounds: int) -> list[Measurement]:
    """One layer in one process: a measurement for each way; its times and those of all that is compared with it."""
    line = Messages()
    query, whole_keys, whole_values = shape.drawn(context, seed)
    wanted = plain(query, whole_keys, whole_values)
    keys, values = (
        one.transpose(1, 2)[:, line.rank :: line.size].contiguous().transpose(1, 2)
        for one in (whole_keys, whole_values)
    )
    share = Share(query, keys, values, context, line)
    alone = partial(scaled_dot_product_attention, query, whole_keys, whole_values, enable_gqa=True)
    found = []
    for name, way in ways.items():
        counted = Counted()
        made = way.run(replace(share, line=counted))
        found.append(
            {
                "way": name, "context": context, "seed": seed,
                "error": float((made - wanted).abs().max()),
                "bits": hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest(),
                "sent": counted.sent, "steps": counted.steps,
                "held": most_held(partial(way.run, share), [query, keys, values]),
                "seconds": seconds(partial(way.run, share), rounds),
                "own_seconds": seconds(share.own, rounds),
                "alone_seconds": seconds(alone if line.rank == 0 else int, rounds),
            }
        )  # fmt: skip
    return found


def links(rounds: int) -> tuple[float, float]:
    """Seconds for a step whose message is short, and for each byte more, when all pass one on at once."""
    line = Messages()
    after, before = (line.rank + 1) % line.size, (line.rank - 1) % line.size

    def taken(size: int) -> float:
        leaving = torch.zeros(size, dtype=torch.uint8)

        def passed_on() -> None:
            line.exchange([leaving], after, [torch.empty_like(leaving)], before)

        return statistics.median(seconds(passed_on, 3 * rounds))

    short, long = taken(8), taken(LARGE)
    return short, max(long - short, 0.0) / LARGE


def texts(kind: type[SpreadAttention] | None, seeds: Sequence[int], number: int, tokens: int) -> Measurement:
    """What the model `code` writes in this process with its attention of that kind, and the bytes of its state."""
    model = model_named("code")
    if kind is not None:
        model = rewritten(model, Attention, lambda part, _: recast(part, kind))
    prompts = [[one.prompt for one in examples("code", number, seed)] for seed in seeds]
    written = [[one.tokens for one in generate(model, some, max_new_tokens=tokens)] for some in prompts]
    return {"written": written, "bytes_a_token": account(model, READ).per_token}


@torch.inference_mode()
def here(
    ways: Mapping[str, Way], shape: Shape, contexts: Sequence[int], seeds: Sequence[int], rounds: int,
    number: int, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """All that is measured, in one process."""
    kinds = {name: way.kind for name, way in ways.items()}
    return {
        "layers": [one for at in contexts for seed in seeds for one in layer(ways, shape, at, seed, rounds)],
        "links": links(rounds),
        "texts": {name: texts(kind, seeds, number, tokens) for name, kind in (kinds | {"plain": None}).items()},
    }


def over_processes(
    size: int, ways: Mapping[str, Way], shape: Shape, contexts: Sequence[int], seeds: Sequence[int], rounds: int,
    number: int, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """Layers and texts with so many processes: what all sent together, and the worst that any of them saw.

    A layer's `model_seconds` are what its own look at the keys, its steps and its bytes should take by `links`.
    """
    ranks = side_by_side(size, here, dict(ways), shape, tuple(contexts), tuple(seeds), rounds, number, tokens)
    step, byte = (max(one["links"][which] for one in ranks) for which in (0, 1))
    layers = []
    for same in zip(*(one["layers"] for one in ranks), strict=True):
        worst = {name: max(one[name] for one in same) for name in ("error", "steps", "held")}
        times = {
            name: [max(lap) for lap in zip(*(one[name] for one in same), strict=True)]
            for name in ("seconds", "own_seconds", "alone_seconds")
        }
        one, sent = same[0], sum(one["sent"] for one in same)
        look = statistics.median(times["own_seconds"]) * (size if ways[one["way"]].at_all else 1)
        modelled = look + worst["steps"] * step + sent / size * byte
        which = {"size": size, "way": one["way"], "context": one["context"], "seed": one["seed"]}
        alike = float(len({one["bits"] for one in same}) == 1)
        layers.append({**which, **worst, "sent": sent, "alike": alike, **times, "model_seconds": modelled})
    plainly = ranks[0]["texts"]["plain"]
    written = []
    for name in ways:
        pairs = [
            pair
            for one in ranks
            for some in zip(one["texts"][name]["written"], plainly["written"], strict=True)
            for pair in zip(*some, strict=True)
        ]
        held = max(one["texts"][name]["bytes_a_token"] for one in ranks)
        same = sum(a == b for a, b in pairs) / len(pairs)
        written.append({"size": size, "way": name, "same": same, "bytes_a_token": held})
    return {"layers": layers, "texts": written, "step": step, "byte": byte, "plain": plainly["bytes_a_token"]}
