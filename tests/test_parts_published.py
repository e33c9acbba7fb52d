"""Parts that published models brought: each against transformers' module, or against its formula in float64."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_parts_describe import EXAMPLES, MODULES
from torch import Tensor, nn
from transformers import BertConfig, LlamaConfig, MixtralConfig, OlmoeConfig, ViTConfig, WhisperConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLMPredictionHead, BertPooler
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, OlmoeSparseMoeBlock
from transformers.models.vit.modeling_vit import ViTEmbeddings
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import formery
from formery.errors import FormeryError
from formery.models import Decoder, Encoder, EncoderDecoder
from formery.models.hub.config import Config
from formery.models.hub.rope import rope_settings, rotary
from formery.parts import (
    MLP,
    AcrossHeads,
    Alibi,
    Attention,
    Classifier,
    Context,
    CrossAttention,
    Embedding,
    Experts,
    FirstPlace,
    GatedMLP,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    LinearScaling,
    Llama3Scaling,
    MaskedOutput,
    MeanPool,
    Normalised,
    Part,
    Patches,
    Pooler,
    Position,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    SpeechStem,
    TiedOutput,
    Together,
    TokenTypes,
    YarnScaling,
    build,
    everything,
)

EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-10}


def random(part: Any) -> Any:
    """The part in float64, nothing left at a neutral starting value."""
    for parameter in part.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return part.eval()


def fill(ours: nn.Module, weights: dict[str, Tensor]) -> None:
    """Puts these weights in the places of all of ours."""
    ours.load_state_dict({name: weight.reshape(ours.get_parameter(name).shape) for name, weight in weights.items()})


def even(batch: int, time: int) -> Context:
    return Context(torch.arange(time).expand(batch, time), even=True)


# Experts


def mixture(experts: int, active: int, normalised: bool, width: int = 6) -> Experts:
    return random(Experts(width, [GatedMLP(width, 5) for _ in range(experts)], active, normalised))


def each_token_through_all(part: Experts, hidden: Tensor) -> Tensor:
    """The same mixture, token by token, with every expert computed and most given no share."""
    made = torch.stack([expert(hidden, even(*hidden.shape[:2])) for expert in part.experts], -1)
    scores = torch.einsum("ew,btw->bte", part.router.weight, hidden)
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    least = shares.sort(-1).values[..., -part.active, None]
    shares = torch.where(shares >= least, shares, 0)
    if part.normalised:
        shares = shares / shares.sum(-1, keepdim=True)
    return (made * shares[..., None, :]).sum(-1)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("experts", "active"), [(4, 2), (8, 3), (3, 3), (1, 1)])
@torch.no_grad()
def test_experts_are_those_of_mixtral_and_olmoe(experts: int, active: int, normalised: bool) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 10, "num_experts_per_tok": active}
    blocks: list[Any] = [
        OlmoeSparseMoeBlock(OlmoeConfig(**sizes, num_experts=experts, norm_topk_prob=normalised, hidden_act="silu"))
    ]
    if normalised:
        blocks.append(MixtralSparseMoeBlock(MixtralConfig(**sizes, num_local_experts=experts)))
    for block in blocks:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.4)
        ours = Experts(12, [GatedMLP(12, 10) for _ in range(experts)], active, normalised)
        weights = {"router.weight": block.gate.weight}
        for number in range(experts):
            # Each expert's gate lies above its `up`, in one matrix.
            gate, up = block.experts.gate_up_proj[number].chunk(2)
            weights |= {f"experts.{number}.gate.weight": gate, f"experts.{number}.up.weight": up}
            weights[f"experts.{number}.down.weight"] = block.experts.down_proj[number]
        fill(ours, weights)
        hidden = torch.randn(3, 7, 12)
        torch.testing.assert_close(ours(hidden, even(3, 7)), block(hidden.clone()), rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(
    experts=st.integers(1, 6), data=st.data(), batch=st.integers(1, 3), time=st.integers(0, 6), normalised=st.booleans()
)
def test_experts_are_their_formula(experts: int, data: st.DataObject, batch: int, time: int, normalised: bool) -> None:
    """Values and slopes; experts that nobody is sent to have none."""
    part = mixture(experts, data.draw(st.integers(1, experts)), normalised)
    hidden = torch.randn(batch, time, 6, dtype=torch.float64, requires_grad=True)
    found, wanted = part(hidden, even(batch, time)), each_token_through_all(part, hidden)
    torch.testing.assert_close(found, wanted, **EXACT)
    if time == 0:
        return
    weights, toward = [hidden, *part.parameters()], torch.randn_like(found)
    ours, theirs = (
        torch.autograd.grad((one * toward).sum(), weights, allow_unused=True) for one in (found, wanted)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert other is not None
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-8, atol=1e-8)
    assert float(theirs[0].abs().sum()) > 0 and sum(one is not None for one in ours) > 3


@torch.no_grad()
def test_a_token_goes_its_own_way_whatever_its_neighbours() -> None:
    part, hidden = mixture(5, 2, True), torch.randn(3, 8, 6, dtype=torch.float64)
    whole = part(hidden, even(3, 8))
    for row, at in ((0, 0), (1, 4), (2, 7)):
        torch.testing.assert_close(part(hidden[row, at][None, None], even(1, 1))[0, 0], whole[row, at], **EXACT)
        others = torch.randn_like(hidden) * 10
        others[row, at] = hidden[row, at]
        torch.testing.assert_close(part(others, even(3, 8))[row, at], whole[row, at], **EXACT)
    order = torch.randperm(8)
    torch.testing.assert_close(part(hidden[:, order], even(3, 8)), whole[:, order], **EXACT)


def test_only_the_likeliest_experts_run() -> None:
    class Tallying(Part):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, hidden: Tensor, context: Context) -> Tensor:
            self.seen += hidden.shape[0] * hidden.shape[1]
            return hidden

    part = Experts(4, [Tallying() for _ in range(6)], 2, normalised=True)
    hidden = torch.randn(2, 5, 4)
    # Shares that sum to one, of experts that change nothing.
    torch.testing.assert_close(part(hidden, even(2, 5)), hidden)
    assert sum(one.seen for one in part.experts) == 2 * 5 * 2
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="cannot run"):
            Experts(4, [Pooler(4)] * 6, wrong)


# Rotary scalings


def published_rope(head: int, **rope: Any) -> tuple[Tensor, float]:
    """The frequencies and the magnitude by transformers."""
    config = LlamaConfig(hidden_size=head * 2, num_attention_heads=2, head_dim=head, rope_parameters=rope)
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    return frequencies, magnitude


def turned_ones(part: Rotary, head: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines [time, half] by which the part turns at these positions."""
    heads = torch.zeros(1, len(positions), 1, head)
    heads[..., : head // 2] = 1
    turned = part.rotate(heads, Context(positions[None]))[0, :, 0]
    return turned[:, : head // 2], turned[:, head // 2 :]


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 1.0},
    {"rope_type": "linear", "factor": 7.5, "rope_theta": 500.0},
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 128},
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    {**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 40, "low_freq_factor": 0.5, "high_freq_factor": 9.0},
    {**YARN, "factor": 4.0},
    {**YARN, "factor": 0.5},
    {**YARN, "factor": 1.0, "mscale": 0.7, "mscale_all_dim": 0.9},
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3},
    {**YARN, "factor": 40.0, "mscale": 0.707},
    {**YARN, "factor": 16.0, "attention_factor": 0.8, "mscale": 2.0, "mscale_all_dim": 1.0},
    {**YARN, "factor": 16.0, "truncate": False},
    {**YARN, "factor": 1000.0, "beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 100.0},
    {**YARN, "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "rope_theta": 150000.0},
    {**YARN, "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
]


def forms(rope: dict[str, Any]) -> list[dict[str, Any]]:
    """The same settings in the older form and in the newer."""
    apart = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    table = {key: value for key, value in rope.items() if key not in apart}
    older = {"type" if key == "rope_type" else key: value for key, value in table.items()}
    return [{**apart, "rope_scaling": older}, {**apart, "rope_scaling": table}, {"rope_parameters": rope}]


def check_rope(rope: dict[str, Any], head: int) -> None:
    frequencies, magnitude = published_rope(head, **{"rope_theta": 10_000.0, **rope})
    for told in forms(rope):
        part = rotary(Config(told))
        assert part.scaling is not None
        plain = part.base ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
        torch.testing.assert_close(part.scaling(plain), frequencies, rtol=2e-5, atol=0)
        assert part.scaling.magnitude == pytest.approx(magnitude, rel=1e-12)
        positions = torch.tensor([0, 1, 2, 3, 17, 63, 64, 500])
        cosines, sines = turned_ones(part, head, positions)
        angle = positions[:, None].double() * frequencies.double()
        torch.testing.assert_close(cosines.double(), angle.cos() * magnitude, rtol=0, atol=2e-3 * magnitude)
        torch.testing.assert_close(sines.double(), angle.sin() * magnitude, rtol=0, atol=2e-3 * magnitude)


@pytest.mark.parametrize("head", [8, 64, 128])
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_scalings_are_those_of_transformers(rope: dict[str, Any], head: int) -> None:
    check_rope(rope, head)


@settings(max_examples=100)
@given(
    head=st.integers(2, 64).map(lambda half: 2 * half),
    base=st.sampled_from([100.0, 10_000.0, 1e6]) | st.floats(50, 1e7),
    length=st.integers(8, 200_000),
    factor=st.floats(0.2, 200),
    fast=st.floats(3, 64),
    slow=st.floats(0.05, 2),
    truncate=st.booleans(),
    magnitude=st.none() | st.floats(0.2, 3),
)
def test_yarn_is_that_of_transformers(
    head: int,
    base: float,
    length: int,
    factor: float,
    fast: float,
    slow: float,
    truncate: bool,
    magnitude: float | None,
) -> None:
    for turns in (fast, slow):
        place = head * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
        assume(not truncate or abs(place - round(place)) > 1e-3)  # rounding may go either way there
    rope = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": length,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": truncate,
        **({} if magnitude is None else {"attention_factor": magnitude}),
    }
    frequencies, attention = published_rope(head, **rope)
    ours = YarnScaling(factor, length, fast, slow, magnitude, truncate)
    plain = base ** (-torch.arange(0, head, 2, dtype=torch.float32) / head)
    torch.testing.assert_close(ours(plain), frequencies, rtol=1e-3, atol=0)
    assert ours.magnitude == pytest.approx(attention, rel=1e-12)


POSITIVE = st.floats(0.01, 1e4)
SCALINGS = st.one_of(
    st.none(),
    st.builds(LinearScaling, POSITIVE),
    st.builds(Llama3Scaling, POSITIVE, POSITIVE, POSITIVE, st.integers(1, 10**6)),
    st.builds(
        YarnScaling, POSITIVE, st.integers(1, 10**6), POSITIVE, POSITIVE, st.none() | POSITIVE, st.booleans()
    ),
)
ROTARIES = st.builds(
    Rotary, st.floats(1, 1e8), st.sampled_from([1.0, 0.25, 0.5]) | st.floats(0.1, 1.0), SCALINGS, st.just(False)
)


@settings(max_examples=200)
@given(part=ROTARIES)
def test_positions_that_are_written_are_read_again(part: Rotary) -> None:
    told = json.loads(json.dumps(rope_settings(part)))
    older = {key: value for key, value in told.items() if key != "rope_parameters"}
    newer = {"rope_parameters": told["rope_parameters"]}
    for form in (told, older, newer):
        again = rotary(Config(form))
        assert again.describe() == part.describe()
        assert rope_settings(again) == told


@settings(max_examples=100)
@given(
    rope=st.sampled_from(ROPES),
    factor=st.floats(0.5, 100) | st.integers(1, 100),
    fraction=st.none() | st.floats(0.1, 1.0),
    length=st.none() | st.integers(1, 10**6),
)
def test_positions_that_are_read_are_written_the_same(
    rope: dict[str, Any], factor: float, fraction: float | None, length: int | None
) -> None:
    """However they were told: both forms are one part, and what is written of it is that part again."""
    told = {"rope_theta": 1e4, **rope, "factor": factor}
    told |= {} if fraction is None else {"partial_rotary_factor": fraction}
    told |= {} if length is None else {"original_max_position_embeddings": length}
    parts = [rotary(Config(form)) for form in forms(told)]
    assert len({json.dumps(one.describe()) for one in parts}) == 1
    for form in (rope_settings(parts[0]), *forms(told)):
        assert rotary(Config(form)).describe() == parts[0].describe()
    # What is written means to transformers what was read.
    named = {"linear": {"factor"}}.get(rope["rope_type"], {"factor", "original_max_position_embeddings"})
    wanted = LlamaConfig(rope_parameters=dict(told)).rope_parameters
    found = LlamaConfig(**rope_settings(parts[0])).rope_parameters
    for key in {"rope_type", "rope_theta", *named}:
        assert found[key] == wanted[key]
    assert found.get("partial_rotary_factor", 1.0) == wanted.get("partial_rotary_factor", 1.0)


# Token types, several positions together, norms across heads


@torch.no_grad()
def test_positions_and_types_are_those_of_bert() -> None:
    theirs = BertEmbeddings(
        BertConfig(vocab_size=19, hidden_size=8, max_position_embeddings=12, type_vocab_size=3, num_attention_heads=2)
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = Embedding(19, 8, Together([Learned(12, 8), TokenTypes(3, 8)]), LayerNorm(8, 1e-12))
    fill(
        ours,
        {
            "weight": theirs.word_embeddings.weight,
            "position.parts.0.weight": theirs.position_embeddings.weight,
            "position.parts.1.weight": theirs.token_type_embeddings.weight,
            "norm.weight": theirs.LayerNorm.weight,
            "norm.shift": theirs.LayerNorm.bias,
        },
    )
    tokens, types = torch.randint(19, (2, 9)), torch.randint(3, (2, 9))
    positions = torch.tensor([list(range(9)), [0, 1, 2, 3, 0, 1, 2, 11, -1]])
    seen = positions.clamp(min=0)
    for given_types in (types, None):
        found = ours(tokens, Context(positions, types=given_types))
        wanted = theirs(tokens, token_type_ids=given_types, position_ids=seen)
        if given_types is None:
            wanted = theirs(tokens, token_type_ids=torch.zeros_like(tokens), position_ids=seen)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_together_is_the_sum_and_the_product_of_its_parts() -> None:
    positions = torch.tensor([[0, 1, 2, 5], [3, 0, 1, -1]])
    hidden, heads = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 4, 3, 8, dtype=torch.float64)
    learned, types, buckets = (random(one) for one in (Learned(9, 8), TokenTypes(2, 8), RelativeBuckets(3, 4, 6)))
    slow, fast, alibi = Rotary(100.0), Rotary(10.0), Alibi()
    whole = Together([learned, slow, alibi, types, buckets, fast])
    kinds = torch.randint(2, (2, 4))

    def context() -> Context:
        return Context(positions, types=kinds)

    added = learned.weight[positions.clamp(min=0)] + types.weight[kinds]
    torch.testing.assert_close(whole.embed(hidden, context()), hidden + added, **EXACT)
    # Turns of the same pairs: angles add up.
    frequencies = [base ** (-torch.arange(0, 8, 2) / 8) for base in (100.0, 10.0)]
    angle = (positions.clamp(min=0)[..., None, None] * sum(frequencies)).double()
    first, second = heads.chunk(2, -1)
    turned = torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)
    torch.testing.assert_close(whole.rotate(heads, context()), turned, rtol=0, atol=1e-5)
    both = alibi.bias(3, context()) + buckets.bias(3, context())
    torch.testing.assert_close(whole.bias(3, context()), both, **EXACT)
    assert not torch.equal(both, alibi.bias(3, context()))
    # Where rows are alike, one that stands for all and one for each go together as well.
    shared = even(2, 4)
    torch.testing.assert_close(whole.bias(3, shared), alibi.bias(3, shared) + buckets.bias(3, shared), **EXACT)
    silent = Together([learned, slow])
    assert silent.bias(3, context()) is None and Together([]).bias(3, context()) is None
    assert torch.equal(Together([alibi]).rotate(heads, context()), heads)


