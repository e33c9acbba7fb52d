"""Texts packed end to end give what padding gives, to rounding: vectors, logits, losses and gradients."""

import copy
from typing import Any

import pytest
import torch
from generation import KINDS, decoder, model, translator
from torch import Tensor

from formery.data.batching import pad
from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.methods.runtime.packing_races import NestedAttention
from formery.models import Encoder, EncoderDecoder, Reader
from formery.models.packed import continued, encoded, packable, read, translated
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    Context,
    Embedding,
    Layer,
    LayerNorm,
    Learned,
    Mask,
    MeanPool,
    Position,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sinusoidal,
    Together,
    TokenTypes,
    everything,
    window,
)
from formery.parts.mixers.mamba2 import Mamba2
from formery.parts.packed import Packed, PackedContext
from formery.parts.part import build
from formery.train.objective import next_token, translate
from formery.train.packed import packed_next_token, packed_translate

LENGTHS = (5, 2, 9, 5, 1, 2, 7)


def rows(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 97) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]


def pairs(sources: tuple[int, ...] = (4, 8, 8, 4, 3, 4, 6)) -> dict[str, Tensor]:
    source, source_positions = pad(rows(sources), 0)
    tokens, positions = pad(rows(tuple(length + 1 for length in LENGTHS)), 0)
    return {"source": source, "source_positions": source_positions, "tokens": tokens, "positions": positions}


def encoder(
    position: Position | None = None, mask: Mask = everything, embed: Position | None = None, **more: Any
) -> Encoder:
    def layer() -> Layer:
        attention = Attention(32, 4, position=position, mask=mask, **more)
        return Layer([PreNorm(LayerNorm(32), attention), PostNorm(LayerNorm(32), MLP(32, 48))])

    return Encoder(Embedding(97, 32, embed, deviation=0.3), [layer(), layer()], LayerNorm(32)).double()


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert float((found - wanted).abs().max().detach()) <= tolerance * max(1.0, float(wanted.abs().max().detach()))


@pytest.mark.parametrize(
    "made",
    [
        lambda: encoder(),
        lambda: encoder(Rotary(fraction=0.5), key_value_heads=2),
        lambda: encoder(Alibi(), window(3)),
        lambda: encoder(RelativeBuckets(4, bidirectional=True)),
        lambda: encoder(embed=Learned(16, 32), soft_cap=3.0, bias=True),
        lambda: encoder(embed=Sinusoidal(32), query_norm=RMSNorm(8), key_norm=RMSNorm(8), scale=0.2),
    ],
    ids=["plain", "grouped", "window", "buckets", "capped", "normed"],
)
def test_an_encoder_gives_what_padding_gives(made: Any) -> None:
    plain = made()
    own = packable(plain)
    source, positions = pad(rows(), 0)
    found, packed = encoded(own, source, positions)
    wanted = plain(source, positions)
    assert found.shape == (1, sum(LENGTHS), 32)
    same(found, packed.pack(wanted))
    (found * found.cos()).sum().backward()
    gradients = [one.grad.clone() for one in plain.parameters()]
    plain.zero_grad()
    kept = packed.pack(plain(source, positions))
    (kept * kept.cos()).sum().backward()
    for one, gradient in zip(plain.parameters(), gradients, strict=True):
        same(gradient, one.grad)


