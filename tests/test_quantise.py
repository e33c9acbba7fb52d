"""Weights of 8 and 4 bits: how far off they are, what has them, and that they are stored and shared like others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from generation import decoder, model
from hypothesis import given
from hypothesis import strategies as st
from published import WRITERS, is_pair, saved, sources, tokens
from torch import Tensor, nn

import formery
from formery.errors import FormeryError
from formery.generate import generate
from formery.models import Decoder
from formery.models.quantise import quantise
from formery.parts import Codes, Embedding, Experts, Linear, Rotary, TiedOutput, build
from formery.parts.native import build as kernels
from formery.parts.native import using

KINDS = ("int8", "int4")
SIZES = st.one_of(st.integers(1, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 127, 128, 300]))
WEIGHTS = {
    "outputs": SIZES, "inputs": SIZES, "seed": st.integers(0, 99), "size": st.sampled_from([1e-2, 1.0, 1e3]),
}  # fmt: skip


def weights(outputs: int, inputs: int, seed: int, size: float) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(outputs, 1, generator=random) + 0.1
    made = size * spread * torch.randn(outputs, inputs, generator=random)
    return made.masked_fill(torch.rand(outputs, 1, generator=random) < 0.1, 0)


# Codes


@given(**WEIGHTS)
def test_a_weight_of_8_bits_is_off_by_half_its_scale_at_most(**case: Any) -> None:
    weight = weights(**case)
    codes = Codes.of(weight, 8)
    scale = codes.scales.view(torch.float32)[: len(weight), None]
    torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / 127)
    assert bool(((codes.weights() - weight).abs() <= 0.5001 * scale).all())


@given(**WEIGHTS)
def test_a_weight_of_4_bits_is_off_by_a_share_of_the_largest_of_its_group(**case: Any) -> None:
    weight = weights(**case)
    largest = nn.functional.pad(weight, (0, -case["inputs"] % 32)).unflatten(1, (-1, 32)).abs().amax(-1)
    bound = 0.31 * largest.repeat_interleave(32, 1)[:, : case["inputs"]] + 1e-6
    assert bool(((Codes.of(weight, 4).weights() - weight).abs() <= bound).all())


def test_weights_of_4_bits_are_clearly_nearer_on_average() -> None:
    weight = torch.randn(256, 1024)
    groups = weight.view(256, 32, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    naive = ((groups / scale).round() * scale - groups).square().mean()
    assert (Codes.of(weight, 4).weights() - weight).square().mean() < 0.8 * naive


@given(**WEIGHTS, bits=st.sampled_from([4, 8]))
def test_rows_are_rows_of_the_weights(bits: int, **case: Any) -> None:
    weight = weights(**case)
    codes = Codes.of(weight, bits)
    assert codes.shape == weight.shape == codes.weights().shape
    index = torch.randint(0, case["outputs"], (3, 5))
    plain = codes.rows(index)
    assert torch.equal(plain, codes.weights()[index])
    with torch.inference_mode(), using("auto" if kernels.compiler() is None else True):
        assert torch.equal(codes.rows(index), plain)
        with pytest.raises(IndexError):
            codes.rows(index + case["outputs"])
    # What is a code already stays as it is, but for a scale that is told anew.
    torch.testing.assert_close(Codes.of(codes.weights(), bits).weights(), codes.weights(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros_and_no_size_overflows(bits: int) -> None:
    assert not Codes.of(torch.zeros(3, 40), bits).weights().any()
    for size in (1e-3, 1.0, 1e5):
        weight = size * torch.randn(20, 64)
        error = (Codes.of(weight, bits).weights() - weight).abs().max()
        assert error <= 0.3 * weight.abs().max()
    with pytest.raises(ValueError, match="8 or 4 bits"):
        Codes(3, 4, 5)


# Models


def tables(target: nn.Module) -> dict[str, type]:
    """What holds the weights of each map and table of embeddings."""
    return {name: type(part.weight) for name, part in target.named_modules() if isinstance(part, Linear | Embedding)}


@pytest.mark.parametrize("kind", KINDS)
def test_maps_become_codes_and_the_rest_stays(kind: Any) -> None:
    target = formery.load(saved("mixtral")[1])
    before = {name: weight.clone() for name, weight in target.named_parameters()}
    quantise(target, kind)
    after = dict(target.named_parameters())
    routers = {f"{name}.router" for name, part in target.named_modules() if isinstance(part, Experts)}
    found = tables(target)
    assert len(routers) == 2
    assert all((made is not Codes) == (name in routers or name == "embedding") for name, made in found.items())
    kept = before.keys() & after.keys()
    assert {name for name in before if "norm" in name or "router" in name or name == "embedding.weight"} <= kept
    assert all(torch.equal(before[name], after[name]) for name in kept)
    bits = 8 if kind == "int8" else 4
    assert all(part.bits == bits for part in target.modules() if isinstance(part, Codes))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "opt-350m", "t5", "bart"])
def test_tables_that_were_shared_stay_shared(name: str, kind: Any) -> None:
    target = formery.load(saved(name)[1], quantize=kind)
    ties = [part for part in target.modules() if isinstance(part, TiedOutput)]
    shared = [part for part in target.modules() if isinstance(part, Embedding)]
    assert len(ties) == 1 and isinstance(ties[0].embedding.weight, Codes)
    assert all(part.weight is ties[0].embedding.weight for part in shared)
    plain = formery.load(saved(name)[1])
    vocabulary, width = ties[0].embedding.weight.shape
    gone = sum(one.numel() for key, one in plain.named_parameters() if key.endswith("embedding.weight"))
    assert gone == vocabulary * width


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_quantised_is_told_in_a_sentence(kind: Any) -> None:
    target = model("rotary")
    quantise(target, kind)
    for asked, wrong, says in ((kind, target, "codes already"), ("int3", model("rotary"), "int3")):
        with pytest.raises(FormeryError, match=says) as error:
            quantise(wrong, asked)
        assert "\n" not in str(error.value)
    with pytest.raises(FormeryError, match="int2"):
        formery.load(saved("llama")[1], quantize="int2")


@torch.inference_mode()
def logits(target: Any, name: str) -> Tensor:
    prompts = sources(name, (12,))
    if not is_pair(name):
        return target(torch.tensor(prompts)).double()
    return target(torch.stack([torch.as_tensor(one) for one in prompts]), tokens(1, 9)).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_family_is_near_itself_and_the_same_without_kernels(name: str, kind: Any) -> None:
    exact = logits(formery.load(saved(name)[1], compile=False), name)
    found = {mode: logits(formery.load(saved(name)[1], quantize=kind, compile=mode), name) for mode in (False, "auto")}
    off = [(one - exact).square().mean().sqrt() / exact.std() for one in found.values()]
    # Random weights have nothing to spare: those of trained models lose far less.
    assert max(off) < (0.5 if kind == "int8" else 1.3) and min(off) > 1e-3
    assert (found["auto"] - found[False]).square().mean().sqrt() < 0.005 * exact.std()


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5", "bart", "mixtral", "mamba2"])
def test_codes_go_with_any_type_of_the_other_weights(name: str, dtype: Any, compile: Any) -> None:
    target = formery.load(saved(name)[1], dtype, quantize="int8", compile=compile)
    wanted = logits(formery.load(saved(name)[1], quantize="int8", compile=False), name)
    off = (logits(target, name) - wanted).square().mean().sqrt() / wanted.std()
    assert off < 0.5
    assert len(generate(target, sources(name, (4, 6)), max_new_tokens=5, stop_tokens=[])[1].tokens) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt-350m", "mixtral", "mamba2", "t5", "bart", "whisper"])
def test_a_quantised_model_is_saved_and_loaded(name: str, kind: Any, tmp_path: Path) -> None:
    target = formery.load(saved(name)[1], quantize=kind)
    formery.save(target, tmp_path / "small")
    again = formery.load(tmp_path / "small")
    assert again.describe() == target.describe() == build(target.describe()).describe()  # type: ignore[attr-defined]
    for (key, one), (other, two) in zip(target.named_parameters(), again.named_parameters(), strict=True):
        assert key == other and torch.equal(one, two) and one.requires_grad == two.requires_grad
    # A stem's convolutions depend on where in memory they read, and codes make much of that.
    if name == "whisper":
        return
    prompts = sources(name, (5, 9))
    asked: dict[str, Any] = {"max_new_tokens": 12, "stop_tokens": []}
    wanted = [one.tokens for one in generate(target, prompts, **asked)]
    assert [one.tokens for one in generate(again, prompts, **asked)] == wanted
    assert [one.tokens for one in generate(again.clone(), prompts, **asked)] == wanted
    with pytest.raises(FormeryError, match="codes already"):
        formery.load(tmp_path / "small", quantize=kind)
    rough = formery.load(tmp_path / "small", dtype="bfloat16", compile=False)
    assert len(generate(rough, prompts, **asked)[1].tokens) == 12


def test_a_stored_model_takes_as_little_room_as_promised(tmp_path: Path) -> None:
    target = decoder(Rotary(), width=256).eval()
    sizes = {}
    for kind in (None, *KINDS):
        twin = target.clone()
        if kind is not None:
            quantise(twin, kind)  # type: ignore[arg-type]
        formery.save(twin, tmp_path / str(kind))
        sizes[kind] = (tmp_path / str(kind) / "model.safetensors").stat().st_size - 97 * 256 * 4
    assert sizes["int8"] < 0.27 * sizes[None] and sizes["int4"] < 0.16 * sizes[None]


@pytest.mark.parametrize("change", [("codes", "U8"), ("scales", "I32")])
def test_codes_of_another_type_in_a_file_are_refused(change: tuple[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    target = model("rotary")
    quantise(target, "int8")
    formery.save(target, tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    stored = load_file(path)
    name = next(key for key in stored if key.endswith(change[0]))
    stored[name] = stored[name].to(torch.float32)
    save_file(stored, path)
    with pytest.raises(FormeryError, match="has type F32"):
        formery.load(tmp_path / "small")


@pytest.mark.parametrize("compile", [False, True])
def test_a_description_whose_codes_do_not_fit_its_maps_is_no_way_into_other_memory(
    compile: Any, tmp_path: Path
) -> None:
    target: Any = model("rotary")
    target.layers[0].sublayers[1].inner.up.replace("weight", Codes(6400, 32))
    formery.save(target, tmp_path / "wrong")
    with pytest.raises((FormeryError, RuntimeError)), torch.inference_mode():
        formery.load(tmp_path / "wrong", compile=compile)(torch.tensor([[1, 2]]))


def test_the_models_that_come_along_write_nearly_the_same() -> None:
    name = formery.models.shipped()[0]
    target = formery.load(name)
    asked: dict[str, Any] = {"max_new_tokens": 12}
    prompts = ["Once upon a time"] if isinstance(target, Decoder) else ["a"]
    plain = generate(target, prompts, **asked)[0]
    found = generate(formery.load(name, quantize="int8"), prompts, **asked)[0]
    assert found.tokens[:4] == plain.tokens[:4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card here")
def test_a_card_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(FormeryError, match="there is no cuda here"):
        formery.load("code", device="cuda")