@torch.no_grad()
def test_a_norm_across_heads_is_olmoes() -> None:
    theirs = OlmoeRMSNorm(12, eps=1e-3)
    nn.init.normal_(theirs.weight)
    ours = AcrossHeads(RMSNorm(12, 1e-3))
    fill(ours, {"norm.weight": theirs.weight})
    heads = torch.randn(2, 5, 3, 4) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    wanted = theirs(heads.reshape(2, 5, 12)).view(2, 5, 3, 4)
    torch.testing.assert_close(ours(heads), wanted)
    torch.testing.assert_close(ours(heads.transpose(1, 2).contiguous().transpose(1, 2)), wanted)
    assert not torch.allclose(heads / heads.square().mean(-1, keepdim=True).sqrt(), wanted / theirs.weight.view(3, 4))


# Pixels and sound


IMAGES = [((8, 8), (2, 2)), ((6, 10), (3, 2)), ((9, 7), (2, 3)), ((5, 4), (5, 4)), ((7, 7), (3, 3))]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("image", "patch"), IMAGES)
@torch.no_grad()
def test_patches_are_those_of_vit(image: tuple[int, int], patch: tuple[int, int], channels: int) -> None:
    theirs = ViTEmbeddings(
        ViTConfig(hidden_size=6, image_size=image, patch_size=patch, num_channels=channels, num_attention_heads=2)
    ).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = Patches(channels, image, patch, 6)
    weights = {"first": theirs.cls_token, "positions": theirs.position_embeddings}
    weights["map.weight"] = theirs.patch_embeddings.projection.weight
    weights["map.shift"] = theirs.patch_embeddings.projection.bias
    fill(ours, weights)
    pixels, no_positions = ours.collate([torch.randn(channels, *image) for _ in range(3)])
    places = ours.places(pixels)
    torch.testing.assert_close(ours(pixels, Context(places, even=True)), theirs(pixels), rtol=1e-5, atol=1e-5)
    assert no_positions is None and places.tolist() == [list(range(len(ours.positions)))] * 3