def test_packing_and_back() -> None:
    source, positions = pad(rows(), 0)
    packed = Packed(positions)
    assert packed.lengths == sorted(LENGTHS) and packed.offsets.tolist() == [0, 1, 3, 5, 10, 15, 22, 31]
    assert packed.fill == sum(LENGTHS) / (7 * 9)
    assert torch.equal(packed.unpack(packed.pack(source)), source.where(positions >= 0, 0))
    for place, row in enumerate(packed.order):
        text = packed.pack(source)[0, packed.offsets[place] : packed.offsets[place + 1]]
        assert text.tolist() == rows()[row]
    left = pad(rows(), 0, "left")
    assert torch.equal(Packed(left[1]).pack(left[0]), packed.pack(source))


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    own = packable(encoder(Rotary()))
    source, positions = pad(rows(), 0)
    whole, packed = encoded(own, source, positions)
    padded = packed.unpack(whole)
    for row, length in enumerate(LENGTHS):
        alone, _ = encoded(own, source[row : row + 1, :length], positions[row : row + 1, :length])
        same(alone[0], padded[row, :length])


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_decoder_learns_the_same(kind: str) -> None:
    plain = copy.deepcopy(model(kind)).double().train()
    own = packable(plain)
    tokens, positions = pad(rows(), 0)
    batch = {"tokens": tokens, "positions": positions}
    hidden, packed = continued(own, tokens, positions)
    same(own.logits(hidden), packed.pack(plain(tokens, positions)))
    one, other = next_token(plain, batch), packed_next_token(own, batch)
    same(other, one, 1e-6)  # losses are computed in 32 bits
    for found, wanted in zip(gradients(other, plain), gradients(one, plain), strict=True):
        same(found, wanted, 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_translator_learns_the_same(smoothing: float) -> None:
    plain = translator().double()
    own, batch = packable(plain), pairs()
    sides = [batch[name] for name in ("source", "tokens", "source_positions", "positions")]
    hidden, packed = translated(own, *sides)
    same(own.logits(hidden), packed.pack(plain(*sides)))
    one, other = translate(smoothing)(plain, batch), packed_translate(smoothing)(own, batch)
    same(other, one, 1e-6)  # losses are computed in 32 bits
    for found, wanted in zip(gradients(other, plain), gradients(one, plain), strict=True):
        same(found, wanted, 1e-6)


def gradients(loss: Tensor, plain: Any) -> list[Tensor]:
    plain.zero_grad()
    loss.backward()
    return [one.grad.clone() for one in plain.parameters()]


@pytest.mark.parametrize("compiled", [True, False])
def test_without_gradients_too(compiled: bool) -> None:
    plain = encoder(Rotary()).float().eval()
    own = packable(plain)
    plain.compiled = own.compiled = compiled
    source, positions = pad(rows(), 0)
    with torch.inference_mode():
        found, packed = encoded(own, source, positions)
        same(found, packed.pack(plain(source, positions)), 1e-5)


def test_a_reader_and_kinds_of_tokens() -> None:
    embed = Together([Learned(16, 32), TokenTypes(2, 32)])
    plain = Reader(encoder(embed=embed), MeanPool())
    source, positions = pad(rows(), 0)
    types = (torch.arange(9) > 2).long().expand(positions.shape)
    same(read(packable(plain), source, positions, types), plain(source, positions, types))


def test_nested_tensors_give_the_same() -> None:
    plain = encoder(Rotary())
    source, positions = pad(rows(), 0)
    with torch.inference_mode():
        found, packed = encoded(packable(plain, NestedAttention), source, positions)
        same(found, packed.pack(plain(source, positions)))


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_the_twin_shares_weights_reads_padded_batches_and_writes(kind: str) -> None:
    plain = model(kind)
    own = packable(plain)
    assert [id(one) for one in own.parameters()] == [id(one) for one in plain.parameters()]
    assert packable(own) is own
    again = build(own.describe())
    assert again.describe() == own.describe()
    prompts = [[3, 4, 5], [7], [9, 2]]
    asked = vars(Settings(max_new_tokens=8))
    for method in ("greedy", "aggressive-decoding:length=2"):
        wanted = [one.tokens for one in generate(plain, prompts, method, batch=3, **asked)]
        assert [one.tokens for one in generate(own, prompts, method, batch=3, **asked)] == wanted


def test_what_cannot_be_packed_is_said() -> None:
    source, positions = pad(rows(), 0)
    for wrong in (positions.clone().masked_fill(positions == 1, -1), positions + (positions >= 0)):
        with pytest.raises(FormeryError, match="begin at position 0"):
            Packed(wrong)
    with pytest.raises(FormeryError, match="without a token"):
        Packed(torch.full((2, 3), -1))
    plain = decoder(max_length=8)
    with pytest.raises(FormeryError, match=r"packable\(model\)"):
        continued(plain, source, positions)
    with pytest.raises(FormeryError, match="9 tokens is longer than this model takes"):
        continued(packable(plain), source, positions)
    with pytest.raises(FormeryError, match="no segments"):
        packed_next_token(packable(plain), {"tokens": source})
    strange = decoder()
    strange.layers[0].sublayers[0].replace("inner", Mamba2(32, heads=4, head_width=8, state_width=4))
    with pytest.raises(FormeryError, match="Mamba2 looks at other tokens"):
        packable(strange)
    empty = pairs()
    empty["source_positions"] = empty["source_positions"].clone()
    empty["source_positions"][2] = -1
    with pytest.raises(FormeryError, match="empty where"):
        packed_translate()(packable(translator()), empty)
    context = PackedContext(Packed(positions))
    with pytest.raises(FormeryError, match="not made for packed"):
        Attention(32, 4)(torch.zeros(1, sum(LENGTHS), 32), context)


def test_plain_contexts_go_through() -> None:
    attention = packable(encoder()).layers[0].sublayers[0].inner
    hidden = torch.randn(2, 3, 32, dtype=torch.double)
    context = Context(torch.arange(3).expand(2, 3), even=True)
    assert torch.equal(attention(hidden, context), attention.inner(hidden, context))


def test_a_translator_of_one_pair() -> None:
    own = packable(translator().double())
    assert isinstance(own, EncoderDecoder)
    one = {name: value[:1] for name, value in pairs().items()}
    same(packed_translate()(own, one), translate()(own, one), 1e-6)
