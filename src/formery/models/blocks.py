"""A model in two levels: a decoder over blocks of tokens, and one over the tokens inside of each block.

tokens of block b ─► embedder ─► block decoder (sees blocks ≤ b) ─► context of block b+1
context of block b+1 ─► prefix ─► token decoder (sees the prefix and its own block) ─► tokens of block b+1
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.parts import (
    Attention,
    Context,
    Embedding,
    GatedMLP,
    Layer,
    Linear,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    State,
    TiedOutput,
)
from formery.parts.levels import Levels, begun, passed
from formery.parts.native import using
from formery.parts.native.stack import out
from formery.parts.part import normal


class Concatenated(Part):
    """One vector of a block: the embeddings of its `length` tokens, side by side."""

    def __init__(self, embedding: Embedding, length: int):
        super().__init__()
        self.embedding, self.length = embedding, length
        self.width = length * embedding.width

    def forward(self, tokens: Int[Tensor, "batch block*length"]) -> Float[Tensor, "batch block width"]:
        return self.embedding.looked_up(tokens).view(len(tokens), -1, self.width)


class BlockTransformer(Decoder):
    """Predicts each token from its own block so far and from one vector that stands for all blocks before.

    embedder: makes a vector of each block. block_layers, block_norm: the block decoder. expand: from its vectors to
    those of a prefix. embedding, layers, norm, output: of the token decoder. The first block's context is learned.
    """

    def __init__(
        self,
        embedder: Concatenated,
        block_layers: Sequence[Part],
        block_norm: Part | None,
        expand: Linear,
        embedding: Embedding,
        layers: Sequence[Part],
        norm: Part | None,
        output: Part,
        max_length: int | None = None,
    ):
        super().__init__(embedding, layers, norm, output, max_length)
        self.embedder, self.block_layers, self.block_norm = embedder, nn.ModuleList(block_layers), block_norm
        self.expand, self.length = expand, embedder.length
        self.prefix, rest = divmod(expand.outputs, embedding.width)
        if rest or self.prefix < 1 or expand.inputs != embedder.width or self.length < 1:
            raise ValueError(
                "the map to the prefix must lead from blocks' vectors to a whole number of tokens' vectors"
            )
        if embedding.position is not None or embedder.embedding.position is not None:
            raise ValueError("embeddings of a model of blocks know no positions: its attention does")
        self.opening = normal(embedder.width, deviation=1.0)

    def context(self, *_: Any, **__: Any) -> Context:
        """Raises FormeryError: the layers do not run over one sequence."""
        raise FormeryError("this model works in two levels, so no method can run some of its layers alone.")

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        positions: Int[Tensor, "batch time"] | None = None,
        segments: Int[Tensor, "batch time"] | None = None,
        memory: Float[Tensor, "batch source width"] | None = None,
        memory_positions: Int[Tensor, "batch source"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        if segments is not None or memory is not None:
            raise FormeryError("a model of blocks takes one text in each row, and nothing else to read.")
        batch, time = tokens.shape
        if positions is not None:
            _counts(positions, [0] * batch)
        self._check_length(time)
        whole = time // self.length
        with using(self.compiled):
            contexts = self.opening.expand(batch, 1, -1)
            if whole:
                entered = self.embedder(tokens[:, : whole * self.length])
                contexts = torch.cat((contexts, passed(self.block_layers, self.block_norm, entered)), 1)
            blocks = nn.functional.pad(tokens, (0, (whole + 1) * self.length - time))
            return self._decoded(contexts, blocks, None)[:, 1 : time + 1]

    def _decoded(
        self,
        contexts: Float[Tensor, "batch block wide"],
        tokens: Int[Tensor, "batch block*length"],
        state: State | None,
    ) -> Float[Tensor, "batch block*length width"]:
        """The token decoder over whole blocks, each by itself: the vectors that their tokens are predicted from.

        state: an empty one, with a row for each block.
        """
        batch, blocks, _ = contexts.shape
        prefix = self._prefix(contexts.flatten(0, 1))
        body = self._embedded(tokens.reshape(batch * blocks, self.length)[:, :-1])
        hidden = passed(self.layers, self.norm, torch.cat((prefix, body), 1), state)
        return hidden[:, self.prefix - 1 :].reshape(batch, blocks * self.length, -1)

    def _prefix(self, contexts: Float[Tensor, "row wide"]) -> Float[Tensor, "row prefix width"]:
        return self.expand(contexts).view(len(contexts), self.prefix, -1)

    def _embedded(self, tokens: Int[Tensor, "row time"]) -> Float[Tensor, "row time width"]:
        embedded: Tensor = self.embedding(tokens, Context(tokens))
        return embedded

    def start(self, batch: int, capacity: int) -> State:
        state = State(batch, capacity, self.opening.device)
        room = 2 * self.prefix + self.length - 2  # a row is padded where the prefix of another's next block is read
        wide, width, blocks = self.embedder.width, self.embedding.width, capacity // self.length
        with torch.no_grad(), using(self.compiled):
            outer = begun(self.block_layers, self.block_norm, wide, batch, blocks, self.opening)
            inner = begun(self.layers, self.norm, width, batch, room, self.opening)
            contexts = self.opening.repeat(batch, 1)
            passed(self.layers, self.norm, self._prefix(contexts), inner)
            state.out = out(self.output, width)
        state.layers[self, 0] = Levels(state.slots, outer, inner, contexts, self.length, self.prefix)
        return state

    def read(
        self,
        tokens: Int[Tensor, "batch time"],
        state: State,
        positions: Int[Tensor, "batch time"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
    ) -> Float[Tensor, "batch time width"]:
        if visible is not None:
            raise FormeryError("a model of blocks reads drafts as chains, not as trees.")
        levels, (batch, time) = state.layers[self, 0], tokens.shape
        assert isinstance(levels, Levels)
        counts = [time] * batch if positions is None else _counts(positions, state.lengths)
        self._check_length(max(length + count for length, count in zip(state.lengths, counts, strict=True)))
        state.reserve(time)
        state.slots.extend(positions, time)
        levels.take(tokens, counts)
        known = levels.outer.lengths
        news = [length // self.length - one for length, one in zip(levels.lengths, known, strict=True)]
        with using(self.compiled):
            if any(levels.stale) or (any(news) and time > 1):
                return self._anew(levels, news, time)
            if any(news):
                return self._ending(levels, tokens, counts, news)
            return passed(self.layers, self.norm, self._embedded(tokens), levels.inner, counts)

    def _anew(self, levels: Levels, news: Sequence[int], time: int) -> Float[Tensor, "batch time width"]:
        """A pass that touches several blocks: each is decoded by itself, and the last one's state is kept.

        news: how many blocks of each row the block decoder has still to read.
        """
        batch, blocks = len(news), max(news) + 1
        begin = torch.tensor(levels.outer.lengths, device=levels.contexts.device)[:, None] * self.length
        contexts, tokens = levels.contexts[:, None], levels.read(begin, blocks * self.length)
        if blocks > 1:
            contexts = torch.cat((contexts, self._read_blocks(levels, tokens[:, : -self.length], news)), 1)
        room, width = levels.inner.slots.capacity, self.embedding.width
        inner = begun(self.layers, self.norm, width, batch * blocks, room, levels.inner)
        hidden = self._decoded(contexts, tokens, inner)
        inner.select([row * blocks + new for row, new in enumerate(news)])
        places = torch.tensor(levels.before, device=begin.device)[:, None] - begin
        places = places + torch.arange(1, time + 1, device=begin.device)
        levels.renew(inner, contexts[range(batch), list(news)])
        return hidden.take_along_dim(places.clamp(max=hidden.shape[1] - 1)[..., None], 1)

    def _ending(
        self, levels: Levels, tokens: Int[Tensor, "batch 1"], counts: Sequence[int], news: Sequence[int]
    ) -> Float[Tensor, "batch 1 width"]:
        """A pass of one token that ends the blocks of some rows; these read the prefix of their next block instead."""
        ended = torch.tensor(list(news), device=tokens.device).bool()[:, None]
        begin = torch.tensor(levels.outer.lengths, device=tokens.device)[:, None] * self.length
        contexts = self._read_blocks(levels, levels.read(begin, self.length), news)[:, 0]
        levels.contexts = torch.where(ended, contexts, levels.contexts)
        entered = torch.where(ended[..., None], self._prefix(levels.contexts), self._embedded(tokens))
        levels.inner.rollback([0 if new else one for new, one in zip(news, levels.inner.lengths, strict=True)])
        read = [self.prefix if new else count for new, count in zip(news, counts, strict=True)]
        hidden = passed(self.layers, self.norm, entered, levels.inner, read)
        return torch.where(ended[..., None], hidden[:, -1:], hidden[:, :1])

    def _read_blocks(
        self, levels: Levels, tokens: Int[Tensor, "batch block*length"], news: Sequence[int]
    ) -> Float[Tensor, "batch block wide"]:
        """The block decoder over the next blocks, of which row i has news[i]."""
        return passed(self.block_layers, self.block_norm, self.embedder(tokens), levels.outer, news)


def _counts(positions: Int[Tensor, "batch time"], lengths: Sequence[int]) -> list[int]:
    """How many tokens each row has; FormeryError where they do not go on from its length, padding behind them."""
    counts = (positions >= 0).sum(1, keepdim=True)
    places = torch.arange(positions.shape[1], device=positions.device)
    expected = (torch.tensor(list(lengths), device=positions.device)[:, None] + places).masked_fill(
        places >= counts, -1
    )
    if not torch.equal(positions, expected):
        raise FormeryError("a model of blocks reads each row's tokens in their order, with padding behind them only.")
    return [int(count) for count in counts]


def block_model(
    vocabulary: int,
    width: int,
    block_layers: int,
    token_layers: int,
    heads: int,
    hidden: int,
    max_length: int,
    length: int,
    prefix: int = 2,
) -> BlockTransformer:
    """Blocks of `length` tokens, both decoders in the manner of `language_model`, the output tied to a table."""
    position, embedding = Rotary(), Embedding(vocabulary, width)

    def stack(layers: int) -> list[Layer]:
        inner = [(Attention(width, heads, position=position), GatedMLP(width, hidden)) for _ in range(layers)]
        return [Layer([PreNorm(RMSNorm(width), one) for one in both]) for both in inner]

    return BlockTransformer(
        Concatenated(Embedding(vocabulary, width // length), length),
        stack(block_layers),
        RMSNorm(width),
        Linear(width, prefix * width),
        embedding,
        stack(token_layers),
        RMSNorm(width),
        TiedOutput(embedding),
        max_length,
    )