def test_pictures_that_do_not_fit() -> None:
    part = Patches(3, (8, 6), (2, 2), 4)
    good = torch.zeros(3, 8, 6)
    for wrong, says in (
        (torch.zeros(3, 6, 8), r"picture 2 .*\[3, 8, 6\].*\[3, 6, 8\]"),
        (torch.zeros(1, 8, 6), r"\[1, 8, 6\]"),
        (torch.zeros(1, 3, 8, 6), r"\[1, 3, 8, 6\]"),
        ([1, 2, 3], "not list"),
    ):
        with pytest.raises(FormeryError, match=says):
            part.collate([good, wrong])  # type: ignore[list-item]
    for image, patch in (((8, 8), (9, 2)), ((8, 8), (2, 9)), ((8, 8), (0, 2)), ((8, 8), (2,)), ((8,), (2, 2))):
        with pytest.raises(FormeryError, match="Patches cannot be made"):
            build({"part": "Patches", "channels": 3, "image_size": [*image], "patch_size": [*patch], "width": 4})


@pytest.mark.parametrize(("mels", "width", "length"), [(4, 6, 5), (8, 8, 30), (1, 12, 1)])
@torch.no_grad()
def test_the_stem_is_whispers(mels: int, width: int, length: int) -> None:
    config = WhisperConfig(
        d_model=width, encoder_layers=0, encoder_attention_heads=2, num_mel_bins=mels, max_source_positions=length
    )
    theirs = WhisperEncoder(config).eval()
    theirs.layer_norm = nn.Identity()
    fresh = SpeechStem(mels, width, length)
    torch.testing.assert_close(fresh.positions, theirs.embed_positions.weight, rtol=0, atol=1e-5)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = SpeechStem(mels, width, length)
    fill(
        ours,
        {
            "first.weight": theirs.conv1.weight,
            "first.shift": theirs.conv1.bias,
            "second.weight": theirs.conv2.weight,
            "second.shift": theirs.conv2.bias,
            "positions": theirs.embed_positions.weight,
        },
    )
    features, no_positions = ours.collate([torch.randn(mels, 2 * length) for _ in range(3)])
    places = ours.places(features)
    found = ours(features, Context(places, even=True))
    torch.testing.assert_close(found, theirs(features).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert no_positions is None and places.tolist() == [list(range(length))] * 3


def test_recordings_that_do_not_fit() -> None:
    part = SpeechStem(4, 6, 5)
    good = torch.zeros(4, 10)
    for wrong, says in (
        (torch.zeros(4, 9), r"recording 2 .*\[4, 10\].*\[4, 9\]"),
        (torch.zeros(5, 10), r"\[5, 10\]"),
        (torch.zeros(10, 4), r"\[10, 4\]"),
        (torch.zeros(10), r"\[10\]"),
        ("speech.wav", "not str"),
    ):
        with pytest.raises(FormeryError, match=says):
            part.collate([good, wrong])  # type: ignore[list-item]


# Heads


POOLS: dict[str, Callable[[], Part]] = {
    "pooler": lambda: Pooler(6),
    "first": FirstPlace,
    "mean": MeanPool,
    "normalised": lambda: Normalised(MeanPool()),
    "classifier": lambda: Classifier(Normalised(Pooler(6)), Linear(6, 3, True)),
    "classifier of means": lambda: Classifier(MeanPool(), Linear(6, 3)),
}


def pooled(part: Any, row: Tensor) -> Tensor:
    """What the head makes of one row [time, width] without padding, by its formula."""
    if isinstance(part, Pooler):
        return torch.tanh(part.dense.weight @ row[0] + part.dense.shift)
    if isinstance(part, FirstPlace):
        return row[0]
    if isinstance(part, MeanPool):
        return sum(row) / len(row)
    inner = pooled(part.pool, row)
    if isinstance(part, Normalised):
        return inner / (inner**2).sum() ** 0.5
    return part.map.weight @ inner + (0 if part.map.shift is None else part.map.shift)


@pytest.mark.parametrize("name", sorted(POOLS))
@torch.no_grad()
def test_heads_are_their_formulas_and_see_no_padding(name: str) -> None:
    part = random(POOLS[name]())
    hidden = torch.randn(4, 7, 6, dtype=torch.float64)
    lengths = [7, 1, 4, 6]
    positions = torch.tensor([[*range(length), *[-1] * (7 - length)] for length in lengths])
    wanted = torch.stack([pooled(part, row[:length]) for row, length in zip(hidden, lengths, strict=True)])
    whatever = hidden.masked_fill((positions < 0)[..., None], math.nan)
    torch.testing.assert_close(part(whatever, positions), wanted, **EXACT)
    whole = torch.stack([pooled(part, row) for row in hidden])
    torch.testing.assert_close(part(hidden), whole, **EXACT)
    torch.testing.assert_close(part(hidden, torch.arange(7).expand(4, 7)), whole, **EXACT)


@torch.no_grad()
def test_a_mean_over_many_places_in_16_bits() -> None:
    hidden = torch.randn(2, 700, 6) + 1
    positions = torch.arange(700).repeat(2, 1)
    positions[1, 333:] = -1
    wanted = torch.stack((hidden[0].mean(0), hidden[1, :333].mean(0)))
    for dtype in (torch.bfloat16, torch.float16):
        found = MeanPool()(hidden.to(dtype), positions)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wanted, rtol=1e-2, atol=1e-2)
        assert torch.isfinite(MeanPool()(hidden.to(dtype), torch.full((2, 700), -1))).all()


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@torch.no_grad()
def test_heads_are_those_of_bert(activation: str) -> None:
    config = BertConfig(vocab_size=19, hidden_size=8, num_attention_heads=2, hidden_act=activation)
    theirs, pooler = BertLMPredictionHead(config), BertPooler(config)
    for parameter in (*theirs.parameters(), *pooler.parameters()):
        nn.init.normal_(parameter)
    embedding = Embedding(19, 8)
    ours = MaskedOutput(embedding, activation, LayerNorm(8, config.layer_norm_eps))
    dense, norm = theirs.transform.dense, theirs.transform.LayerNorm
    weights = {"transform.weight": dense.weight, "transform.shift": dense.bias}
    weights |= {"norm.weight": norm.weight, "norm.shift": norm.bias}
    weights |= {"output.shift": theirs.decoder.bias, "output.embedding.weight": theirs.decoder.weight}
    fill(ours, weights | {"embedding.weight": theirs.decoder.weight})
    hidden = torch.randn(2, 5, 8)
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(hidden, torch.arange(5).expand(2, 5)), ours(hidden), rtol=0, atol=0)
    assert ours.output.embedding is embedding
    assert ours.parameter_count() == 19 * 8 + 19 + 8 * 8 + 8 + 2 * 8
    own = Pooler(8)
    fill(own, {"dense.weight": pooler.dense.weight, "dense.shift": pooler.dense.bias})
    torch.testing.assert_close(own(hidden), pooler(hidden), rtol=1e-5, atol=1e-5)
    with pytest.raises(FormeryError, match="gelo"):
        MaskedOutput(embedding, "gelo", LayerNorm(8))


