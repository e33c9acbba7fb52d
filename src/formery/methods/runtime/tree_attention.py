"""Tree Attention: keys and values of one text on several devices, whose partial softmaxes are merged along a tree.

Shyam, Pilault, Shepperd, Anthony and Millidge, "Tree Attention: Topology-aware Decoding for Long-Context Attention on
GPU clusters", 2024. Attention is the gradient of an energy with respect to a source, taken at `source = 0`:

    energy(source) = log Σ_a exp(query · key_a + source · value_a)

and log-sum-exp is associative. So each process looks at its own keys only, and tells the others no more than its
`maximum`, `denominator` and `numerator` (`parts/kernels/partial.py`); after `log2(processes)` exchanges, each with the
process whose rank differs in one bit, all of them hold the same whole answer. A message is as long for a million keys as
for ten. The baseline (`ring.py`) passes keys and values themselves around.

`spread(model)` makes any model of ours with self-attention decode so, with every method of `generate` whose choices
follow from the tokens alone. Under `torchrun --nproc-per-node=4 write.py` this writes what one process writes, each
process with a quarter of the cache:

    world()
    texts = generate(spread(load("code")), prompts)

The processes must compute the same bits from the same numbers, as those of machines of one kind do. Where drafts are as
long as a clock says (`adapt`), they would differ from process to process: leave that off.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial as given
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.accounting import account
from formery.evidence.checks import criterion, examples, model_named, untestable
from formery.evidence.held import most_held
from formery.evidence.measured import Budget, Measured, Row
from formery.evidence.measured import spread as spread_of
from formery.evidence.paper import Paper, publish
from formery.generate import generate
from formery.methods.runtime.ring import RingAttention, around
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager
from formery.parts.kernels.partial import Partial, merge, partial
from formery.parts.messages import Counted, Messages
from formery.parts.mixing import recast
from formery.parts.spread import Share, SpreadAttention
from formery.train.side_by_side import side_by_side

Whole = TypeVar("Whole", bound=nn.Module)


def energy(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    source: Float[Tensor, "batch head time value"],
) -> Float[Tensor, "batch head time"]:
    """`log Σ exp(query · key / sqrt(key width) + source · value)`: its gradient at `source = 0` is attention."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return partial(query, key, value, bias=source @ value.transpose(-1, -2)).log_sum_exp


def all_merged(own: Partial, line: Messages) -> Partial:
    """The merge of what all processes have, the same bits in each, in `log2(processes)` exchanges.

    Both sides of an exchange merge the lower ranks' part with the higher ranks', so they get the same. Processes beyond
    a power of two hand their part to another first and are told the result at the end: two steps more.
    """
    rank, size = line.rank, line.size
    whole = 1 << (size.bit_length() - 1)
    packed = own.packed()
    if rank >= whole:
        line.send([packed], rank - whole)
        line.receive([packed], rank - whole)
        return Partial.unpacked(packed)
    if rank + whole < size:
        other = torch.empty_like(packed)
        line.receive([other], rank + whole)
        packed = merge(Partial.unpacked(packed), Partial.unpacked(other)).packed()
    for bit in range(whole.bit_length() - 1):
        other = torch.empty_like(packed)
        line.exchange([packed], rank ^ 1 << bit, [other], rank ^ 1 << bit)
        lower, higher = (other, packed) if rank >> bit & 1 else (packed, other)
        packed = merge(Partial.unpacked(lower), Partial.unpacked(higher)).packed()
    if rank + whole < size:
        line.send([packed], rank + whole)
    return Partial.unpacked(packed)


def along_tree(share: Share) -> Float[Tensor, "batch head time value"]:
    """Attention to the keys of all processes, the same bits in each."""
    return all_merged(share.own(), share.line).value


class TreeAttention(SpreadAttention):
    """Self-attention whose partial softmaxes are merged along a tree."""

    def together(self, share: Share) -> Float[Tensor, "batch head time dim"]:
        return along_tree(share)


