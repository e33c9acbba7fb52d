"""Loading takes the memory of the weights and hardly more: mapped where they are wanted as stored, else one by one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formery.models.compose import language_model
from formery.models.hub.config import Config
from formery.models.hub.export import export
from formery.models.hub.families.gpt2 import build

MEGABYTES = int(os.environ.get("FORMERY_LARGE", "200"))  # of the weights; a larger model by hand
MEASURE = """
import sys, time
import torch
from formery.models.checkpoint import load

load(sys.argv[3], dtype=eval(sys.argv[2]))  # what is imported on the way is no part of the weights

def resident(kind):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024

before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
started = time.perf_counter()
model = load(sys.argv[1], dtype=eval(sys.argv[2]))
seconds = time.perf_counter() - started
total = sum(float(parameter.detach().view(-1)[::1024].sum()) for parameter in model.parameters())
weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print((resident("VmHWM") - before) / weights, seconds, weights)
"""


def large(kind: str, folder: Path, dtype: torch.dtype) -> None:
    """Writes a model of about MEGABYTES in float32."""
    width = 1024
    each = (12 if kind == "gpt2" else 13) * width * width * 4
    layers = max(1, (MEGABYTES * 1_000_000 - 20_000 * width * 4) // each)
    if kind == "gpt2":
        told = {"vocab_size": 20_000, "n_embd": width, "n_layer": layers, "n_head": 16}
        model = build(Config(told, holds=range(10_000)))
    else:
        model = language_model(20_000, width, layers, 16, 16, 3 * width, 512)
    export(model, folder, dtype)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("kind", "stored", "wanted"),
    [
        ("llama", torch.float32, "torch.float32"),
        ("llama", torch.bfloat16, "torch.float32"),
        ("llama", torch.bfloat16, "None"),
        ("gpt2", torch.float32, "torch.float32"),
    ],
    ids=["mapped", "widened", "as stored", "transposed"],
)
def test_loading_takes_little_more_than_the_weights(
    kind: str, stored: torch.dtype, wanted: str, tmp_path: Path
) -> None:
    large(kind, tmp_path / "model", stored)
    export(language_model(20, 8, 1, 1, 1, 8, 8), tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "model"), wanted, str(tmp_path / "small")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    peak, seconds, weights = map(float, out)
    print(f"{kind} {stored} as {wanted}: {peak:.3f} times {weights / 1e6:.0f} MB in {seconds:.2f} s")
    assert peak < 1.2
