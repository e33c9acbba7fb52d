"""SharedLLM against its definition: trees that are gone down node by node, read by cross-attention."""

import pytest
import torch
from beyond import WINDOW, base, share
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.methods.cache.sharedllm import SharedLLM, shared
from formery.parts import Attention, Context
from formery.parts.condenser import Condenser
from formery.parts.grain import BlindTree, Even, Grain, Tree
from formery.parts.steered import attends, merged, placed, projected, sublayers, through

GRAINS = [Tree(2, 2), Tree(1, 2), Tree(3, 1), BlindTree(2, 2), Even(4)]


def causal(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Self-attention of one text, written out."""
    times = attention.heads // attention.groups
    key, value = key.repeat_interleave(times, 2), value.repeat_interleave(times, 2)
    scores = torch.einsum("bthd,bshd->bhts", query, key) * attention.dim**-0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return merged(attention, torch.einsum("bhts,bshd->bhtd", scores.masked_fill(later, -torch.inf).softmax(-1), value))


def encoded(model: SharedLLM, tokens: Tensor, ratio: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What the lower model keeps of one node, for each layer, and the node's vector."""
    at, found = torch.arange(len(tokens))[None], []

    def mix(attention: Attention, hidden: Tensor) -> Tensor:
        query, key, value = projected(attention, hidden)
        found.append((key[0, ratio - 1 :: ratio], value[0, ratio - 1 :: ratio]))
        return causal(attention, placed(attention, query, at), placed(attention, key, at), value)

    hidden, vector = model.embedding(tokens[None], Context(at)), torch.empty(0)
    for depth, layer in enumerate(model.lower.layers):
        for part in sublayers(layer):
            hidden = through(part, hidden, Context(at), mix)
            vector = hidden[0, -1] if depth == 0 and attends(part) else vector
    return found, vector


def gone_down(model: SharedLLM, chunk: Tensor, query: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """What is kept of the nodes of a chunk that are preserved for this query."""
    grain = model.lower.grain
    if isinstance(grain, Even):
        return [encoded(model, chunk, grain.ratio)[0]]
    assert isinstance(grain, Tree)
    kept, node = [], chunk
    for level in range(1, grain.height + 1):
        ratio = grain.finest * 2 ** (grain.height - level)
        halves = [encoded(model, half, ratio) for half in node.split(len(node) // 2)]
        likeness = [float(torch.cosine_similarity(vector, query, 0)) for _, vector in halves]
        into = 1 if isinstance(grain, BlindTree) or likeness[1] >= likeness[0] else 0
        kept.append(halves[1 - into][0])
        if level == grain.height:
            kept.append(halves[into][0])
        node = node.split(len(node) // 2)[into]
    return kept


def definition(model: SharedLLM, tokens: Tensor) -> Tensor:
    """The logits after the last token."""
    start = model.chunks.start(len(tokens) - 1)
    chunks, near = tokens[:start].split(model.chunk), tokens[start:]
    at = torch.arange(len(near))[None]
    read: list[list[tuple[int, list[tuple[Tensor, Tensor]]]]] = []  # for each token: chunk, entries of a node

    def mix(attention: Attention, hidden: Tensor) -> Tensor:
        query, key, value = projected(attention, hidden)
        return causal(attention, placed(attention, query, at), placed(attention, key, at), value)

    hidden = model.embedding(near[None], Context(at))
    for depth, layer in enumerate(model.decoder.layers):
        for part in sublayers(layer):
            hidden = through(part, hidden, Context(at), mix)
            if depth >= len(model.crossings) or not attends(part):
                continue
            if depth == 0:
                read = [[(i, one) for i, c in enumerate(chunks) for one in gone_down(model, c, q)] for q in hidden[0]]
            added, crossing = [], model.crossings[depth]
            for token, nodes in enumerate(read):
                keys = torch.cat([one[depth][0] for _, one in nodes])
                values = torch.cat([one[depth][1] for _, one in nodes])
                places = torch.cat([torch.full((len(one[depth][0]),), i) for i, one in nodes])
                settings = (places, len(chunks), torch.ones(1, 1, len(places), dtype=torch.bool))
                added.append(crossing(hidden[:, token : token + 1], keys[None], values[None], *settings))
            hidden = hidden + torch.cat(added, 1)
    assert model.norm is not None
    return model.output(model.norm(hidden))[0, -1]


@pytest.mark.parametrize("grain", GRAINS, ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_it_is_its_definition(grain: Grain, depth: int) -> None:
    model = share(grain, depth).double()
    tokens = torch.randint(97, (37,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0, -1], definition(model, tokens), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("height", [1, 2, 3, 4])
def test_preserved_nodes_cover_a_chunk_once(height: int) -> None:
    grain = Tree(height, 1)
    preserved = grain.preserved(torch.randn(200, 2 ** (height + 1) - 2))
    covered = torch.zeros(200, 2**height)
    spans = [
        (node * 2 ** (height - level), 2 ** (height - level))
        for level in range(1, height + 1)
        for node in range(2**level)
    ]
    for place, (begin, length) in enumerate(spans):
        covered[:, begin : begin + length] += preserved[:, place, None].float()
    assert torch.equal(covered, torch.ones_like(covered))
    assert int(preserved.sum()) == 200 * (height + 1)


def test_the_likest_is_gone_into_and_the_blind_go_to_the_right() -> None:
    likeness = torch.tensor([0.9, 0.1, 0.3, 0.2, 0.0, 1.0])
    assert Tree(2, 1).preserved(likeness).tolist() == [False, True, True, True, False, False]
    assert BlindTree(2, 1).preserved(likeness).tolist() == [True, False, False, False, True, True]


def test_at_first_it_is_a_window_that_slides() -> None:
    """Output maps are zero then, and nothing of the past comes in."""
    inner = base()
    model, tokens = shared(inner, WINDOW, 8, 2, Tree(2, 2)).eval(), torch.randint(97, (1, 40))
    with torch.no_grad():
        start = model.chunks.start(39)
        torch.testing.assert_close(model(tokens)[:, -1], inner(tokens[:, start:])[:, -1])
    for own, copied in zip(inner.layers[0].parameters(), model.lower.layers[0].parameters(), strict=True):
        assert torch.equal(own, copied) and own is not copied


def test_of_the_past_the_state_holds_all_nodes_of_the_lowest_layers() -> None:
    model = share(Tree(2, 2), depth=2)
    entries = 2 * 2 * model.lower.slots * 2 * 8 * 4  # layers; keys, values; entries; heads; width of a head; bytes
    vectors, tokens = 6 * 32 * 4, 8 * 8
    # From 24 to 32 tokens one chunk becomes past; as many are near as before.
    grown = account(model, 32).layers[0] - account(model, 24).layers[0]
    assert grown == entries + vectors + tokens


@pytest.mark.parametrize("depth", [0, 4])
def test_bad_depths_are_refused(depth: int) -> None:
    with pytest.raises(FormeryError, match="cannot be injected into"):
        shared(base(), WINDOW, 8, depth, Tree(2, 2))


def test_chunks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(FormeryError, match="does not divide into"):
        shared(base(), WINDOW, 8, 1, Tree(3, 4))
    with pytest.raises(FormeryError, match="0 lower layers"):
        SharedLLM(base(), WINDOW, Condenser([], Even(2), 8), [])