# Embeddings: factorised, and with a table that others share


def test_a_factorised_embedding_and_its_way_out() -> None:
    lift, lower, learned, norm = Linear(3, 8, True), Linear(8, 3), Learned(9, 8), RMSNorm(8)
    part = random(Embedding(11, 8, learned, norm, scale=2.0, inner=3, lift=lift))
    out = random(TiedOutput(part, 0.5, True, 4.0, lower))
    tokens, positions = torch.randint(11, (2, 5)), torch.tensor([[0, 1, 2, 3, 4], [4, 2, 0, 8, 1]])
    found = part(tokens, Context(positions))
    lifted = torch.einsum("oi,bti->bto", lift.weight, part.weight[tokens] * 2) + lift.shift
    torch.testing.assert_close(found, norm(lifted + learned.weight[positions]), **EXACT)
    lowered = torch.einsum("oi,bti->bto", lower.weight, found) * 0.5
    logits = torch.einsum("vi,bti->btv", part.weight, lowered) + out.shift
    torch.testing.assert_close(out(found), 4 * torch.tanh(logits / 4), **EXACT)
    assert part.weight.shape == (11, 3) and out.parameter_count() == part.parameter_count() + 24 + 11
    with pytest.raises(ValueError, match="needs a map to the width 8"):
        Embedding(11, 8, inner=3)


