"""Position schemes against transformers' and against their formulas in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as turn_part
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from formery.parts import (
    Alibi,
    Context,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Position,
    RelativeBuckets,
    Rotary,
    Sinusoidal,
)

POSITIONS = torch.tensor([[0, 1, 2, 3, 50, 51, 1000], [7, 3, 0, 0, -1, 9, 2000]])


def turned_by_llama(heads: Tensor, positions: Tensor, **rope: object) -> Tensor:
    config = LlamaConfig(
        hidden_size=heads.shape[-1] * 2,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
    )
    cosine, sine = LlamaRotaryEmbedding(config)(heads, positions.clamp(min=0))
    return apply_rotary_pos_emb(heads, heads, cosine, sine, unsqueeze_dim=2)[0]


def test_rotary_is_llamas() -> None:
    heads = torch.randn(2, 7, 3, 16)
    theirs = turned_by_llama(heads, POSITIONS, rope_type="default", rope_theta=500.0)
    torch.testing.assert_close(Rotary(500.0).rotate(heads, Context(POSITIONS)), theirs, rtol=0, atol=5e-4)


@pytest.mark.parametrize("length", [32, 256, 8192])
def test_llama3_scaling(length: int) -> None:
    heads = torch.randn(2, 7, 3, 64)
    rope = {
        "factor": 4.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": length,
    }
    theirs = turned_by_llama(heads, POSITIONS, rope_type="llama3", rope_theta=10_000.0, **rope)
    ours = Rotary(scaling=Llama3Scaling(4.0, 2.0, 5.0, length)).rotate(heads, Context(POSITIONS))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(ours, Rotary().rotate(heads, Context(POSITIONS)), atol=1e-2)


def test_llama3_scaling_has_the_defaults_of_llama_3_1() -> None:
    frequencies = 500_000.0 ** (-torch.arange(0, 128, 2) / 128)
    scaled = Llama3Scaling()(frequencies)
    assert scaled[0] == frequencies[0] and scaled[-1] == frequencies[-1] / 8
    assert bool((scaled <= frequencies).all()) and bool((scaled >= frequencies / 8).all())


def test_linear_scaling_squeezes_positions() -> None:
    heads = torch.randn(2, 7, 3, 16)
    squeezed = Rotary(scaling=LinearScaling(4.0)).rotate(heads, Context(POSITIONS.clamp(min=0) * 4))
    torch.testing.assert_close(squeezed, Rotary().rotate(heads, Context(POSITIONS)), rtol=1e-4, atol=1e-4)
    theirs = turned_by_llama(heads, POSITIONS, rope_type="linear", rope_theta=10_000.0, factor=4.0)
    ours = Rotary(scaling=LinearScaling(4.0)).rotate(heads, Context(POSITIONS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_partial_rotary_is_that_of_gpt_neox() -> None:
    heads = torch.randn(2, 7, 3, 16)
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
    config = GPTNeoXConfig(hidden_size=32, num_attention_heads=2, rope_parameters=rope)
    cosine, sine = GPTNeoXRotaryEmbedding(config)(heads, POSITIONS.clamp(min=0))
    theirs = turn_part(heads, heads, cosine, sine, unsqueeze_dim=2)[0]
    ours = Rotary(fraction=0.25).rotate(heads, Context(POSITIONS))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[..., 4:], heads[..., 4:])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_multiplies_complex_numbers(fraction: float) -> None:
    heads = torch.randn(2, 7, 3, 16, dtype=torch.float64)
    positions = POSITIONS % 100
    dim = int(16 * fraction)
    frequencies = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (positions[..., None] * frequencies)[:, :, None]
    spun = torch.view_as_complex(heads[..., :dim].unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((torch.view_as_real(spun).flatten(-2), heads[..., dim:]), -1)
    ours = Rotary(fraction=fraction, interleaved=True).rotate(heads, Context(positions))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    # The other layout is the same turn of other pairs.
    halves = heads[..., :dim].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    other = Rotary(fraction=fraction).rotate(torch.cat((halves, heads[..., dim:]), -1), Context(positions))
    again = other[..., :dim].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(torch.cat((again, other[..., dim:]), -1), ours)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500), st.booleans(), st.sampled_from([1.0, 0.5]))
def test_rotary_score_depends_on_distance_alone(a: int, b: int, shift: int, pairs: bool, fraction: float) -> None:
    rotary = Rotary(fraction=fraction, interleaved=pairs)
    query, key = torch.linspace(-1, 1, 8).view(1, 1, 1, 8), torch.linspace(2, -3, 8).view(1, 1, 1, 8).sin()

    def score(query_position: int, key_position: int) -> float:
        turned = rotary.rotate(query, Context(torch.tensor([[query_position]])))
        return float((turned * rotary.rotate(key, Context(torch.tensor([[key_position]])))).sum())

    assert score(a, b) == pytest.approx(score(a + shift, b + shift), abs=2e-4)


def test_two_schemes_in_one_pass_do_not_mix() -> None:
    heads, context = torch.randn(2, 7, 3, 16), Context(POSITIONS)
    schemes = [
        Rotary(),
        Rotary(500.0),
        Rotary(fraction=0.5),
        Rotary(scaling=LinearScaling(2.0)),
        Rotary(interleaved=True),
    ]
    shared = [scheme.rotate(heads, context) for scheme in schemes]
    for scheme, result in zip(schemes, shared, strict=True):
        assert torch.equal(result, scheme.rotate(heads, Context(POSITIONS)))


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_is_the_papers(width: int) -> None:
    hidden = torch.randn(2, 7, width, dtype=torch.float64)
    ours = Sinusoidal(width, 500.0).embed(hidden, Context(POSITIONS)) - hidden
    for row, position in ((0, 0), (0, 3), (0, 50), (1, 7)):
        at = POSITIONS[row].tolist().index(position)
        for index in range(width):
            angle = position / 500.0 ** (2 * (index // 2) / width)
            expected = math.cos(angle) if index % 2 else math.sin(angle)
            assert float(ours[row, at, index]) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoidal_in_halves_is_marians(width: int) -> None:
    table = MarianSinusoidalPositionalEmbedding(2001, width).create_weight()
    ours = Sinusoidal(width, interleaved=False).embed(torch.zeros(2, 7, width), Context(POSITIONS))
    torch.testing.assert_close(ours, table[POSITIONS.clamp(min=0)], rtol=0, atol=2e-4)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_adds_the_row_of_the_position(offset: int) -> None:
    learned, hidden = Learned(2001, 8, offset), torch.randn(2, 7, 8)
    ours = learned.embed(hidden, Context(POSITIONS))
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(7)).tolist():
        position = int(POSITIONS[row, column])
        if position >= 0:
            assert torch.equal(ours[row, column], hidden[row, column] + learned.weight[position + offset])


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 12, 16, 20])
def test_alibi_has_blooms_slopes(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), heads, torch.float32)
    ours = Alibi().bias(heads, Context(torch.arange(9)[None], even=True))
    assert ours.shape == (1, heads, 9, 9)
    for query in range(9):
        # Bloom adds slope * key; the constant slope * query makes no difference to a softmax.
        expected = (theirs[:, 0] - theirs[:, 0, query : query + 1])[:, : query + 1]
        torch.testing.assert_close(ours[0, :, query, : query + 1], expected)
        torch.testing.assert_close(ours[0, :, query, query:], ours[0, :, query:, query])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (16, 40), (8, 1000)])
def test_buckets_are_t5s(bidirectional: bool, buckets: int, furthest: int) -> None:
    ahead = torch.arange(-1500, 1500)
    theirs = T5Attention._relative_position_bucket(-ahead, bidirectional, buckets, furthest)
    assert torch.equal(RelativeBuckets(2, buckets, furthest, bidirectional).bucket(ahead), theirs)


def test_buckets_read_the_table() -> None:
    part = RelativeBuckets(3, 16, 40, True)
    positions, slots = torch.tensor([[5, 9], [0, 70]]), torch.tensor([[0, 5, 3], [8, 0, 1]])
    bias = part.bias(3, Context(positions, slots))
    for b, h, q, k in torch.cartesian_prod(*(torch.arange(size) for size in (2, 3, 2, 3))).tolist():
        bucket = part.bucket(positions[b, q] - slots[b, k])
        assert bias[b, h, q, k] == part.weight[bucket, h]


def test_a_scheme_acts_only_where_it_says() -> None:
    hidden, heads, context = torch.randn(2, 7, 8), torch.randn(2, 7, 2, 4), Context(POSITIONS)
    acts = {
        Position(): set(),
        Learned(2001, 8): {"embed"},
        Sinusoidal(8): {"embed"},
        Rotary(): {"rotate"},
        Alibi(): {"bias"},
        RelativeBuckets(2): {"bias"},
    }
    for scheme, expected in acts.items():
        found = set()
        if not torch.equal(scheme.embed(hidden, context), hidden):
            found.add("embed")
        if not torch.equal(scheme.rotate(heads, context), heads):
            found.add("rotate")
        if scheme.bias(2, context) is not None:
            found.add("bias")
        assert found == expected
