"""Layers that condense chunks of a text: of each, or of the nodes that it is halved into, a few keys and values."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.parts.attention import Attention
from formery.parts.context import Context
from formery.parts.embed import Embedding
from formery.parts.grain import Grain
from formery.parts.part import Part
from formery.parts.steered import among, attends, merged, placed, projected, steerable, sublayers, through

Entries = list[tuple[Float[Tensor, "chunks slot group dim"], Float[Tensor, "chunks slot group dim"]]]


class Condenser(Part):
    """The lowest layers of a decoder, which read each node of a chunk by itself; `grain` says what is kept of it."""

    def __init__(self, layers: Sequence[Part], grain: Grain, chunk: int):
        super().__init__()
        self.layers, self.grain, self.chunk = nn.ModuleList(layers), grain, chunk
        self.kept = grain.kept(chunk)
        steerable(self.layers)

    @property
    def slots(self) -> int:
        """How many entries are kept of a chunk."""
        return sum(nodes * kept for (nodes, _), kept in zip(self.grain.levels, self.kept, strict=True))

    def forward(
        self, embedding: Embedding, chunks: Int[Tensor, "chunks time"]
    ) -> tuple[Entries, Float[Tensor, "chunks node width"]]:
        """For each layer keys, not turned, and values of all nodes; and the nodes' vectors: level by level.

        A node's vector is that of its last token after the first self-attention.
        """
        levels = [self._nodes(embedding, chunks.reshape(len(chunks) * n, -1), ratio) for n, ratio in self.grain.levels]

        def by_chunk(parts: Sequence[Tensor]) -> Tensor:
            return torch.cat([one.reshape(len(chunks), -1, *one.shape[2:]) for one in parts], 1)

        entries = []
        for layer in range(len(self.layers)):
            keys, values = (by_chunk([pairs[layer][i] for pairs, _ in levels]) for i in (0, 1))
            entries.append((keys, values))
        return entries, by_chunk([vectors[:, None] for _, vectors in levels])

    def _nodes(
        self, embedding: Embedding, tokens: Int[Tensor, "nodes time"], ratio: int
    ) -> tuple[Entries, Float[Tensor, "nodes width"]]:
        found: Entries = []
        at = torch.arange(tokens.shape[1], device=tokens.device)[None]
        context = Context(at)

        def mix(attention: Attention, hidden: Tensor) -> Tensor:
            query, key, value = projected(attention, hidden)
            found.append((key[:, ratio - 1 :: ratio], value[:, ratio - 1 :: ratio]))
            query, key = placed(attention, query, at), placed(attention, key, at)
            return merged(attention, among(attention, query, key, value))

        hidden, vectors = embedding(tokens, context), None
        for layer in self.layers:
            for part in sublayers(layer):
                hidden = through(part, hidden, context, mix)
                if vectors is None and attends(part):
                    vectors = hidden[:, -1].detach()
        assert vectors is not None
        return found, vectors

    @torch.no_grad()
    def searched(
        self, queries: Float[Tensor, "batch time width"], vectors: Float[Tensor, "batch chunk node width"]
    ) -> Bool[Tensor, "batch time slots"]:
        """Which entries of all chunks each query reads, by the cosine of its vector and the nodes'."""
        unit = nn.functional.normalize
        likeness = torch.einsum("btw,bcnw->btcn", unit(queries, dim=-1), unit(vectors, dim=-1))
        times = [kept for (nodes, _), kept in zip(self.grain.levels, self.kept, strict=True) for _ in range(nodes)]
        repeats = torch.tensor(times, device=queries.device)
        return self.grain.preserved(likeness).repeat_interleave(repeats, -1).flatten(-2)
