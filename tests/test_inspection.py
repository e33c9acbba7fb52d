"""Inspecting says what loading would give, and reads no weight."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from published import SPECS, WRITERS, is_pair, saved, sources
from safetensors.torch import load_file, save_file

import formery
from formery.errors import FormeryError
from formery.models import EncoderDecoder, weights
from formery.models.inspection import inspect


@pytest.mark.parametrize("name", sorted(SPECS))
def test_what_is_said_is_what_is_loaded(name: str) -> None:
    _, folder = saved(name)
    found, model = inspect(folder), formery.load(folder)
    assert found.format == "Hugging Face" and found.architecture == SPECS[name].kind and found.family
    assert found.parameters == model.parameter_count()
    assert found.stored == {"F32": sum(one.nbytes for one in load_file(folder / "model.safetensors").values())}
    assert found.tree == repr(model) and found.context == model.max_length
    assert found.conventions == model.conventions.to_json()
    assert asdict(found)["files"] == 1


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_bytes_of_state(name: str) -> None:
    """As measured on real states of two lengths."""
    folder = saved(name)[1]
    found, model = inspect(folder), formery.load(folder)
    held = {}
    for source in (4, 8):
        for capacity in (40, 72):
            prompts = sources(name, (source,))
            held[source, capacity] = model.begin(prompts, capacity)[0].nbytes
    assert found.state_bytes_per_token == (held[4, 72] - held[4, 40]) // 32
    if is_pair(name) and not name.startswith("whisper"):
        positions = 8  # of a memory place
        assert found.memory_bytes_per_token == (held[8, 40] - held[4, 40]) // 4 - positions
    elif not isinstance(model, EncoderDecoder):
        assert found.memory_bytes_per_token is None
        assert found.state_bytes == held[4, 40] - 40 * found.state_bytes_per_token


def test_a_state_of_16_bits_is_half_as_large(tmp_path: Path) -> None:
    model = formery.load(saved("llama")[1])
    formery.export(model, tmp_path, dtype=torch.bfloat16)
    full, half = inspect(saved("llama")[1]), inspect(tmp_path)
    slot = 8  # a position of 64 bits
    assert (full.state_bytes_per_token - slot) == 2 * (half.state_bytes_per_token - slot) > 0
    assert set(half.stored) == {"BF16"}


def test_our_own_checkpoints_and_llama2c() -> None:
    found = inspect("code")
    assert found.format == "formery" and found.family is None and found.parameters == 6_852_864
    assert found.tokenizer == {"tokens": 4096, "begin": "<bos>", "end": "<eos>", "chat": False}
    assert inspect("translate").memory_bytes_per_token


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a file of weights was opened")

    monkeypatch.setattr(weights, "safe_open", never)
    assert inspect(saved("llama")[1]).parameters and inspect("code").parameters
    with pytest.raises(AssertionError):
        formery.load(saved("llama")[1])


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    tensors = load_file(saved("llama")[1] / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    text = (saved("llama")[1] / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"vocab_size": 64', '"vocab_size": 65'))
    with pytest.raises(FormeryError, match=r"has shape \[64, 32\], the model needs \[65, 32\]"):
        inspect(tmp_path)
    with pytest.raises(FormeryError, match="no checkpoint at"):
        inspect(tmp_path / "nothing")
