"""What a decode state takes, measured from the storage that it holds: in all, for each layer, for each token."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
