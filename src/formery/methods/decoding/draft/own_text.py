"""What a frozen model writes itself, with its last vectors at every token: what a drafter for it learns from.

A drafter has to guess what its target would write, not what people wrote, so it learns from the target's own greedy
texts. They are written once, in chunks that survive an interruption, and kept in the cache under a digest of the
model's weights, the sources and the length.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor, nn

from formery.data.batching import pad
from formery.data.sources import cache
from formery.errors import FormeryError
from formery.generate import generate
from formery.models import Model
from formery.train import checkpoint
from formery.train.objective import Batch

CHUNK = 64  # texts that are written together


@dataclass(frozen=True)
class OwnText:
    """Texts: what the decoder was given, then what it wrote; padding has position -1.

    starts: the place of the first written token of each. hidden: the model's last normed vectors, in 16 bits. sources:
    what an encoder read, empty where there is none.
    """

    tokens: Int[Tensor, "text time"]
    positions: Int[Tensor, "text time"]
    starts: Int[Tensor, "text"]
    hidden: Float[Tensor, "text time width"]
    sources: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def lengths(self) -> list[int]:
        """How many tokens each text has."""
        found: list[int] = (self.positions >= 0).sum(1).tolist()
        return found

    def split(self, first: int) -> tuple["OwnText", "OwnText"]:
        """The first texts, and the others."""

        def part(at: slice) -> OwnText:
            return OwnText(self.tokens[at], self.positions[at], self.starts[at], self.hidden[at], self.sources[at])

        return part(slice(None, first)), part(slice(first, None))


class OwnBatches:
    """Batches of such texts, endless, each epoch in another order; a batch is a function of its number alone.

    tokens, positions, hidden: as in `OwnText`. written: True at tokens that the target wrote. source,
    source_positions: what the encoder read, where there is one. step: the number of the batch.
    """

    def __init__(self, text: OwnText, batch_size: int, seed: int = 0) -> None:
        if not 1 <= batch_size <= len(text):
            raise FormeryError(f"batches of {batch_size} cannot be made of {len(text)} texts.")
        self.text, self.batch_size, self.seed = text, batch_size, seed
        self.batches = len(text) // batch_size

    def batch(self, step: int) -> Batch:
        epoch, place = divmod(step, self.batches)
        order = numpy.random.default_rng((self.seed, epoch)).permutation(len(self.text))
        rows = torch.from_numpy(order[place * self.batch_size :][: self.batch_size])
        text = self.text
        longest = max(text.lengths[row] for row in rows.tolist())
        found = {
            "tokens": text.tokens[rows, :longest].long(),
            "positions": text.positions[rows, :longest].long(),
            "hidden": text.hidden[rows, :longest].float(),
            "step": torch.tensor(step),
        }
        at = torch.arange(longest)
        found["written"] = (at >= text.starts[rows][:, None]) & (found["positions"] >= 0)
        if text.sources:
            sources = pad([text.sources[row] for row in rows.tolist()], 0)
            found["source"], found["source_positions"] = sources
        return found


def contexts(ids: Int[Tensor, "total"], length: int, count: int, seed: int = 0) -> list[list[int]]:
    """Pieces of that many tokens, from places of the text that a seed draws."""
    if len(ids) < length:
        raise FormeryError(f"the text has {len(ids)} tokens, too few for a piece of {length}.")
    chance = random.Random(seed)
    starts = [chance.randrange(len(ids) - length + 1) for _ in range(count)]
    return [ids[start : start + length].tolist() for start in starts]


def own_text(model: Model, sources: Sequence[Sequence[int]], written: int, folder: Path | None = None) -> OwnText:
    """What the model writes greedily, up to `written` tokens for each source, and its vectors.

    folder: keeps it, by default in the cache.
    """
    folder = folder or cache() / "own-text" / digest_of(model)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [[list(map(int, one)) for one in sources[n : n + CHUNK]] for n in range(0, len(sources), CHUNK)]
    parts = []
    for chunk in track(chunks, "the target's own text", transient=True):
        path = folder / f"{hashlib.sha256(f'{written} {chunk}'.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            checkpoint.write(path, _written(model, chunk, written), {})
        parts.append(checkpoint.read(path)[0])
    longest = max(part["tokens"].shape[1] for part in parts)

    def together(name: str, fill: int) -> Tensor:
        return torch.cat([nn.functional.pad(p[name], (0, longest - p[name].shape[1]), value=fill) for p in parts])

    hidden = torch.cat([nn.functional.pad(p["hidden"], (0, 0, 0, longest - p["hidden"].shape[1])) for p in parts])
    starts = torch.cat([part["starts"] for part in parts])
    apart = [list(map(int, one)) for one in sources] if model.reads_apart else []
    return OwnText(together("tokens", 0), together("positions", -1), starts, hidden, apart)


@torch.inference_mode()
def _written(model: Model, sources: Sequence[Sequence[int]], written: int) -> dict[str, Tensor]:
    outputs = generate(model, [list(source) for source in sources], max_new_tokens=written)
    state, prefixes = model.begin(sources, written)
    end = None if model.tokenizer is None else model.tokenizer.eos
    ends = [[end] if one.stop == "end" and end is not None else [] for one in outputs]
    rows = [[*prefix, *one.tokens, *last] for prefix, one, last in zip(prefixes, outputs, ends, strict=True)]
    tokens, positions = pad(rows, 0)
    limit = model.max_length
    hidden = model.read(tokens[:, :limit], state, positions[:, :limit])
    return {
        "tokens": tokens[:, :limit].short() if model.vocabulary < 2**15 else tokens[:, :limit].int(),
        "positions": positions[:, :limit].short(),
        "starts": torch.tensor([len(prefix) for prefix in prefixes]),
        "hidden": hidden.half(),
    }


def digest_of(model: nn.Module) -> str:
    """A digest of all weights."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
