"""Two levels: what sees what, decoding against the pass from scratch, rollback over blocks, and the bytes held."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.accounting import account, layer_bytes
from formery.generate import generate
from formery.models import load, save
from formery.models.blocks import BlockTransformer, block_model
from formery.models.compose import language_model
from formery.parts import build

VOCABULARY, TIME = 43, 30
SHAPES = {"4": (4, 2), "2": (2, 1), "1": (1, 1), "3": (3, 2), "8": (8, 3)}


def model(length: int, prefix: int = 2, limit: int | None = None) -> BlockTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = block_model(VOCABULARY, 24, 2, 2, 2, 32, limit or 4_000, length, prefix).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
    return made


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, TIME))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_a_pass_is_what_the_three_parts_make_of_it(shape: tuple[int, int], tokens: Tensor) -> None:
    made, length = model(*shape), shape[0]
    whole, row = made(tokens), tokens[0].tolist()
    for place in range(TIME):
        # The token after `place` stands in the block of place + 1; all blocks before it are whole.
        block, inside = divmod(place + 1, length)
        context = made.opening[None]
        if block:
            vectors = [
                made.embedder.embedding.weight[row[i * length : (i + 1) * length]].flatten() for i in range(block)
            ]
            context = _stack(made.block_layers, made.block_norm, torch.stack(vectors)[None])[:, -1]
        prefix = made.expand(context).view(1, made.prefix, -1)
        own = made.embedding.weight[row[block * length : block * length + inside]][None]
        hidden = _stack(made.layers, made.norm, torch.cat((prefix, own), 1))
        torch.testing.assert_close(made.output(hidden[:, -1]), whole[:1, place])


def _stack(layers: Any, norm: Any, hidden: Tensor) -> Tensor:
    from formery.parts import Context

    context = Context(torch.arange(hidden.shape[1])[None], even=True)
    for layer in layers:
        hidden = layer(hidden, context)
    found: Tensor = norm(hidden)
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_all_of_the_past_is_seen_and_nothing_of_the_future(shape: tuple[int, int], tokens: Tensor) -> None:
    made, other = model(*shape), tokens.clone()
    other[:, 12] = (other[:, 12] + 1) % VOCABULARY
    before, after = made(tokens), made(other)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert ((before - after)[:, 12:].abs().amax(-1) > 1e-9).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_cached_decoding_is_the_pass_from_scratch(shape: tuple[int, int], tokens: Tensor) -> None:
    made = model(*shape)
    whole = made(tokens)
    for pieces in ([1] * TIME, [7, 1, 1, 4, 1, 1, 1, 12, 2]):
        state = made.start(3, 4)
        torch.testing.assert_close(torch.cat([made.step(one, state) for one in tokens.split(pieces, 1)], 1), whole)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_ragged_rows_taken_back_anywhere_and_chosen(shape: tuple[int, int], tokens: Tensor) -> None:
    made, draw = model(*shape), random.Random(3)
    whole, state, read = made(tokens), made.start(3, 8), [0, 0, 0]
    for turn in range(60):
        most = draw.choice((1, 1, 3, 9))
        counts = [min(draw.randint(0, most), TIME - one) for one in read]
        if turn % 3 == 0:
            counts = [min(1, TIME - one) for one in read]
        if (time := max(counts)) > 0:
            rows, positions = torch.zeros(3, time, dtype=torch.long), torch.full((3, time), -1)
            for row, (begin, count) in enumerate(zip(read, counts, strict=True)):
                rows[row, :count] = tokens[row, begin : begin + count]
                positions[row, :count] = torch.arange(begin, begin + count)
            logits = made.step(rows, state, positions if min(counts) < time else None)
            for row, (begin, count) in enumerate(zip(read, counts, strict=True)):
                torch.testing.assert_close(logits[row, :count], whole[row, begin : begin + count])
        read = [begin + count for begin, count in zip(read, counts, strict=True)]
        state.rollback(read)
        if draw.random() < 0.5:
            read = [draw.randint(max(0, one - draw.choice((1, 3, 30))), one) for one in read]
            state.rollback(read)
        if draw.random() < 0.3:
            rows = [draw.randrange(3) for _ in range(3)]
            state.select(rows)
            tokens, whole, read = tokens[rows], whole[rows], [read[row] for row in rows]
        assert state.lengths == read


@torch.no_grad()
def test_a_chain_of_drafts_is_settled(tokens: Tensor) -> None:
    made = model(4)
    whole, state = made(tokens), made.start(3, TIME)
    made.step(tokens[:, :6], state)
    drafts = tokens[:, 6:12].clone()
    drafts[:, 3:] = (drafts[:, 3:] + 1) % VOCABULARY
    made.step(drafts, state)
    state.settle([[0, 1, 2], [0], [0, 1]])
    assert state.lengths == [9, 7, 8]
    following = torch.stack([tokens[row, length : length + 5] for row, length in enumerate(state.lengths)])
    expected = torch.stack([whole[row, length : length + 5] for row, length in enumerate(state.lengths)])
    torch.testing.assert_close(made.step(following, state), expected)


@torch.no_grad()
def test_padding_behind_a_row_changes_nothing(tokens: Tensor) -> None:
    made, positions = model(4), torch.arange(TIME).expand(3, TIME).clone()
    positions[1, 17:] = -1
    torch.testing.assert_close(made(tokens, positions)[1, :17], made(tokens[1:2, :17])[0])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_state_takes_what_the_accounting_says(shape: tuple[int, int]) -> None:
    made, (length, prefix), batch, tokens = model(*shape), shape, 2, 1_200
    wide, width, entry = made.embedder.width, 24, 8
    outer = (tokens // length) * (2 * 2 * wide * entry + 8)
    inner = (2 * prefix + length - 2) * (2 * 2 * width * entry + 8)
    contexts = wide * entry
    expected = batch * (tokens * (8 + 4) + outer + inner + contexts) + contexts
    found = account(made, tokens, batch)
    assert found.total == expected
    plain = account(language_model(VOCABULARY, 24, 4, 2, 2, 32, 4_000).double(), tokens, batch)
    constant = batch * inner + (batch + 1) * contexts
    assert found.layers[0] - constant - batch * tokens * (4 + 8 / length) == pytest.approx(
        sum(plain.layers) / (2 * length)
    )


def test_bytes_do_not_come_from_long_passes() -> None:
    made = model(4)
    state = made.start(1, 400)
    with torch.no_grad():
        made.read(torch.ones(1, 399, dtype=torch.long), state)
        before = layer_bytes(state)
        made.read(torch.ones(1, 1, dtype=torch.long), state)
    assert layer_bytes(state) == before


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_generation_does_not_depend_on_method_or_batch(shape: tuple[int, int]) -> None:
    made, draft = model(*shape), model(1, 1)
    prompts = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5, 6]]
    alone = [generate(made, [one], max_new_tokens=14)[0].tokens for one in prompts]
    assert [one.tokens for one in generate(made, prompts, max_new_tokens=14)] == alone
    drafted = generate(made, prompts, "speculative-sampling:length=3", draft=draft, max_new_tokens=14)
    assert [one.tokens for one in drafted] == alone
    drawn = {"temperature": 1.0, "max_new_tokens": 9, "seed": 3}
    assert (
        generate(made, prompts, "sampling", **drawn)[2].tokens
        == generate(made, prompts, "sampling", batch=3, **drawn)[2].tokens
    )


def test_a_checkpoint_comes_back(tmp_path: object, tokens: Tensor) -> None:
    made = model(4).float()
    save(made, f"{tmp_path}/model")
    again = load(f"{tmp_path}/model")
    assert again.describe() == made.describe() == build(made.describe()).describe()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), made(tokens))
        state = again.start(3, TIME)
        torch.testing.assert_close(again.step(tokens, state), made(tokens), rtol=1e-4, atol=1e-4)


def test_gradients_reach_all_weights(tokens: Tensor) -> None:
    made = model(4).train()
    made(tokens).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in made.parameters())


def _read(positions: list[int] | None = None, **options: Any) -> Callable[[], object]:
    def run() -> None:
        made, at = model(4), None if positions is None else torch.tensor([positions])
        made.read(torch.ones(1, 3, dtype=torch.long), made.start(1, 8), at, **options)

    return run


def _stepped(then: Callable[[Any], object]) -> Callable[[], object]:
    def run() -> None:
        made = model(4)
        state = made.start(1, 8)
        with torch.no_grad():
            made.read(torch.ones(1, 6, dtype=torch.long), state)
        then(state)

    return run


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a tree": (_read(visible=torch.ones(1, 3, 3, dtype=torch.bool)), "as chains, not as trees"),
    "padding before": (_read([-1, 0, 1]), "in their order, with padding behind"),
    "a gap": (_read([0, 1, 3]), "in their order, with padding behind"),
    "dropped": (_stepped(lambda state: state.keep(torch.tensor([[True] * 5 + [False]]))), "cannot drop single tokens"),
    "a path": (_stepped(lambda state: state.settle([[0, 2]])), "keeps the first of them"),
    "segments": (lambda: model(4).hidden(torch.ones(1, 4).long(), None, torch.zeros(1, 4)), "one text in each"),
    "some layers": (lambda: model(4).context(1, None), "two levels"),
    "too long": (lambda: model(4, 2, 20)(torch.ones(1, 21, dtype=torch.long)), "more than this model takes"),
    "another prefix": (
        lambda: build({**model(4).describe(), "expand": {"part": "Linear", "inputs": 24, "outputs": 30}}),
        "a whole number of tokens' vectors",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("run", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_told(run: Callable[[], object], sentence: str) -> None:
    with pytest.raises(FormeryError, match=sentence):
        run()
