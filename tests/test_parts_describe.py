"""describe, build, replace, clone and print, for every part there is."""

import contextlib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import long_parts
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import formery.models
import formery.parts
from formery.errors import FormeryError
from formery.models import Decoder, Encoder, Reader
from formery.models.compose import language_model, translator
from formery.models.guide import Heads
from formery.parts import (
    MLP,
    AcrossHeads,
    Alibi,
    Attention,
    CausalConvolution,
    Classifier,
    Codes,
    CrossAttention,
    Described,
    Embedding,
    Experts,
    FirstPlace,
    GatedMLP,
    GatedRMSNorm,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    LinearScaling,
    Llama3Scaling,
    Mamba2,
    MaskedOutput,
    MeanPool,
    Nested,
    Normalised,
    Output,
    Parallel,
    Part,
    Patches,
    Pooler,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sandwich,
    Sinusoidal,
    SpeechStem,
    TiedOutput,
    Together,
    TokenTypes,
    YarnScaling,
    block_causal,
    build,
    causal,
    dilated,
    everything,
    prefix,
    window,
)
from formery.parts.part import activation
from formery.parts.stem import Convolution


def attention() -> Attention:
    return Attention(8, 4, 2, 6, Rotary(), causal & window(3), True, False, RMSNorm(6), LayerNorm(6), 0.5, 30.0, 0.1)


def factorised_embedding() -> Embedding:
    table = Embedding(11, 4)
    return Embedding(11, 8, Learned(16, 8), LayerNorm(8), 2.0, 0.1, 0.3, 4, Linear(4, 8), table)


def reader() -> Reader:
    encoder = Encoder(Patches(3, [8, 4], [2, 2], 8), [Layer([PreNorm(RMSNorm(8), MLP(8, 9))])], RMSNorm(8), 20)
    return Reader(encoder, Classifier(FirstPlace(), Linear(8, 2)), ["yes", "no"])


def decoder() -> Decoder:
    embedding = Embedding(11, 8)
    rotary = Rotary()
    layers = [Layer([PreNorm(LayerNorm(8), Attention(8, 2, position=rotary))]) for _ in range(3)]
    return Decoder(embedding, layers, RMSNorm(8), TiedOutput(embedding), 32)


# For each part: every constructor argument, none at its default, so that one that is forgotten shows.
EXAMPLES: dict[str, Callable[[], Described]] = {
    "AcrossHeads": lambda: AcrossHeads(RMSNorm(8)),
    "Alibi": Alibi,
    "Attention": attention,
    "BlockCausal": lambda: block_causal(3),
    "Both": lambda: causal & window(2),
    "Causal": lambda: causal,
    "CausalConvolution": lambda: CausalConvolution(8, 3, False),
    "Classifier": lambda: Classifier(Pooler(8), Linear(8, 2)),
    "Codes": lambda: Codes(9, 40, 4),
    "Convolution": lambda: Convolution(4, 8, 2),
    "CrossAttention": lambda: CrossAttention(8, 4, 2, 6, 10, causal, True, False, 0.5, 0.1),
    "Decoder": decoder,
    "Dilated": lambda: dilated(2),
    "Either": lambda: causal | prefix(2),
    "Embedding": lambda: factorised_embedding(),
    "Encoder": lambda: Encoder(Embedding(11, 8), [Layer([PreNorm(RMSNorm(8), MLP(8, 9))])], RMSNorm(8), 20),
    "EncoderDecoder": lambda: translator(11, 8, 1, 1, 2, 12, 20, 1, 0.1),
    "Everything": lambda: everything,
    "Experts": lambda: Experts(8, [GatedMLP(8, 12), GatedMLP(8, 12)], 1, False),
    "FirstPlace": FirstPlace,
    "GatedRMSNorm": lambda: GatedRMSNorm(8, 2, 1e-3),
    "GatedMLP": lambda: GatedMLP(8, 12, "gelu", True),
    "Heads": lambda: Heads(8, 3, 10),
    "Layer": lambda: Layer([PreNorm(RMSNorm(8), MLP(8, 9)), PostNorm(RMSNorm(8), GatedMLP(8, 9))]),
    "LayerNorm": lambda: LayerNorm(8, 1e-3, False),
    "Learned": lambda: Learned(16, 8, 2),
    "Linear": lambda: Linear(8, 9, True, 0.5),
    "LinearScaling": lambda: LinearScaling(4.0),
    "Llama3Scaling": lambda: Llama3Scaling(4.0, 2.0, 3.0, 64),
    "MLP": lambda: MLP(8, 12, "relu2", True),
    "Mamba2": lambda: Mamba2(8, 4, 4, 3, 2, 2, True, False, 1e-3, 0.01, 0.5, 16),
    "MaskedOutput": lambda: MaskedOutput(Embedding(11, 8), "gelu", LayerNorm(8)),
    "MeanPool": MeanPool,
    "Nested": lambda: Nested(GatedMLP(8, 12), [3, 6, 12], 6),
    "Normalised": lambda: Normalised(MeanPool()),
    "Not": lambda: ~causal,
    "Output": lambda: Output(8, 11, True, 30.0),
    "Parallel": lambda: Parallel([RMSNorm(8)], [MLP(8, 9), GatedMLP(8, 9)], 0.1),
    "Patches": lambda: Patches(3, [8, 4], [2, 2], 8),
    "Pooler": lambda: Pooler(8),
    "PostNorm": lambda: PostNorm(RMSNorm(8), MLP(8, 9), 0.1),
    "PreNorm": lambda: PreNorm(RMSNorm(8), MLP(8, 9), 0.1),
    "Prefix": lambda: prefix(2),
    "RMSNorm": lambda: RMSNorm(8, 1e-3, 1.0),
    "Reader": reader,
    "RelativeBuckets": lambda: RelativeBuckets(2, 16, 64, True),
    "Rotary": lambda: Rotary(500.0, 0.5, LinearScaling(2.0), True),
    "Sandwich": lambda: Sandwich(RMSNorm(8), MLP(8, 9), LayerNorm(8), 0.1),
    "Sinusoidal": lambda: Sinusoidal(8, 500.0, False),
    "SpeechStem": lambda: SpeechStem(4, 8, 6),
    "Together": lambda: Together([Learned(16, 8), TokenTypes(2, 8)]),
    "TokenTypes": lambda: TokenTypes(2, 8),
    "TiedOutput": lambda: TiedOutput(factorised_embedding(), 2.0, True, 30.0, Linear(8, 4)),
    "Window": lambda: window(3),
    "YarnScaling": lambda: YarnScaling(4.0, 64, 16.0, 2.0, 1.5, False),
}
EXAMPLES |= long_parts.EXAMPLES
BASES = {"Part", "Position", "Mask", "Scaling", "Guide", "Attending", "SecondDecoder"} | long_parts.BASES  # subclassed
MODULES = sorted(name for name in EXAMPLES if isinstance(EXAMPLES[name](), Part))
DIFFER = set(EXAMPLES) - {"Decoder", "Encoder", "EncoderDecoder"}


