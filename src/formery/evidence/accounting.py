"""What a decode state takes, measured from the storage that it holds: in all, for each layer, for each token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from formery.generate.prompts import Prompt, encoded
from formery.generate.run import Generation
from formery.models import Model
from formery.parts import State

CHUNK = 256  # tokens that are read at once


@dataclass(frozen=True)
class Account:
    """The bytes of a state that has read `length` tokens in each of `batch` rows.

    total: of all storage. layers: of each part that remembers, in the order of the layers, without what an earlier
    one holds already; the rest of `total` is book-keeping that all share.
    """

    batch: int
    length: int
    total: int
    layers: tuple[int, ...]

    @property
    def per_token(self) -> float:
        """Bytes for each token read."""
        return self.total / (self.batch * self.length)


def layer_bytes(state: State) -> tuple[int, ...]:
    """The bytes of each part that remembers, in order; a storage that several hold is counted at the first."""
    seen: set[int] = set()
    found = []
    for layer in state.layers.values():
        storages = {one._cdata: one.nbytes() for one in map(Tensor.untyped_storage, layer.tensors())}
        found.append(sum(size for key, size in storages.items() if key not in seen))
        seen |= storages.keys()
    return tuple(found)


@torch.inference_mode()
def account(model: Model, length: int, batch: int = 1, seed: int = 0) -> Account:
    """Has a model read random tokens and measures the state that remembers them."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocabulary, (batch, length), generator=draw)
    state, _ = model.begin([row[:1] for row in tokens], length)
    for piece in tokens.split(CHUNK, 1):
        model.read(piece.to(next(model.parameters()).device), state)
    return Account(batch, length, state.nbytes, layer_bytes(state))


def per_layer_and_token(model: Model, prompts: Sequence[Prompt], outputs: Sequence[Generation], batch: int) -> float:
    """Bytes of decode states, as measured while texts were written, for each layer and each token of their longest row.

    The largest of all batches. Layers are the parts of the model that remember; what an encoder read counts as tokens.
    """
    sources = [encoded(model, prompt, number) for number, prompt in enumerate(prompts, 1)]
    layers = len(model.begin(sources[:1], 1)[0].layers)
    found = []
    for first in range(0, len(outputs), batch):
        rows = list(zip(sources, outputs, strict=True))[first : first + batch]
        longest = max(
            (read.shape[-1] if isinstance(read, Tensor) else len(read)) + len(one.tokens) for read, one in rows
        )
        found.append(max(one.state_bytes for _, one in rows) / (len(rows) * longest * layers))
    return max(found)
