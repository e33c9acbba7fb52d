"""Rotary positions in all the ways in which they are told: the logits of transformers, or one sentence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from published import saved
from test_config_fuzz import loaded_by_them, logits_of

import formery
from formery.errors import FormeryError

NAMES = ["llama", "llama3", "gpt-neox", "gpt-neox-in-turn", "gemma2", "qwen2", "qwen3-yarn"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TABLES: list[dict[str, Any]] = [
    {}, {"rope_type": "default"}, {"rope_theta": 77.0}, {"factor": 2.0}, {"partial_rotary_factor": 0.5},
    {"rope_type": "default", "partial_rotary_factor": 1.0}, {"rope_type": "default", "partial_rotary_factor": 0.3},
    {"rope_type": "linear", "factor": 3.0}, {"type": "linear", "factor": 3.0}, {"rope_type": "linear"},
    {"rope_type": "linear", "factor": 3.0, "partial_rotary_factor": 0.5}, {"rope_type": "dynamic", "factor": 2.0},
    YARN, {**YARN, "rope_theta": 1.0}, {**YARN, "rope_theta": 0.5}, {**YARN, "factor": 0.5},
    {**YARN, "truncate": False},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, {**YARN, "mscale": 0.7}, {**YARN, "attention_factor": 0.7},
    {**YARN, "beta_fast": 4.0, "beta_slow": 2.0}, {"rope_type": "yarn", "factor": 4.0},
    LLAMA3, {**LLAMA3, "original_max_position_embeddings": 20}, {**LLAMA3, "low_freq_factor": 4.0},
    {**LLAMA3, "original_max_position_embeddings": 20, "low_freq_factor": 4.0, "high_freq_factor": 1.0},
]  # fmt: skip
BESIDE: list[dict[str, Any]] = [
    {"rope_theta": 77.0}, {"rotary_emb_base": 77.0}, {"partial_rotary_factor": 0.5}, {"rotary_pct": 0.5},
    {"partial_rotary_factor": 1.0}, {"rotary_pct": 0.125}, {"original_max_position_embeddings": 8},
    {"max_position_embeddings": 40}, {"head_dim": 16}, {"factor": 8.0}, {"mscale": 0.5, "mscale_all_dim": 2.0},
]  # fmt: skip


def forms(base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration with a table in the older form or the newer, or in both, and with settings beside it."""
    bare = {name: value for name, value in base.items() if name != "rope_parameters"}
    for table in TABLES:
        yield {**bare, "rope_parameters": table}
        yield {**bare, "rope_scaling": table}
        yield {**base, "rope_scaling": table}
    for beside in BESIDE:
        yield {**bare, **beside}
        yield {**base, **beside}
        yield {**bare, **beside, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
        yield {**bare, **beside, "rope_parameters": {"rope_theta": 500.0, **YARN}}


@pytest.mark.parametrize("name", NAMES)
def test_positions_as_they_are_told(name: str, tmp_path: Path) -> None:
    folder = saved(name)[1]
    base = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    same, wrong = 0, []
    for config in forms(base):
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            ours = logits_of(formery.load(tmp_path), name, theirs=False)
        except FormeryError:
            continue
        theirs = loaded_by_them(name, tmp_path)
        if theirs is not None and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4):
            same += 1
        else:
            told = {key: value for key, value in config.items() if base.get(key) != value}
            wrong.append(f"{told}: {'they refuse' if theirs is None else 'other logits'}")
    assert not wrong, "\n".join(wrong)
    assert same > 30