def pair() -> EncoderDecoder:
    """A model with one table for its source, for its target and its way out; each side has a norm of its own."""

    def layer(*inner: Part) -> Layer:
        return Layer([PreNorm(RMSNorm(6), one) for one in (*inner, MLP(6, 7))])

    source = Embedding(11, 6, Learned(20, 6), LayerNorm(6))
    target = Embedding(11, 6, Learned(20, 6), LayerNorm(6), 2.0, table=source)
    decoder = Decoder(target, [layer(Attention(6, 2), CrossAttention(6, 2))], None, TiedOutput(target), 20)
    return EncoderDecoder(Encoder(source, [layer(Attention(6, 2, mask=everything))], None, 20), decoder, 1).eval()


def stored(model: EncoderDecoder, folder: Path) -> EncoderDecoder:
    formery.save(model, folder)
    return formery.load(folder, dtype=torch.float64)


WAYS: dict[str, Callable[[EncoderDecoder, Path], Any]] = {
    "as made": lambda model, folder: model,
    "build": lambda model, folder: build(json.loads(json.dumps(model.describe()))),
    "clone": lambda model, folder: model.clone(),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "save and load": stored,
    "another type": lambda model, folder: model.clone().to(torch.float16).double(),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_shared_table_stays_one(way: str, tmp_path: Path) -> None:
    model = pair().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    twin = WAYS[way](model, tmp_path / "model").double()
    source, target, output = twin.encoder.embedding, twin.decoder.embedding, twin.decoder.output
    assert source.weight is target.weight and target.table is source and output.embedding is target
    assert twin.parameter_count() == model.parameter_count()
    assert [name for name, one in twin.named_parameters() if one is source.weight] == ["encoder.embedding.weight"]
    read, written = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 2]])
    if way in ("clone", "deepcopy", "save and load"):
        assert source.weight is not model.encoder.embedding.weight
        torch.testing.assert_close(twin(read, written), model(read, written), **EXACT)
    before = twin(read, written)
    with torch.no_grad():
        source.weight[2] = torch.randn(6)  # a token that only the decoder reads, or may write
    assert not torch.allclose(twin(read, written)[0, 1, :2], before[0, 1, :2])
    twin(read, written).sum().backward()
    assert target.weight.grad is source.weight.grad is not None