def registered() -> set[str]:
    """The parts of the two rooms that models are made of, all their files imported."""
    for package in (formery.parts, formery.models):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    rooms = ("formery.parts.", "formery.models.")
    return {name for name, cls in Described.registry.items() if cls.__module__.startswith(rooms)}


def test_every_registered_part_has_an_example() -> None:
    assert registered() - BASES == set(EXAMPLES), "give each new part an example in EXAMPLES"


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_round_trip(name: str) -> None:
    part = EXAMPLES[name]()
    assert type(part).__name__ == name
    data = part.describe()
    twin = build(json.loads(json.dumps(data)))
    assert type(twin) is type(part)
    assert twin.describe() == data
    if isinstance(part, Part) and isinstance(twin, Part):
        shapes = {key: value.shape for key, value in part.named_parameters()}
        assert {key: value.shape for key, value in twin.named_parameters()} == shapes
        assert twin.parameter_count() == part.parameter_count() == sum(shape.numel() for shape in shapes.values())
        assert repr(twin) == repr(part)
    else:
        assert twin == part


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_every_argument_is_kept_under_its_name(name: str) -> None:
    part = EXAMPLES[name]()
    parameters = type(part).parameters_of_constructor()
    for key, parameter in parameters.items():
        value = getattr(part, key)
        if name in DIFFER and parameter.default is not parameter.empty:
            assert value != parameter.default, f"{name}.{key} is at its default in the example"
            assert key in part.describe()
    assert set(part.describe()) <= {"part", *parameters}


@pytest.mark.parametrize("name", MODULES)
def test_a_change_in_place_is_described(name: str) -> None:
    part = EXAMPLES[name]()
    for key, value in part.arguments().items():
        if type(value) in (int, float) and key not in ("bias",):
            setattr(part, key, value + 1)
            assert part.describe()[key] == value + 1
            setattr(part, key, value)


def test_defaults_are_left_out() -> None:
    assert RMSNorm(8).describe() == {"part": "RMSNorm", "width": 8}
    assert Attention(8, 2).describe() == {"part": "Attention", "width": 8, "heads": 2}
    assert Attention(8, 2, mask=everything).describe()["mask"] == {"part": "Everything"}


