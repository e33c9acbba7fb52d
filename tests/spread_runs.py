"""What each of several processes does in the tests of attention that is spread over them; they say what they saw."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.generate import generate
from formery.methods.runtime.ring import RingAttention, around
from formery.methods.runtime.tree_attention import TreeAttention, along_tree, spread
from formery.models import Decoder
from formery.models.compose import language_model, translator
from formery.parts import (
    Alibi,
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    PreNorm,
    RMSNorm,
    TiedOutput,
    causal,
    prefix,
    window,
)
from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager
from formery.parts.messages import Counted, Messages, through
from formery.parts.spread import Share, SpreadAttention

PROMPTS = [[5, 9, 3, 7, 7, 7, 7, 2], [11, 4], [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2], [30]]


def lively(model: Any) -> Any:
    """A random model in float64 whose choices are no near ties."""
    draw = torch.Generator().manual_seed(0)  # of its own: threads would disturb each other
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.4, generator=draw)
    return model.eval()


def biased() -> Decoder:
    """With biased, capped and masked scores, which the share must cut alike."""
    attention = [
        Attention(16, 4, 1, position=Alibi(), soft_cap=3.0),
        Attention(16, 4, 2, mask=causal & (window(4) | prefix(1)), scale=0.3, query_norm=RMSNorm(4), bias=True),
    ]
    layers = [Layer([PreNorm(RMSNorm(16), one), PreNorm(RMSNorm(16), GatedMLP(16, 24))]) for one in attention]
    embedding = Embedding(31, 16)
    return lively(Decoder(embedding, layers, RMSNorm(16), TiedOutput(embedding)))


def models() -> dict[str, Any]:
    return {
        "rotary": lively(language_model(31, 16, 2, 4, 2, 24, 96)),
        "biased": biased(),
        "translator": lively(translator(31, 16, 1, 2, 4, 24, 96, start_token=1)),
    }


def texts(name: str, methods: tuple[str, ...], kind: type[SpreadAttention] = TreeAttention) -> dict[str, Any]:
    """By method the tokens that a model writes in one process, and spread; and how many drafted ones were accepted."""
    model = models()[name]
    found = {}
    for method in methods:
        alone, own = (generate(one, PROMPTS, method, max_new_tokens=12) for one in (model, spread(model, kind)))
        written = [[text.tokens for text in some] for some in (alone, own)]
        found[method] = {"alone": written[0], "spread": written[1], "accepted": sum(text.accepted for text in own)}
    return found


def sight(batch: int, heads: int, time: int, slots: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    allowed = torch.rand(batch, heads, time, slots, generator=draw) < 0.5
    allowed[0, 0] = False  # sees nothing at all
    return allowed, torch.randn(1, heads, time, slots, generator=draw)


def layers(line: Callable[[], Counted]) -> list[dict[str, Any]]:
    """Attention by tree and by ring to random keys: how far from plain attention, and what was counted."""
    found = []
    for slots, masked in ((0, False), (1, False), (2, True), (13, True), (64, False)):
        draw = torch.Generator().manual_seed(slots)
        query = torch.randn(2, 4, 3, 8, generator=draw)
        key, value = (torch.randn(2, slots, 2, 8, generator=draw) for _ in range(2))
        allowed, bias = sight(2, 4, 3, slots, draw) if masked else (None, None)
        wide = (query.double(), key.transpose(1, 2).double(), value.transpose(1, 2).double())
        wanted = eager(*wide, Visibility(allowed), bias, 8**-0.5, 2.0, 0.0)[0].nan_to_num(0.0)
        for name, way in (("tree", along_tree), ("ring", around)):
            counted = line()
            own = [one[:, counted.rank :: counted.size].contiguous().transpose(1, 2) for one in (key, value)]
            made = way(Share(query, *own, slots, counted, allowed, bias, soft_cap=2.0))
            error = float((made - wanted).abs().max())
            numbers = {"error": error, "answer": made, "sent": counted.sent, "steps": counted.steps}
            found.append({"way": name, "slots": slots, **numbers})
    return found


def states() -> dict[str, Any]:
    """Logits of a state that is cut back, thinned out, reordered and grown, spread and not."""
    model = models()["rotary"]
    found: dict[str, Any] = {}
    for name, one in (("plain", model), ("spread", spread(model))):
        with torch.inference_mode():
            state = one.start(3, 4)
            said = [one.step(torch.arange(24).view(3, 8), state)]
            state.rollback([8, 3, 5])
            said.append(one.step(torch.arange(15).view(3, 5), state))
            state.keep(torch.rand(3, state.slots.filled, generator=torch.Generator().manual_seed(3)) < 0.6)
            said.append(one.step(torch.tensor([[4], [5], [6]]), state))
            state.select([2, 0, 0])
            said.append(one.step(torch.tensor([[4, 1, 9], [5, 2, 9], [6, 3, 9]]), state))
            state.settle([[0, 2], [], [1]])
            said.append(one.step(torch.tensor([[7, 8], [8, 9], [9, 1]]), state))
        found[name] = said
        found[f"{name} bytes"] = account(one, 64).layers
    return found


def group() -> dict[str, Any]:
    """A line through a group that is named, and one through a group that this process is no part of."""
    rank = dist.get_rank()
    both, first = dist.new_group([0, 1]), dist.new_group([0])
    with through(Messages(both)):
        found = texts("rotary", ("greedy",))
    if rank == 0:
        return {"texts": found, "said": ""}
    try:
        Messages(first)
    except FormeryError as error:
        return {"texts": found, "said": str(error)}
    raise AssertionError


def real() -> dict[str, Any]:
    """All that is seen with processes that have met."""
    return {
        "layers": layers(Counted),
        "tree": texts("rotary", ("greedy", "parallel-jacobi-decoding")),
        "ring": texts("biased", ("greedy",), RingAttention),
        "states": states(),
        "group": group(),
    }


class Thread(Messages):
    """A line between threads that stand for processes. group: rank, size, and a queue for each pair."""

    def __init__(self, group: Any):
        self.rank, self.size, self.queues = group

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        self.queues[self.rank, to].put([one.clone() for one in tensors])

    def receive(self, into: Sequence[Tensor], source: int) -> None:
        arrived = self.queues[source, self.rank].get(timeout=60)
        for one, other in zip(into, arrived, strict=True):
            one.copy_(other)

    def exchange(self, tensors: Sequence[Tensor], to: int, into: Sequence[Tensor], source: int) -> None:
        assert all(one.is_contiguous() for one in (*tensors, *into))
        if tensors:
            Thread.send(self, tensors, to)
        if into:
            Thread.receive(self, into, source)


class CountedThread(Counted, Thread):
    """The same, counted."""


def in_threads(size: int, run: Callable[[Callable[[], CountedThread]], Any]) -> list[Any]:
    """What `run` gives in each of `size` threads, told how to make a line to the others."""
    queues = {(a, b): Queue() for a in range(size) for b in range(size)}

    def one(rank: int) -> Any:
        def line() -> CountedThread:
            return CountedThread((rank, size, queues))  # type: ignore[arg-type]

        with through(line()):
            return run(line)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