def test_a_wrong_table_is_refused() -> None:
    table = Embedding(11, 6)
    for sizes in ({"vocabulary": 12, "width": 6}, {"vocabulary": 11, "width": 8}):
        with pytest.raises(ValueError, match="cannot be shared"):
            Embedding(**sizes, table=table)
        with pytest.raises(FormeryError, match="cannot be shared"):
            build({"part": "Embedding", **sizes, "table": table.describe()})
    assert Embedding(11, 8, inner=6, lift=Linear(6, 8), table=table).weight is table.weight


@given(prompts=st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=6), min_size=1, max_size=4))
def test_texts_of_a_batch_are_told_from_their_padding(prompts: list[list[int]]) -> None:
    part = Embedding(11, 4)
    tokens, positions = part.collate(prompts)
    longest = max(map(len, prompts))
    assert tokens.shape == (len(prompts), longest)
    assert (positions is None) == (min(map(len, prompts)) == longest)
    places = part.places(tokens) if positions is None else positions
    assert part.places(tokens).tolist() == [list(range(longest))] * len(prompts)
    for row, prompt in enumerate(prompts):
        assert tokens[row][places[row] >= 0].tolist() == prompt
        assert places[row].tolist() == [*range(len(prompt)), *[-1] * (longest - len(prompt))]