def test_shared_parts_are_described_once_and_shared_again() -> None:
    model = decoder()
    data: Any = model.describe()
    assert data["output"]["embedding"] == {"same_as": "embedding"}
    first = "layers.0.sublayers.0.inner.position"
    assert data["layers"][2]["sublayers"][0]["inner"]["position"] == {"same_as": first}
    twin = build(data)
    assert isinstance(twin, Decoder) and isinstance(twin.output, TiedOutput)
    assert twin.output.embedding is twin.embedding
    assert twin.get_submodule(first) is twin.get_submodule(first.replace("layers.0", "layers.2", 1))
    assert twin.parameter_count() == model.parameter_count()


def test_a_layer_that_is_used_twice_stays_one() -> None:
    layer = Layer([PreNorm(RMSNorm(8), MLP(8, 9))])
    embedding = Embedding(11, 8)
    twin = build(Decoder(embedding, [layer, layer], None, TiedOutput(embedding)).describe())
    assert isinstance(twin, Decoder) and len(twin.layers) == 2 and twin.layers[0] is twin.layers[1]


def test_replace_of_an_argument() -> None:
    part = PreNorm(RMSNorm(8), MLP(8, 9))
    part.replace("norm", LayerNorm(8))
    twin = build(part.describe())
    assert isinstance(twin, PreNorm) and isinstance(twin.norm, LayerNorm)


def test_replace_of_a_part_made_inside() -> None:
    part = Attention(8, 2)
    part.replace("query", Linear(8, 8, True))
    data = part.describe()
    assert data["replaced"] == ["query"]
    twin = build(json.loads(json.dumps(data)))
    assert isinstance(twin, Attention) and twin.query.bias and not twin.key.bias
    assert twin.describe() == data
    tied = Attention(8, 2)
    tied.replace("query", part.key)
    tied.replace("key", part.key)
    again = build(tied.describe())
    assert isinstance(again, Attention) and again.query is again.key


@pytest.mark.parametrize("name", ["nothing", "width", "position"])
def test_replace_of_what_is_no_part(name: str) -> None:
    with pytest.raises(FormeryError, match=name):
        Attention(8, 2).replace(name, Linear(8, 8))


DEEP: Any = {"part": "Causal"}
for _ in range(5000):
    DEEP = {"part": "Not", "mask": DEEP}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"part": "Atention"}, "did you mean Attention"),
        ({"part": "Module"}, "no part named 'Module'"),
        ({"part": ["Linear"]}, "no part named"),
        ({}, "no part named"),
        ({"part": "Linear", "inputs": 3}, "outputs"),
        ({"part": "Linear", "inputs": 3, "outputs": 3, "biass": True}, "biass"),
        ({"part": "Linear", "inputs": "3", "outputs": 3}, "inputs"),
        ({"part": "Linear", "inputs": 3, "outputs": 3, "bias": "yes"}, "bias"),
        ({"part": "Linear", "inputs": True, "outputs": 3}, "inputs"),
        ({"part": "RMSNorm", "width": 3, "epsilon": True}, "epsilon"),
        ({"part": "Linear", "inputs": -3, "outputs": 3}, "Linear"),
        ({"part": "Linear", "inputs": 0, "outputs": 3}, "Linear"),
        ({"part": "Linear", "inputs": 10**30, "outputs": 3}, "Linear"),
        ({"part": "Linear", "inputs": 2**40, "outputs": 2**40}, "Linear"),
        ({"part": "Attention", "width": 8, "heads": 3}, "does not divide"),
        ({"part": "Attention", "width": 8, "heads": 0}, "heads"),
        ({"part": "Attention", "width": 8, "heads": 4, "key_value_heads": 3}, "evenly"),
        ({"part": "Attention", "width": 8, "heads": 2, "mask": {"part": "RMSNorm", "width": 8}}, "mask"),
        ({"part": "Attention", "width": 8, "heads": 2, "position": 3}, "position"),
        ({"part": "Rotary", "base": "high"}, "base"),
        ({"part": "Rotary", "scaling": {"part": "Causal"}}, "scaling"),
        ({"part": "Window", "size": [1]}, "size"),
        ({"part": "Alibi", "args": 1}, "args"),
        ({"part": "MLP", "width": 8, "hidden": 8, "activation": "gello"}, "did you mean gelu"),
        ({"part": "Layer", "sublayers": 5}, "sublayers"),
        ({"part": "Layer", "sublayers": [3]}, "sublayers"),
        ({"part": "Layer", "sublayers": [{"part": "Causal"}]}, "sublayers"),
        ({"part": "Parallel", "norms": [], "inners": [{"part": "Alibi"}]}, "norms"),
        ({"part": "Not", "mask": {"same_as": "left"}}, "'left', which is not there"),
        ({"same_as": []}, "not there"),
        ({"same_as": {}}, "not there"),
        ({"part": "RMSNorm", "width": 8, "replaced": "width"}, "replaced"),
        ({"part": "RMSNorm", "width": 8, "replaced": ["weight"]}, "replaced"),
        ({"part": "RMSNorm", "width": 8, "replaced": [[]]}, "replaced"),
        ({"part": "RMSNorm", "width": 8, "epsilon": {"part": "Causal"}, "replaced": ["epsilon"]}, "epsilon"),
        (DEEP, "nested too deeply"),
        ([], "list, not a part"),
        (3, "int, not a part"),
        ("RMSNorm", "str, not a part"),
        (None, "NoneType, not a part"),
    ],
)
def test_bad_descriptions(data: Any, says: str) -> None:
    with pytest.raises(FormeryError) as caught, torch.device("meta"):
        build(data)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(sorted(EXAMPLES)) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["part", "same_as", "replaced", "width", "mask", "left", "norm"]), inner)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_any_plain_data_is_a_part_or_an_error(data: Any) -> None:
    with torch.device("meta"), contextlib.suppress(FormeryError):
        assert isinstance(build(data), Described)


