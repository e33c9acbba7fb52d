"""The compiled kernels compute a token's logits with the same bits in every way in which they can be asked for."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from generation import KINDS, decoder, feed, model, noisy, translator
from hypothesis import given, settings
from hypothesis import strategies as st
from published import WRITERS, is_pair, saved, sources, tokens
from test_near_ties import PROMPTS, decoded, deviation, tied
from torch import Tensor

import formery
from formery.generate import Drafter, NoDraft, generate
from formery.generate.drafters import CopyDrafter, ModelDrafter
from formery.generate.target import CODED, canonical
from formery.methods.decoding.parallel.parallel_jacobi_decoding import JacobiDrafter
from formery.models import Decoder, EncoderDecoder
from formery.models.quantise import quantise
from formery.parts import (
    MLP,
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Parallel,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sandwich,
    Sinusoidal,
    TiedOutput,
    causal,
    dilated,
    prefix,
    window,
)
from formery.parts.native import build, using

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")

Model = Decoder | EncoderDecoder
STORES = ("float32", "bfloat16", "int8", "int4")
# What is computed by other code than the kernels': mixtures by recurrence, and recordings.
OTHERS = {"mamba2", "whisper"}


@pytest.fixture(autouse=True)
def with_kernels() -> Iterator[None]:
    with torch.inference_mode(), using(True):
        yield


def stored(target: Any, store: str) -> Any:
    if store.startswith("int"):
        quantise(target, store)
        return target
    return target.to(getattr(torch, store))


def mixed() -> Decoder:
    """Every residual layout, masks that take a table, biases, caps, and widths that are no multiple of anything."""
    width = 44
    maps: dict[str, Any] = {"bias": True, "head_width": 10, "key_value_heads": 2}
    first = Attention(width, 4, position=Rotary(interleaved=True), mask=causal & window(9), soft_cap=3.0, **maps)
    second = Attention(width, 4, position=RelativeBuckets(4), mask=causal & (dilated(2) | prefix(3)), **maps)
    third = Attention(width, 4, position=Rotary(fraction=0.5), query_norm=RMSNorm(10), key_norm=RMSNorm(10), **maps)
    layers = [
        Sandwich(RMSNorm(width, offset=1.0), first, RMSNorm(width)),
        PostNorm(LayerNorm(width), MLP(width, 70, "gelu", bias=True)),
        Parallel([LayerNorm(width), RMSNorm(width)], [second, GatedMLP(width, 33, "gelu_tanh", bias=True)]),
        Parallel([LayerNorm(width)], [third, MLP(width, 50, "relu2", bias=True)]),
        Layer([PreNorm(RMSNorm(width), GatedMLP(width, 1030, "silu"))]),
    ]
    embedding = Embedding(97, width, Sinusoidal(width), LayerNorm(width), scale=3.0, deviation=0.3)
    made = Decoder(embedding, layers, LayerNorm(width), TiedOutput(embedding, bias=True, soft_cap=5.0))
    for weight in made.parameters():
        weight.add_(0.1 * torch.randn(weight.shape))
    return made


MODELS: dict[str, Callable[[], Model]] = {
    **{kind: lambda kind=kind: model(kind) for kind in KINDS},  # type: ignore[misc]
    "mixed": mixed,
    "wide": lambda: decoder(Rotary(), width=120, key_value_heads=1),
    "wide translator": lambda: translator(width=72),
}


def texts_of(target: Model, seed: int, lengths: Sequence[int]) -> tuple[list[Any], list[list[int]]]:
    """Prompts, and what is read after them; one and the same where the model continues a text."""
    written = [torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed + n)).tolist() for n in lengths]
    if not isinstance(target, EncoderDecoder):
        return written, written
    return [text[1::2] + text[:3] for text in written], [[target.start_token, *text] for text in written]


def alone(target: Model, prompt: Any, text: list[int]) -> Tensor:
    """The logits after each token, from scratch."""
    if isinstance(target, Decoder):
        return target(torch.tensor([text]))[0]
    return target(torch.as_tensor(prompt)[None], torch.tensor([text]))[0]


def fed(
    target: Model, prompts: Sequence[Any], texts: Sequence[list[int]], seed: int, capacity: int = 1
) -> list[Tensor]:
    """The same in one batch, some tokens at a time, other numbers of them in each row, some of them taken back."""
    dice = random.Random(seed)
    state, _ = target.begin(prompts, capacity)
    assert state.exact
    rows, found = list(range(len(texts))), [[] for _ in texts]
    while rows:
        widths = [dice.choice([1, 1, 2, 5, 9, 40]) if dice.random() < 0.7 else 1 for _ in rows]
        parts = [texts[row][len(found[row]) :][:width] for row, width in zip(rows, widths, strict=True)]
        before = state.lengths
        logits = feed(target, state, parts)
        kept = [dice.randint(min(1, len(part)), len(part)) for part in parts]
        state.rollback([old + n for old, n in zip(before, kept, strict=True)])
        for row, one, n in zip(rows, logits, kept, strict=True):
            found[row] += one[:n]
        going = [place for place, row in enumerate(rows) if len(found[row]) < len(texts[row])]
        dice.shuffle(going)
        rows = [rows[place] for place in going]
        state.select(going)
    return [torch.stack(one) for one in found]


@settings(max_examples=2)
@given(st.integers(0, 999))
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_same_bits_however_they_are_computed(name: str, store: str, seed: int) -> None:
    torch.manual_seed(seed)
    target = stored(MODELS[name](), store).eval()
    lengths = random.Random(seed).sample(range(1, 45), 3)
    prompts, texts = texts_of(target, seed, lengths)
    wanted = [alone(target, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert wanted[0].std() > 0.01
    for one in (0, 1):
        for found, exact in zip(fed(target, prompts, texts, seed + one), wanted, strict=True):
            assert torch.equal(found, exact)
    assert torch.equal(fed(target, prompts[1:2], texts[1:2], seed, 100)[0], wanted[1])
    assert torch.equal(canonical(target, prompts[0], texts[0]), wanted[0][-1])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", ["mixed", "translator"])
def test_two_threads_compute_what_one_does(name: str, store: str) -> None:
    target = stored(MODELS[name](), store).eval()
    prompts, texts = texts_of(target, 2, [21, 4])
    wanted = [alone(target, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    torch.set_num_threads(2)
    try:
        assert torch.equal(fed(target, prompts, texts, 0)[0], wanted[0])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", MODELS)
def test_padding_and_neighbours_change_no_bit(name: str, store: str) -> None:
    target = stored(MODELS[name](), store).eval()
    prompts, texts = texts_of(target, 0, [33, 18, 5])
    longest = max(map(len, texts))
    padded = torch.tensor([[7] * (longest - len(text)) + text for text in texts])
    at = torch.arange(longest) - torch.tensor([[longest - len(text)] for text in texts])
    at = at.clamp(min=-1)
    behind = torch.stack([one.roll(len(text) - longest) for one, text in zip(padded, texts, strict=True)])
    at_behind = torch.stack([one.roll(len(text) - longest) for one, text in zip(at, texts, strict=True)])
    if isinstance(target, EncoderDecoder):
        source, places = target.encoder.embedding.collate(prompts)
        ways = [target(source, padded, places, at), target(source, behind, places, at_behind)]
    else:
        ways = [target(padded, at), target(behind, at_behind)]
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        exact = alone(target, prompt, text)
        assert torch.equal(ways[0][row, longest - len(text) :], exact)
        assert torch.equal(ways[1][row, : len(text)], exact)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", MODELS)
def test_a_branch_of_a_tree_is_as_if_it_were_the_text(name: str, store: str) -> None:
    """Two guesses of three tokens each, interleaved behind a text of which each sees its own; then one is kept."""
    target = stored(MODELS[name](), store).eval()
    prompts, texts = texts_of(target, 1, [20, 20])
    state, _ = target.begin(prompts, 64)
    length = len(texts[0]) - 3
    target.step(torch.tensor(texts)[:, :length], state)
    guesses = torch.randint(0, 97, (2, 6))
    guesses[:, 1::2] = torch.tensor(texts)[:, length:]
    at = (length + torch.arange(6) // 2).expand(2, 6)
    slots = torch.arange(length + 6)
    branch, earlier = (slots - length) % 2, slots <= (length + torch.arange(6))[:, None]
    visible = (slots < length) | ((branch == torch.arange(6)[:, None] % 2) & earlier)
    found = target.step(guesses, state, at, visible.expand(2, 6, -1))
    wanted = [alone(target, prompt, [*text, 5]) for prompt, text in zip(prompts, texts, strict=True)]
    keep = (slots < length) | (branch == 1)
    state.keep(keep.expand(2, -1))
    later = target.step(torch.tensor([[5], [5]]), state)
    for row, exact in enumerate(wanted):
        assert torch.equal(found[row, 1::2], exact[length:-1])
        assert torch.equal(later[row, 0], exact[-1])


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", WRITERS)
def test_published_families_are_exact(name: str, store: str) -> None:
    target = formery.load(
        saved(name)[1], None if store == "float32" else "bfloat16" if store == "bfloat16" else "float32"
    )
    target = stored(target, store)
    prompts = sources(name, (21, 9, 14))
    if name in OTHERS:
        assert not target.begin(prompts, 8)[0].exact
        return
    texts: list[list[int]] = prompts
    if is_pair(name):
        texts = [[target.start_token, *text] for text in tokens(3, 19, 9).tolist()]
        texts[1] = texts[1][:7]
    wanted = [alone(target, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    for seed in range(2):
        for found, exact in zip(fed(target, prompts, texts, seed), wanted, strict=True):
            assert torch.equal(found, exact)


# What is written


@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_near_ties_need_no_guard(kind: str, store: str) -> None:
    """Models in which every token has a twin that differs by rounding at most."""
    target = tied(kind, 1e-7)
    drafts = [noisy(target, share) for share in (0.02, 0.3)]
    target = stored(target, store)
    plain, guarded = decoded(target, NoDraft(), 1, guard=True)
    assert guarded == 0 and len({*map(tuple, plain)}) > 8
    ways: list[tuple[Drafter, int]] = [(NoDraft(), 3), (NoDraft(), 16), (CopyDrafter(shortest=1), 4)]
    ways += [(ModelDrafter(drafts[0], 1), 1), (ModelDrafter(drafts[0], 7), 16), (ModelDrafter(drafts[1], 3), 5)]
    ways += [(JacobiDrafter("plain"), 16), (JacobiDrafter("block", block=4), 1)]
    for drafter, batch in ways:
        assert decoded(target, drafter, batch, guard=False) == (plain, 0)
    assert decoded(target, ways[4][0], 16, False, 1.2)[0] == decoded(target, NoDraft(), 1, False, 1.2)[0]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("name", sorted(OTHERS))
def test_the_rounding_bound_is_one_where_others_compute_a_part(name: str, store: str) -> None:
    """Inputs that become whole numbers can make much of a last bit."""
    target = stored(formery.load(saved(name)[1]), store)
    texts = [text[: 21 - row % 5] for row, text in enumerate(tokens(6, 21, 5).tolist())]
    pairs = [(text, text) for text in texts]
    if is_pair(name):
        pairs = list(zip(sources(name, range(4, 10)), [[target.start_token, *text] for text in texts], strict=True))
    most = 0.5 * (CODED if store.startswith("int") else 1)
    assert max(deviation(target, pairs[:rows], width, rows) for width, rows in ((1, 1), (3, 5), (8, 6))) < most


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("kind", ["window", "translator"])
def test_a_row_samples_the_same_in_any_batch(kind: str, store: str) -> None:
    target = stored(model(kind), store)
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_new_tokens": 20}
    found = [
        [one.tokens for one in generate(target, PROMPTS, "sampling", batch=batch, **asked)] for batch in (1, 3, 16)
    ]
    assert found[0] == found[1] == found[2] and len({*map(tuple, found[0])}) == len(PROMPTS)
