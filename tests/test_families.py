"""Every family of published models: the logits and texts of transformers, from scratch, cached, and there and back."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import DECODERS, READERS, SPECS, WRITERS, is_pair, saved, sources, their_logits, their_text, tokens
from torch import Tensor

import formery
from formery.models import Decoder, EncoderDecoder, Reader
from formery.models.hub.anatomy import anatomy
from formery.models.hub.export import export

LENGTHS = (5, 11, 8)


def inputs(name: str) -> tuple[Tensor, Tensor | None]:
    if name.startswith("vit"):
        image = SPECS[name].settings["image_size"]
        height, width = image if isinstance(image, list) else (image, image)
        return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)), None
    if name.startswith("whisper"):
        return torch.stack(sources(name, (1, 1))), tokens(2, 9, 1)
    return tokens(2, 13), tokens(2, 9, 1) if is_pair(name) else None


@torch.no_grad()
def our_logits(model: Any, source: Tensor, target: Tensor | None) -> Tensor:
    return model(source) if target is None else model(source, target)


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.05
    # BART norms after each sum: either side is off by up to 7e-5 from 64 bits, and they may be off to two sides.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_logits(name: str) -> None:
    theirs, folder = saved(name)
    model = formery.load(folder)
    assert isinstance(model, EncoderDecoder if is_pair(name) else Decoder if name in WRITERS else Reader)
    source, target = inputs(name)
    close(our_logits(model, source, target), their_logits(theirs, source, target))


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_text(name: str) -> None:
    theirs, folder = saved(name)
    model = formery.load(folder)
    prompts = sources(name, LENGTHS)
    written = their_text(theirs, prompts, 64, model.conventions.pad or 0)
    forced = list(model.prefix) if isinstance(model, EncoderDecoder) else []
    ours = formery.generate(model, prompts, max_new_tokens=64 - len(forced))
    assert [forced + one.tokens for one in ours] == written
    # A text that only repeats itself would say little; Marian's norms and positions make random weights do just that.
    assert len({tuple(one) for one in written}) > 1
    assert max(len(set(one)) for one in written) > 5 or name.startswith("marian")


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_cached_is_uncached(name: str) -> None:
    model = formery.load(saved(name)[1])
    source, target = inputs(name)
    read = source if target is None else target
    whole = our_logits(model, source, target)
    state, _ = model.begin([*source] if name.startswith("whisper") else source.tolist(), 4)
    pieces = [model.step(piece, state) for piece in read.split([1, 4, read.shape[1] - 5], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """transformers loads what is exported, with nothing missing or left over, and so do we."""
    theirs, folder = saved(name)
    model = formery.load(folder)
    export(model, tmp_path / "out")
    again, info = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    weights = again.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in theirs.state_dict().items())
    source, target = inputs(name)
    torch.testing.assert_close(their_logits(again.eval(), source, target), their_logits(theirs, source, target))
    twin = formery.load(tmp_path / "out")
    assert anatomy(twin) == anatomy(model) and twin.conventions == model.conventions
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        if name in WRITERS:
            assert getattr(again.generation_config, key, None) == getattr(theirs.generation_config, key, None)
    assert config["architectures"] == [SPECS[name].kind]


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "mamba2", "t5", "bert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_16_bits_and_in_shards(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, _ = saved(name)
    half = copy.deepcopy(theirs).to(dtype)
    half.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    source, target = inputs(name)
    widened = type(theirs).from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(our_logits(formery.load(tmp_path), source, target), their_logits(widened, source, target))
    as_stored = formery.load(tmp_path, dtype=None)
    assert {parameter.dtype for parameter in as_stored.parameters()} == {dtype}
    assert torch.isfinite(our_logits(as_stored, source, target)).all()


@pytest.mark.parametrize("name", ["bert", "roberta-classes", "bert-words"])
@torch.no_grad()
def test_texts_of_unequal_lengths(name: str) -> None:
    """A text's result does not depend on its neighbours, and pairs of texts are told apart."""
    theirs, folder = saved(name)
    model = formery.load(folder)
    texts = sources(name, (9, 4, 13, 1))
    together = model.read(texts, batch=3)
    for text, result in zip(texts, together, strict=True):
        close(result[None], their_logits(theirs, torch.tensor([text])))
    types = torch.tensor([[0] * 4 + [1] * 5])
    first = torch.tensor([texts[0]])
    out = theirs(input_ids=first, token_type_ids=types)
    close(model(first, types=types), out.logits if hasattr(out, "logits") else out.pooler_output)


@torch.no_grad()
def test_vectors_of_an_encoder() -> None:
    for name in ("bert", "vit"):
        theirs, folder = saved(name)
        source, _ = inputs(name)
        out = theirs(pixel_values=source) if name == "vit" else theirs(input_ids=source)
        close(formery.load(folder).encoder(source), out.last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "llama", "bert", "bert-classes", "bart", "opt", "mamba2"])
def test_a_checkpoint_without_the_outer_name(name: str, tmp_path: Path) -> None:
    """Published files often leave the first part of each name away."""
    from safetensors.torch import load_file, save_file

    theirs, folder = saved(name)
    base = theirs.base_model_prefix + "."
    tensors = load_file(folder / "model.safetensors")
    save_file({key.removeprefix(base): one for key, one in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source, target = inputs(name)
    close(our_logits(formery.load(tmp_path), source, target), their_logits(theirs, source, target))


def test_every_family_is_tested() -> None:
    from formery.models.hub.family import FAMILIES, families

    assert families() and set(FAMILIES) == {spec.kind for spec in SPECS.values()}
    assert set(DECODERS) | {name for name in WRITERS if is_pair(name)} | set(READERS) == set(SPECS)
    assert all(hasattr(transformers, kind) for kind in FAMILIES)