@given(st.data())
def test_one_wrong_value_in_a_good_description(data: st.DataObject) -> None:
    described: Any = json.loads(json.dumps(EXAMPLES[data.draw(st.sampled_from(sorted(EXAMPLES)))]().describe()))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(described)
    holder, key = data.draw(st.sampled_from(places))
    holder[key] = data.draw(PLAIN)
    with torch.device("meta"):
        try:
            made = build(described)
        except FormeryError:
            return
    assert isinstance(build(made.describe()), type(made))


def test_what_is_no_plain_data_is_not_described() -> None:
    part = RMSNorm(8)
    part.epsilon = torch.tensor(1.0)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="epsilon"):
        part.describe()


@pytest.mark.parametrize("name", MODULES)
def test_clone_is_equal_and_independent(name: str) -> None:
    part = EXAMPLES[name]()
    assert isinstance(part, Part)
    part.double().eval()
    for parameter in part.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter)
    twin = part.clone()
    assert twin.describe() == part.describe() and twin.training is part.training
    for (key, own), (other, theirs) in zip(twin.named_parameters(), part.named_parameters(), strict=True):
        assert key == other and own is not theirs and own.dtype == theirs.dtype
        assert torch.equal(own, theirs) and own.data_ptr() != theirs.data_ptr()
        before = theirs.clone()
        with torch.no_grad():
            own.add_(1)
        assert torch.equal(before, theirs)


def number(text: str) -> float:
    """The count at the end of a printed line."""
    match = re.search(r"\[([\d.e+]+) ?([kMB]?)\]$", text)
    assert match, text
    return float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]]


@pytest.mark.parametrize("name", MODULES)
def test_printing(name: str) -> None:
    part = EXAMPLES[name]()
    assert isinstance(part, Part)
    lines = repr(part).splitlines()
    assert lines[0].startswith(name)
    assert number(lines[0]) == pytest.approx(part.parameter_count(), rel=5e-3)


def test_printing_a_model() -> None:
    model = language_model(1000, 64, 12, 4, 2, 128, 256)
    lines = repr(model).splitlines()
    assert len(lines) < 16 and max(map(len, lines)) < 100
    (layers,) = [line for line in lines if "12 × Layer" in line]
    assert number(layers) == pytest.approx(model.layers[0].parameter_count(), rel=5e-3)
    (attention,) = [line for line in lines if "Attention" in line]
    assert "heads=4" in attention and "key_value_heads=2" in attention
    assert [line for line in lines if "Embedding (shared)" in line]
    assert number(lines[0]) == pytest.approx(model.parameter_count(), rel=5e-3)


def test_printing_keeps_the_order_of_unlike_layers() -> None:
    a, b = (lambda: PreNorm(RMSNorm(8), MLP(8, 9))), (lambda: PreNorm(RMSNorm(8), GatedMLP(8, 9)))
    lines = repr(Layer([a(), a(), b(), a()])).splitlines()
    assert [line.strip() for line in lines if "PreNorm" in line] == [
        "sublayers: 2 × PreNorm()  [152]",
        "sublayers: PreNorm()  [224]",
        "sublayers: PreNorm()  [152]",
    ]


def test_two_parts_cannot_have_one_name() -> None:
    with pytest.raises(TypeError, match="RMSNorm"):
        type("RMSNorm", (Part,), {})
    assert Described.registry["RMSNorm"] is RMSNorm


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("relu", lambda x: x.clamp(min=0)),
        ("relu2", lambda x: x.clamp(min=0) ** 2),
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)),
        ("sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
        ("identity", lambda x: x),
    ],
)
def test_activations(name: str, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(activation(name)(x), formula(x))


def test_unknown_activation() -> None:
    with pytest.raises(FormeryError, match="relu2"):
        activation("relu3")
