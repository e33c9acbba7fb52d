"""What the check of ByteTransformer measures: packed against padded, on lengths of real texts."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.data.batching import pad
from formery.data.works import work as work_named
from formery.data.write import WikiText
from formery.evidence.checks import model_named
from formery.evidence.interleaved import interleaved, speedups
from formery.models.compose import language_model
from formery.models.packed import encoded, packable
from formery.parts.native import using
from formery.parts.packed import PackedAttention, PackedContext
from formery.train.objective import Batch, Objective, next_token, translate
from formery.train.packed import packed_next_token, packed_translate
from formery.train.text import pairs_of

SIZE = 64  # texts of a batch
POOL, LEARNED, LONG = 10, 4, 3  # batches of captions read, of pairs learned from, and of prose
SORTED = 15  # batches whose texts are sorted for batches of like length
LONGEST = 256  # tokens of a sentence, which is cut there

Pair = tuple[list[int], list[int]]


class NestedAttention(PackedAttention):
    """A rival: PyTorch's own attention on nested tensors, of texts that see all of themselves."""

    def mix(
        self, query: Tensor, key: Tensor, value: Tensor, context: PackedContext
    ) -> Float[Tensor, "1 total head dim"]:
        packed = context.packed
        longest, shortest = packed.lengths[-1], packed.lengths[0]
        queries, keys, values = (
            torch.nested.nested_tensor_from_jagged(
                one[0], packed.offsets, min_seqlen=shortest, max_seqlen=longest
            ).transpose(1, 2)
            for one in (query, key, value)
        )
        found = nn.functional.scaled_dot_product_attention(queries, keys, values, scale=self.inner.scale)
        return found.transpose(1, 2).values()[None]


def captions(number: int, seed: int) -> list[Pair]:
    """So many pairs of Multi30k's test split, as the model `translate` sees them, drawn by the seed."""
    pairs = list(work_named("translate").texts("test"))
    return pairs_of(model_named("translate").tokenizer, random.Random(seed).sample(pairs, number))


def prose(number: int, seed: int) -> list[Pair]:
    """So many sentences of WikiText-2, cut to the tokens that the model takes, each beside itself."""
    lines = [line for text in WikiText().texts("test") for line in text.split("\n") if not line.startswith(" =")]
    found = [one.strip() for line in lines for one in line.split(" . ") if len(one.split()) > 2]
    tokenizer = model_named("translate").tokenizer
    rows = [row[:LONGEST] for row in tokenizer.encode_batch(random.Random(seed).sample(found, number))]
    return [(row, row) for row in rows]


def batches(pairs: Sequence[Pair]) -> list[Batch]:
    """The pairs in their order, padded batch by batch."""
    found = []
    for first in range(0, len(pairs), SIZE):
        sides = [pad(side, 0) for side in zip(*pairs[first : first + SIZE], strict=True)]
        names = ("source", "source_positions", "tokens", "positions")
        found.append(dict(zip(names, (one for side in sides for one in side), strict=True)))
    return found


