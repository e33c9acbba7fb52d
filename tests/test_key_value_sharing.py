"""Layers that share keys and values: equal to plain attention where each owns its own, a cache of the owners' alone."""

from pathlib import Path

import pytest
import torch
from generation import decoder, feed, translator
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.generate import Settings, generate
from formery.models import Decoder, load, save
from formery.models.key_value_sharing import shared, spaced
from formery.models.quantise import quantise
from formery.models.rewrite import twin
from formery.parts import (
    Alibi,
    Attention,
    Context,
    Embedding,
    Layer,
    Output,
    Parallel,
    PreNorm,
    RMSNorm,
    Rotary,
    build,
    causal,
    window,
)
from formery.parts.native import using
from formery.parts.shared_attention import OwningAttention, SharedAttention

LAYERS, HEADS, VOCABULARY = 6, 4, 97
PROMPTS = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
MAPS = {"pairs": [0, 0, 2, 2, 4, 4], "one": [0] * LAYERS, "uneven": [0, 1, 1, 1, 4, 4], "crossed": [0, 1, 0, 1, 0, 1]}


def whole(**options: object) -> Decoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return decoder(**{"position": Rotary(), "layers": LAYERS, **options}).eval()  # type: ignore[arg-type]


def text(rows: int, time: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(1))


def test_owners_are_evenly_spaced_and_readers_take_the_nearest_below() -> None:
    assert spaced(8, 8) == list(range(8)) and spaced(8, 1) == [0] * 8
    assert spaced(8, 2) == [0] * 4 + [4] * 4 and spaced(8, 3) == [0, 0, 2, 2, 2, 5, 5, 5]
    for layers in range(1, 13):
        for owners in range(1, layers + 1):
            found = spaced(layers, owners)
            assert len(set(found)) == owners and all(found[one] == one <= layer for layer, one in enumerate(found))


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_where_every_layer_owns_its_own_it_is_grouped_attention_bit_for_bit(groups: int) -> None:
    made, tokens = shared(whole(), spaced(LAYERS, LAYERS), groups), text(3, 20)
    grouped = whole(key_value_heads=groups)
    grouped.load_state_dict(made.state_dict())
    assert made.describe() == (whole() if groups == 4 else grouped).describe()
    with torch.inference_mode():
        assert torch.equal(made(tokens), grouped(tokens))
        states = [one.start(3, 32) for one in (made, grouped)]
        for piece in tokens.split([9, 1, 1, 9], 1):
            assert torch.equal(made.step(piece, states[0]), grouped.step(piece, states[1]))
    assert account(made, 20).layers == account(grouped, 20).layers


@pytest.mark.parametrize("options", [{}, {"key_value_heads": 2}, {"position": Alibi()}, {"mask": causal & window(5)}])
def test_an_owner_computes_what_plain_attention_does_bit_for_bit(options: dict[str, object]) -> None:
    plain = whole(**options)
    owning = twin(plain)
    for part in list(owning.modules()):
        if isinstance(part, PreNorm) and isinstance(part.inner, Attention):
            given = {name: getattr(part.inner, name) for name in Attention.parameters_of_constructor()}
            part.replace("inner", OwningAttention(**given))
    owning.load_state_dict(plain.state_dict())
    tokens = text(3, 20)
    positions = torch.arange(20).repeat(3, 1).masked_fill(torch.arange(20) >= torch.tensor([[20], [13], [6]]), -1)
    with torch.inference_mode(), using(False):
        assert torch.equal(owning.eval()(tokens), plain(tokens))
        assert torch.equal(owning(tokens, positions), plain(tokens, positions))
        states = [one.start(3, 32) for one in (owning, plain)]
        for piece in tokens.split([9, 1, 10], 1):
            assert torch.equal(owning.step(piece, states[0]), plain.step(piece, states[1]))