# On the meta device, and in 16 bits


@pytest.mark.parametrize("name", MODULES)
def test_every_part_is_laid_out_without_memory(name: str) -> None:
    part: Any = EXAMPLES[name]()
    for make in (EXAMPLES[name], lambda: build(part.describe())):
        with torch.device("meta"):
            twin: Any = make()
        shapes = [(key, one.shape, one.dtype) for key, one in part.named_parameters()]
        assert [(key, one.shape, one.dtype) for key, one in twin.named_parameters()] == shapes
        assert all(one.is_meta for one in twin.parameters()) and not [*twin.buffers()]


def positioned(scheme: Position) -> Callable[[Tensor], Tensor]:
    """All that a scheme does, in one tensor."""

    def run(hidden: Tensor) -> Tensor:
        context = Context(torch.arange(5).expand(2, 5), even=True)
        heads = scheme.rotate(hidden.view(2, 5, 2, 4), context).flatten(-2)
        return scheme.embed(heads, context)

    return run


RUNS: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Callable[[Tensor], Tensor]]]]] = {
    "experts": lambda: (mixture(4, 2, True, 8), lambda part: lambda x: part(x, even(2, 5))),
    "experts, not normalised": lambda: (mixture(4, 2, False, 8), lambda part: lambda x: part(x, even(2, 5))),
    "linear scaling": lambda: (Rotary(100.0, scaling=LinearScaling(2.0)), positioned),
    "llama3 scaling": lambda: (Rotary(100.0, scaling=Llama3Scaling(4.0, 1.0, 4.0, 16)), positioned),
    "yarn": lambda: (Rotary(100.0, scaling=YarnScaling(4.0, 16)), positioned),
    "together": lambda: (Together([Learned(5, 8), TokenTypes(2, 8), Rotary(10.0)]), positioned),
    "across heads": lambda: (AcrossHeads(RMSNorm(8)), lambda part: lambda x: part(x.view(2, 5, 2, 4))),
    "patches": lambda: (
        Patches(1, (2, 4), (1, 2), 8),
        lambda part: lambda x: part(x.flatten()[:16].view(2, 1, 2, 4), even(2, 5)),
    ),
    "stem": lambda: (
        SpeechStem(4, 6, 5),
        lambda part: lambda x: part(x.flatten().view(2, 4, 10), even(2, 5)),
    ),
    "mean": lambda: (Normalised(MeanPool()), lambda part: part),
    "classifier": lambda: (Classifier(Pooler(8), Linear(8, 3)), lambda part: part),
    "masked output": lambda: (MaskedOutput(Embedding(11, 8), "gelu", LayerNorm(8)), lambda part: part),
    "lowered output": lambda: (
        TiedOutput(Embedding(11, 8, inner=3, lift=Linear(3, 8)), lower=Linear(8, 3)),
        lambda part: part,
    ),
}


@pytest.mark.parametrize("name", sorted(RUNS))
@torch.no_grad()
def test_parts_run_in_16_bits(name: str) -> None:
    part, run = RUNS[name]()
    random(part)
    hidden = torch.randn(2, 5, 8)
    part.to(torch.bfloat16)
    found = run(part)(hidden.bfloat16())
    wanted = run(part.double())(hidden.bfloat16().double())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
