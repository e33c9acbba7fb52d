"""Changed configurations: a model with the logits of transformers, or one sentence.

FORMERY_FUZZ=4000 tries so many changes.
"""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import SPECS, is_pair, saved, sources, their_logits, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

import formery
from formery.errors import FormeryError

CASES = int(os.environ.get("FORMERY_FUZZ", "700"))
HUGE = (0, -1, 1, 2, 3, 7, 2**31, 10**12, 10**30, -(10**12), 1.5, -2.0, 1e300, float("nan"), float("inf"))
ODD: tuple[Any, ...] = (*HUGE, None, True, False, "", "silu", "relu", "x" * 5000, [], [1], [[1]], {}, {"a": 1})


def sentence_of(action: Callable[[], Any]) -> tuple[Any, str | None]:
    """What comes of it, or the one sentence; anything else than a FormeryError fails the test."""
    try:
        return action(), None
    except FormeryError as error:
        text = str(error)
        assert "\n" not in text and 10 < len(text) < 2500, text
        return None, text


def changed(data: dict[str, Any], others: list[dict[str, Any]], chance: random.Random) -> str:
    """Changes one setting in place; tells which."""
    key = chance.choice(sorted(data))
    kind = chance.randrange(8)
    value = data[key]
    if kind == 0:
        del data[key]
    elif kind == 1:
        data[key] = None
    elif kind == 2 and type(value) in (int, float):
        data[key] = chance.choice((value + 1, value - 1, value * 2, value / 2, float(value), str(value), -value))
    elif kind == 3:
        donor = chance.choice(others)
        key = chance.choice(sorted(donor))
        data[key] = donor[key]
    elif kind == 4 and isinstance(value, dict) and value:
        inner = chance.choice(sorted(value))
        data[key] = {**value, inner: chance.choice(ODD)}
    elif kind == 5 and isinstance(value, bool):
        data[key] = not value
    elif kind == 6 and isinstance(value, str):
        data[key] = chance.choice(("gelu", "gelu_new", "relu", "silu", "tanh", "Unknown", "float16"))
    else:
        data[key] = chance.choice(ODD)
    if isinstance(value, float) and type(data.get(key)) is int:
        data[key] = float(data[key]) if abs(data[key]) < 10**300 else 0.5  # transformers takes no 2 for 2.0
    return key


@torch.no_grad()
def logits_of(model: Any, name: str, theirs: bool) -> Tensor:
    source, target = inputs(name)
    if theirs:
        return their_logits(model, source, target)
    return model(source) if target is None else model(source, target)


def inputs(name: str) -> tuple[Tensor, Tensor | None]:
    if name.startswith("vit"):
        image = SPECS[name].settings["image_size"]
        size = image if isinstance(image, list) else [image, image]
        return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)), None
    if name.startswith("whisper"):
        return torch.stack(sources(name, (1,))), tokens(1, 5, 1)
    return tokens(1, 12), tokens(1, 5, 1) if is_pair(name) else None


def loaded_by_them(name: str, folder: Path) -> Tensor | None:
    """The logits that transformers computes from the folder; None where it complains, or lacks a weight."""
    try:
        model, info = getattr(transformers, SPECS[name].kind).from_pretrained(
            folder, output_loading_info=True, dtype=torch.float32
        )
        return None if any(info.values()) else logits_of(model.eval(), name, theirs=True)
    except (Exception, SystemExit):
        return None