def spread(model: Whole, kind: type[SpreadAttention] = TreeAttention) -> Whole:
    """The model with the same weights, whose decode states are spread over the processes that have met (or `through`).

    All processes of the group call the same with the same prompts. What has no decode state runs as before, in each.
    Raises FormeryError for a model without self-attention, or with one that attends in a way of its own.
    """
    return rewritten(model, Attention, lambda part, _: recast(part, kind))


SIZES = (2, 4, 8)
CONTEXTS = (1024, 8192, 65536)
HEADS, GROUPS, DIM = 8, 2, 64
WAYS: dict[str, Callable[[Share], Tensor]] = {"tree": along_tree, "ring": around}
BYTES = 4  # of a number
LARGE = 2**22  # bytes of the message by which a line's width is measured


def told(size: int, context: int) -> dict[str, tuple[int, int]]:
    """By way the bytes that all processes send in one step of decoding, and the steps, as the formulae say."""
    rounds = int(math.log2(size))
    answer, memory = HEADS * (DIM + 2) * BYTES, context * 2 * GROUPS * DIM * BYTES
    return {"tree": (size * rounds * answer, rounds), "ring": ((size - 1) * memory, size - 1)}


def drawn(context: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values of one layer, as a state holds them; the same in all processes."""
    draw = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(1, length, heads, DIM, generator=draw)
        for length, heads in ((1, HEADS), (context, GROUPS), (context, GROUPS))
    )
    return query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def plain(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention by the formula."""
    return eager(query, keys, values, Visibility(), None, DIM**-0.5, None, 0.0)[0]


def seconds(run: Callable[[], Any]) -> float:
    """How long it takes when all processes begin it together."""
    dist.barrier()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def links(line: Messages, rounds: int) -> tuple[float, float]:
    """Seconds for a message of no length, and for each byte, when all pass one on at once."""
    after, before = (line.rank + 1) % line.size, (line.rank - 1) % line.size

    def taken(size: int) -> float:
        leaving, arriving = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        return min(seconds(lambda: line.exchange([leaving], after, [arriving], before)) for _ in range(rounds + 3))

    short, long = taken(8), taken(LARGE)
    return short, max(long - short, 0.0) / LARGE


@torch.inference_mode()
def layer(context: int, seed: int, rounds: int) -> dict[str, Any]:
    """One layer's attention in one process: what it found, sent, held, and how long it took."""
    line = Messages()
    query, keys, values = drawn(context, seed)
    wanted = plain(query.double(), keys.double(), values.double())
    # Only now are the shares cut out, so that a process holds no more than its own.
    own, others = (one.transpose(1, 2)[:, line.rank :: line.size].contiguous().transpose(1, 2) for one in (keys, values))
    share = Share(query, own, others, context, line)
    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        counted = Counted()
        made = way(Share(query, own, others, context, counted))
        found[f"{name} error"] = float((made - wanted).abs().max())
        found[f"{name} bits"] = hashlib.sha256(made.contiguous().numpy().tobytes()).hexdigest()
        found[f"{name} sent"], found[f"{name} steps"] = counted.sent, counted.steps
        found[f"{name} held"] = most_held(given(way, share), [query, own, others])
    for name, run in {**{name: given(way, share) for name, way in WAYS.items()}, "own": share.own}.items():
        found[f"{name} seconds"] = [seconds(run) for _ in range(rounds)]
    alone = given(nn.functional.scaled_dot_product_attention, query, keys, values, enable_gqa=True)
    found["one process seconds"] = [seconds(alone if line.rank == 0 else int) for _ in range(rounds)]
    return found


def trial(seeds: Sequence[int], number: int, tokens: int, rounds: int) -> dict[str, Any]:
    """What one process sees of all that is measured with so many processes."""
    found: dict[str, Any] = {
        f"{context} {seed}": layer(context, seed, rounds) for context in CONTEXTS for seed in seeds
    }
    found["links"] = links(Messages(), rounds)
    model = model_named("code")
    for name, one in (("tree", spread(model)), ("ring", spread(model, RingAttention)), ("plain", model)):
        found[f"{name} bytes"] = account(one, 512).per_token
        texts = (generate(one, [e.prompt for e in examples("code", number, s)], max_new_tokens=tokens) for s in seeds)
        found[f"{name} tokens"] = [[text.tokens for text in some] for some in texts]
    return found