def mixed_and_alike(pairs: Sequence[Pair], number: int, side: int) -> tuple[list[Batch], list[Batch]]:
    """So many batches of the first pairs as they come, and as many of all pairs sorted by a side's length, evenly."""
    ordered = batches(sorted(pairs, key=lambda pair: (len(pair[side]), len(pair[1 - side]))))
    spaced = [ordered[(2 * place + 1) * len(ordered) // (2 * number)] for place in range(number)]
    return batches(pairs[: number * SIZE]), spaced


def raced(
    entrants: Mapping[str, Callable[[], object]], mixed: list[Batch], alike: list[Batch], side: str, rounds: int
) -> dict[str, list[float]]:
    """Padding's time over each entrant's, round by round; how full padded batches are, and what that promises."""
    seconds, fill = interleaved(entrants, rounds), _fill(mixed, side)
    # Other texts, so that time counts by the token.
    more = _tokens(mixed, side) / _tokens(alike, side)
    seconds["like lengths"] = [more * one for one in seconds["like lengths"]]
    found = {name: speedups(own, seconds["padded"]) for name, own in seconds.items() if name != "padded"}
    against = {f"packed over {name}": speedups(seconds["packed"], seconds[name]) for name in found if name != "packed"}
    expected = {"1 / fill": [1 / fill], "of 1 / fill": [fill * one for one in found["packed"]]}
    return found | against | expected | {"fill": [fill], "fill, like lengths": [_fill(alike, side)]}


def reading(draw: Callable[[int, int], list[Pair]], number: int, seed: int, rounds: int) -> dict[str, list[float]]:
    """The encoder of the model `translate` reads texts, in PyTorch's operations and in the compiled kernels."""
    encoder = model_named("translate").encoder.eval()
    own, rival = packable(encoder), packable(encoder, NestedAttention)
    mixed, alike = mixed_and_alike(draw(SORTED * SIZE, seed), number, 0)

    def run(call: Callable[..., object], given: list[Batch], compiled: bool = False) -> Callable[[], None]:
        def all_batches() -> None:
            with torch.inference_mode(), using(compiled):
                for batch in given:
                    call(batch["source"], batch["source_positions"])

        return all_batches

    entrants = {
        "padded": run(encoder, mixed),
        "packed": run(partial(encoded, own), mixed),
        "like lengths": run(encoder, alike),
        "padded, compiled": run(encoder, mixed, True),
        "nested tensors": run(partial(encoded, rival), mixed),
    }
    return raced(entrants, mixed, alike, "source_positions", rounds)


def learning(alone: bool, seed: int, rounds: int) -> dict[str, list[float]]:
    """Losses and gradients of the model `translate`, or of a decoder alone, of random weights, on the German side."""
    mixed, alike = mixed_and_alike(captions(SORTED * SIZE, seed), LEARNED, 1)
    torch.manual_seed(seed)
    model = language_model(4000, 256, 3, 4, 4, 512, 256) if alone else model_named("translate").eval()
    own = packable(model)
    plain, packed = (next_token, packed_next_token) if alone else (translate(), packed_translate())

    def run(objective: Objective, whole: nn.Module, given: list[Batch]) -> Callable[[], None]:
        def all_batches() -> None:
            with torch.inference_mode(False), torch.enable_grad():
                for batch in given:
                    objective(whole, batch).backward()
                whole.zero_grad()

        return all_batches

    entrants = {
        "padded": run(plain, model, mixed),
        "packed": run(packed, own, mixed),
        "like lengths": run(plain, model, alike),
    }
    return raced(entrants, mixed, alike, "positions", rounds)


def equal(seed: int) -> dict[str, float]:
    """The largest difference from padding, as a share of the largest value: of an encoder's vectors, of gradients."""
    model = model_named("translate").eval()
    own, [batch] = packable(model), batches(captions(SIZE, seed))
    with torch.no_grad(), using(False):
        padded = model.encoder(batch["source"], batch["source_positions"])
        found, packed = encoded(own.encoder, batch["source"], batch["source_positions"])
    values = [(packed.pack(padded), found)]
    gradients = []
    with torch.inference_mode(False), torch.enable_grad():
        for objective, whole in ((translate(0.1), model), (packed_translate(0.1), own)):
            objective(whole, batch).backward()
            gradients.append([one.grad.clone() for one in model.parameters()])
            model.zero_grad()
    return {"outputs": _apart(values), "gradients": _apart(zip(*gradients, strict=True))}


def _apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    return max(float((own - other).abs().max() / other.abs().max()) for other, own in pairs)


def _fill(given: list[Batch], side: str) -> float:
    return _tokens(given, side) / sum(one[side].numel() for one in given)


def _tokens(given: list[Batch], side: str) -> int:
    return sum(int((one[side] >= 0).sum()) for one in given)