def test_changed_configurations(tmp_path: Path) -> None:
    """Where a model is made, its logits are those of transformers; where that refuses, those of the unchanged model."""
    chance = random.Random(1)
    names = sorted(SPECS)
    configs = {name: json.loads((saved(name)[1] / "config.json").read_text()) for name in names}
    usual = {name: logits_of(formery.load(saved(name)[1]), name, theirs=False) for name in names}
    wrong: list[str] = []
    loaded = 0
    for number in range(CASES):
        name = names[number % len(names)]
        data = copy.deepcopy(configs[name])
        key = changed(data, [configs[chance.choice(names)] for _ in range(3)], chance)
        place = tmp_path / name
        if not place.exists():
            place.mkdir()
            (place / "model.safetensors").symlink_to(saved(name)[1] / "model.safetensors")
        (place / "config.json").write_text(json.dumps(data))
        model, _ = sentence_of(lambda place=place: formery.load(place))
        # A model may have become too short for the test's text.
        ours = None if model is None else sentence_of(lambda model=model, name=name: logits_of(model, name, False))[0]
        if ours is None:
            continue
        loaded += 1
        expected = loaded_by_them(name, place)
        if expected is None and torch.allclose(ours, usual[name], rtol=1e-4, atol=1e-4):
            continue
        if expected is None or expected.shape != ours.shape or not torch.allclose(ours, expected, rtol=1e-4, atol=1e-4):
            theirs = "they refuse" if expected is None else "other logits"
            wrong.append(f"{name}: {key} {configs[name].get(key)!r} -> {data.get(key, 'deleted')!r:.60}: {theirs}")
    assert not wrong, "\n".join(wrong)
    assert loaded > CASES // 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["NoSuchModel"]}, "'NoSuchModel'.*not known here; known are .*LlamaForCausalLM"),
        ({"model_type": "gpt2"}, "'LlamaForCausalLM' .model_type 'gpt2'., which is not known"),
        ({"auto_map": {"AutoModel": "code.py"}}, "asks for code of its own .auto_map., and code .* is never run"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers .* tells of more than the 21 tensors"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"hidden_size": "32"}, "hidden_size .*should be a whole number"),
        ({"hidden_act": "nonsense"}, "hidden_act .*not known here; known are gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type .*dynamic.* not known here"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for each kind of layer"),
        ({"num_attention_heads": 5}, "cannot be built|has shape"),
        ({"tie_word_embeddings": True}, "should be a copy of model.embed_tokens.weight.*they differ"),
        ({"eos_token_id": "</s>"}, "eos_token_id should be a list of token ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sentences(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = saved("llama")[1]
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | change))
    with pytest.raises(FormeryError, match=says) as caught:
        formery.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"[" * 100_000, b"null", b"{}", b'{"model_type": 5}', b"\xed\xa0\x80"], ids=range(8)
)
def test_configurations_that_are_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(saved("llama")[1] / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    _, sentence = sentence_of(lambda: formery.load(tmp_path))
    assert sentence is not None and "config.json" in sentence


INDEXES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path": lambda map: map.update(dict.fromkeys(map, "../model.safetensors")),
    "an absolute path": lambda map: map.update(dict.fromkeys(map, "/etc/passwd")),
    "a pickle": lambda map: map.update(dict.fromkeys(map, "pytorch_model.bin")),
    "a number": lambda map: map.update({next(iter(map)): 5}),
    "a missing shard": lambda map: map.update({next(iter(map)): "model-00009-of-00009.safetensors"}),
    "another shard": lambda map: map.update({next(iter(map)): next(reversed(map.values()))}),
    "less than there is": lambda map: map.pop(next(iter(map))),
    "more than there is": lambda map: map.update({"more": next(iter(map.values()))}),
    "nothing": lambda map: map.clear(),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_indexes_that_lie(kind: str, tmp_path: Path) -> None:
    saved("llama")[0].save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    formery.load(tmp_path)
    INDEXES[kind](index["weight_map"])
    path.write_text(json.dumps(index))
    _, sentence = sentence_of(lambda: formery.load(tmp_path))
    assert sentence is not None and str(tmp_path) in sentence


def test_an_old_bert(tmp_path: Path) -> None:
    """Names of 2018, and what lies beside the weights of a model of missing words."""
    theirs, folder = saved("bert-words")
    tensors = load_file(folder / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): one
        for key, one in tensors.items()
    }
    old |= {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    old |= {"cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}
    old |= {"bert.embeddings.position_ids": torch.arange(100)[None]}
    old |= {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    source, _ = inputs("bert-words")
    ours = logits_of(formery.load(tmp_path), "bert-words", theirs=False)
    torch.testing.assert_close(ours, their_logits(theirs, source), rtol=1e-4, atol=1e-4)


ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


def with_settings(name: str, change: dict[str, Any], folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to(saved(name)[1] / "model.safetensors")
    config = json.loads((saved(name)[1] / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def test_an_empty_table_hides_no_other(tmp_path: Path) -> None:
    folder = with_settings("llama", {"rope_scaling": {}, "rope_parameters": ROPE}, tmp_path)
    theirs = loaded_by_them("llama", folder)
    assert theirs is not None
    torch.testing.assert_close(logits_of(formery.load(folder), "llama", False), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "turn whole heads"),
        ("gpt-neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "turned in pairs"),
        ("gpt-neox", {"head_dim": 5}, "head_dim"),
        ("llama3", {"original_max_position_embeddings": 77}, "original_max_position_embeddings"),
    ],
)
def test_positions_that_cannot_be(name: str, change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(FormeryError, match=says):
        formery.load(with_settings(name, change, tmp_path))