def by_the_formula(model: Decoder, owners: list[int], tokens: Tensor) -> Tensor:
    """Logits of one row, head by head; a layer's keys and values are made where its owner stands."""
    hidden = model.embedding(tokens[None], Context(torch.arange(len(tokens))[None]))[0]
    known: dict[int, tuple[Tensor, Tensor]] = {}
    angle = torch.arange(len(tokens))[:, None] * 10_000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x: Tensor) -> Tensor:
        pair = torch.complex(x[:, :4], x[:, 4:]) * turn
        return torch.cat((pair.real, pair.imag), 1)

    for number, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        first, second = layer.sublayers
        x, part = first.norm(hidden), first.inner
        if owners[number] == number:
            known[number] = part.key(x), part.value(x)
        keys, values = (one.split(8, 1) for one in known[owners[number]])
        mixed = []
        for head, query in enumerate(part.query(x).split(8, 1)):
            group = head * len(keys) // HEADS
            scores = turned(query) @ turned(keys[group]).T * 8**-0.5
            later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            mixed.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ values[group])
        hidden = hidden + part.output(torch.cat(mixed, 1))
        hidden = hidden + second.inner(second.norm(hidden), None)
    return model.output(model.norm(hidden))  # type: ignore[no-any-return, misc]


@pytest.mark.parametrize("owners", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("groups", [4, 1])
def test_it_is_the_formula(owners: list[int], groups: int) -> None:
    made, tokens = shared(whole(), owners, groups).double(), text(1, 15)
    wanted = by_the_formula(made, owners, tokens[0])
    torch.testing.assert_close(made(tokens)[0], wanted, rtol=1e-6, atol=1e-6)  # rotary tables are of 32 bits


def test_merging_averages_heads_and_layers() -> None:
    plain = whole()
    made = shared(plain, MAPS["uneven"], 2)
    parts = [layer.sublayers[0].inner for layer in plain.layers]
    for owner in (0, 1, 4):
        group = [part for part, own in zip(parts, MAPS["uneven"], strict=True) if own == owner]
        for name in ("key", "value"):
            weights = torch.stack([getattr(part, name).weight for part in group]).mean(0)
            wanted = torch.cat([(a + b) / 2 for a, b in (weights[:16].split(8), weights[16:].split(8))])
            torch.testing.assert_close(getattr(made.layers[owner].sublayers[0].inner, name).weight, wanted)
    # What is not merged is the model's own.
    own = {id(one) for one in plain.parameters()}
    new = [name for name, one in made.named_parameters() if id(one) not in own]
    assert len(new) == 6 and all(name.endswith(("key.weight", "value.weight")) for name in new)
    assert not any(isinstance(part, SharedAttention | OwningAttention) for part in plain.modules())


def test_equal_layers_that_share_are_the_model_itself() -> None:
    """Where all layers have the same maps and read the same, sharing them changes nothing."""
    plain = whole(layers=2)
    first, second = (layer.sublayers[0].inner for layer in plain.layers)
    with torch.no_grad():
        for name in ("key", "value"):
            getattr(second, name).weight.copy_(getattr(first, name).weight)
        for sublayer in plain.layers[0].sublayers:  # it then passes on what it was given
            (sublayer.inner.output if hasattr(sublayer.inner, "output") else sublayer.inner.down).weight.zero_()
    torch.testing.assert_close(shared(plain, [0, 0])(text(2, 12)), plain(text(2, 12)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("owners", MAPS.values(), ids=MAPS)
def test_cached_decoding_is_the_pass_from_scratch_also_in_ragged_rows(owners: list[int]) -> None:
    made = shared(whole(), owners, 2).double()
    rows = [text(1, 17)[0].tolist(), [5], text(1, 9)[0].tolist()[::-1]]
    with torch.inference_mode():
        state = made.start(3, 4)
        feed(made, state, [row[:-1] or row for row in rows])
        state.rollback([16, 0, 8])
        got = feed(made, state, [row[-1:] for row in rows])[:, 0]
        for row, logits in zip(rows, got, strict=True):
            torch.testing.assert_close(logits, made(torch.tensor([row]))[0, -1], rtol=1e-6, atol=1e-6)


def test_a_state_goes_back_settles_is_thinned_and_picked_as_with_plain_attention() -> None:
    made, tokens = shared(whole(), MAPS["pairs"], 1).double(), text(2, 12)
    with torch.inference_mode():
        state = made.start(2, 8)
        made.step(tokens, state)
        state.settle([[0, 1, 2, 3, 4, 5], [0, 1, 2]])
        state.select([1, 0, 1])
        again = torch.stack((tokens[1, 3:6], tokens[0, 6:9], tokens[1, 3:6]))
        got = made.step(again, state)
        for row, length in ((1, 6), (0, 9)):
            wanted = made(tokens[row : row + 1, :length])[0, -3:]
            torch.testing.assert_close(got[1 - row], wanted, rtol=1e-6, atol=1e-6)
        # A tree: the second guess is a sibling of the first; the path through it stays.
        state = made.start(1, 8)
        made.step(tokens[:1, :5], state)
        visible = torch.ones(1, 3, 8, dtype=torch.bool).tril(5)
        visible[0, 2, 6] = False
        made.step(tokens[:1, 5:8], state, torch.tensor([[5, 6, 6]]), visible)
        state.settle([[0, 2]])
        kept = torch.cat((tokens[:1, :6], tokens[:1, 7:9]), 1)
        torch.testing.assert_close(made.step(tokens[:1, 8:9], state)[:, 0], made(kept)[:, -1], rtol=1e-6, atol=1e-6)
        # What is dropped, all layers forget: as if it had never been visible to what follows.
        state.keep(torch.tensor([[True] * 6 + [False] + [True]]))
        assert len(state.layers) == 3 and state.slots.used == [7]


def test_only_owners_are_remembered() -> None:
    plain = whole()
    full = account(plain, 24, batch=3)
    for owners in MAPS.values():
        for groups in (4, 2, 1):
            taken = account(shared(plain, owners, groups), 24, batch=3)
            assert len(taken.layers) == len(set(owners))
            assert sum(taken.layers) * LAYERS * HEADS == sum(full.layers) * len(set(owners)) * groups
            assert full.total - taken.total == sum(full.layers) - sum(taken.layers)


@pytest.mark.parametrize(
    ("owners", "name"),
    [
        (MAPS["crossed"], "aggressive-decoding"),
        (MAPS["pairs"], "parallel-jacobi-decoding"),
        (MAPS["uneven"], "layerskip:exit=3"),
    ],
)
def test_drafting_methods_write_what_greedy_does(owners: list[int], name: str) -> None:
    made = shared(whole(), owners, 2)
    asked = Settings(max_new_tokens=16, stop_tokens=frozenset([9, 31]))
    wanted = [one.tokens for one in generate(made, PROMPTS, batch=1, **vars(asked))]
    assert len({tuple(one) for one in wanted}) > 1
    for batch in (1, 5):
        found = generate(made, PROMPTS, name, batch=batch, **vars(asked))
        assert [one.tokens for one in found] == wanted


def test_prompts_do_not_depend_on_their_neighbours() -> None:
    made = shared(whole(), MAPS["uneven"], 1)
    alone = [generate(made, [prompt], max_new_tokens=16)[0].tokens for prompt in PROMPTS]
    assert [one.tokens for one in generate(made, PROMPTS, max_new_tokens=16)] == alone


@pytest.mark.parametrize("owners", MAPS.values(), ids=MAPS)
def test_it_is_described_built_cloned_saved_and_loaded(tmp_path: Path, owners: list[int]) -> None:
    made, tokens = shared(whole(), owners, 2), text(2, 9)
    again = build(made.describe())
    assert isinstance(again, Decoder) and again.describe() == made.describe()
    again.load_state_dict(made.state_dict())
    save(made, tmp_path / "model")
    with torch.inference_mode():
        wanted = made(tokens)
        for one in (again.eval(), made.clone(), twin(made), load(tmp_path / "model")):
            assert torch.equal(one(tokens), wanted)
            readers = [part for part in one.modules() if isinstance(part, SharedAttention)]
            inside = set(one.modules())
            assert readers and all(part.owner in inside for part in readers)
    assert sum(one.numel() for one in made.state_dict().values()) == made.parameter_count()


def test_gradients_reach_owners_from_all_their_readers() -> None:
    made, tokens = shared(whole(), MAPS["one"], 1).clone(), text(2, 10)
    made(tokens).logsumexp(-1).sum().backward()
    key = made.layers[0].sublayers[0].inner.key.weight
    together = key.grad.clone()
    frozen = shared(whole(), MAPS["one"], 1).clone()
    for layer in list(frozen.layers)[1:]:
        layer.sublayers[0].inner.output.weight.data.zero_()
    frozen(tokens).logsumexp(-1).sum().backward()
    assert not torch.allclose(together, frozen.layers[0].sublayers[0].inner.key.weight.grad)
    assert all(one.grad is not None for one in made.parameters())


def test_layers_that_come_again_read_what_their_owner_made_that_time() -> None:
    made = shared(whole(layers=2), [0, 0]).double()
    looped = Decoder(made.embedding, [*made.layers] * 2, made.norm, made.output).eval()  # type: ignore[arg-type]
    twice = shared(whole(layers=4), [0, 0, 2, 2]).double()
    for number, layer in enumerate(twice.layers):
        layer.load_state_dict(made.layers[number % 2].state_dict())
    for name in ("embedding", "norm", "output"):
        getattr(twice, name).load_state_dict(getattr(made, name).state_dict())
    tokens = text(2, 11)
    with torch.inference_mode():
        torch.testing.assert_close(looped(tokens), twice(tokens))
        state = looped.start(2, 16)
        got = torch.cat([looped.step(piece, state) for piece in tokens.split([6, 1, 4], 1)], 1)
        torch.testing.assert_close(got, twice(tokens), rtol=1e-6, atol=1e-6)
        assert len(state.layers) == 2


def test_other_layouts_are_rewritten_too() -> None:
    def layer() -> Layer:
        attention = Attention(16, 4, position=Rotary(), query_norm=RMSNorm(4), key_norm=RMSNorm(4), bias=True)
        return Layer([Parallel([RMSNorm(16)], [attention])])

    plain = Decoder(Embedding(VOCABULARY, 16, deviation=1.0), [layer() for _ in range(4)], None, Output(16, VOCABULARY))
    made, tokens = shared(plain.double().eval(), [0, 0, 2, 2], 2), text(2, 9)
    with torch.inference_mode():
        state = made.start(2, 16)
        got = torch.cat([made.step(piece, state) for piece in tokens.split([4, 5], 1)], 1)
        torch.testing.assert_close(got, made(tokens), rtol=1e-6, atol=1e-6)
    assert len(account(made, 9).layers) == 2 and build(made.describe()).describe() == made.describe()


def test_a_layer_does_not_run_without_its_owner() -> None:
    made, tokens = shared(whole(), MAPS["pairs"]), text(1, 5)
    alone = Decoder(made.embedding, made.layers[1:2], made.norm, made.output).eval()  # type: ignore[arg-type]
    with torch.inference_mode():
        with pytest.raises(FormeryError, match="one that did not run in this pass"):
            alone(tokens)
        with pytest.raises(FormeryError, match="one that did not run in this pass"):
            alone.step(tokens, alone.start(1, 8))


@pytest.mark.parametrize(
    ("owners", "groups", "says"),
    [
        ([0, 0], None, "2 owners are named for 6 layers"),
        ([0, 2, 2, 3, 4, 5], None, "layer 1 cannot read the keys and values of layer 2"),
        ([0, 0, 1, 3, 4, 5], None, "layer 2 cannot read the keys and values of layer 1"),
        ([-1, 1, 2, 3, 4, 5], None, "layer 0 cannot read"),
        (MAPS["one"], 3, "4 key and value heads cannot be averaged into 3"),
        (MAPS["one"], 0, "cannot be averaged into 0"),
    ],
)
def test_what_is_no_map_is_refused(owners: list[int], groups: int | None, says: str) -> None:
    with pytest.raises(FormeryError, match=says):
        shared(whole(), owners, groups)


def test_models_that_cannot_be_merged_are_refused() -> None:
    with pytest.raises(FormeryError, match="of 3 layers 1 to 3 can own"):
        spaced(3, 4)
    with pytest.raises(FormeryError, match="share keys and values already"):
        shared(shared(whole(), MAPS["pairs"]), MAPS["pairs"])
    with pytest.raises(FormeryError, match="not those of EncoderDecoder"):
        shared(translator(), [0, 0])  # type: ignore[arg-type]
    coded = whole()
    quantise(coded)
    with pytest.raises(FormeryError, match="merge first, then quantise"):
        shared(coded, MAPS["pairs"])
    mixed = whole()
    mixed.layers[1].sublayers[0].replace("inner", Attention(32, 4, 2))
    with pytest.raises(FormeryError, match="layers of unlike attention"):
        shared(mixed, MAPS["pairs"])
    with pytest.raises(ValueError, match="3 heads cannot share 2"):
        SharedAttention(OwningAttention(32, 4, 2), 32, 3)


def test_a_shared_model_can_be_quantised_and_trained_with_recomputed_layers() -> None:
    from formery.train.alone import recompute

    plain = shared(whole(), MAPS["pairs"], 2).clone()
    thrifty, tokens = plain.clone(), text(2, 10)
    recompute(thrifty)
    for one in (plain, thrifty):
        one(tokens).logsumexp(-1).sum().backward()
    for own, other in zip(plain.parameters(), thrifty.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    quantise(plain)
    assert generate(plain, PROMPTS, max_new_tokens=4)
