"""Where the compiled kernels cannot be used, or cannot be built, the parts' own `forward` does the same."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from generation import decoder, model
from torch import Tensor

from formery.errors import FormeryError
from formery.models import Decoder
from formery.parts import Codes, KeyValues, Linear, Part, RMSNorm, Rotary, causal, window
from formery.parts.native import build, using

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")


@pytest.fixture(autouse=True)
def with_kernels() -> Iterator[None]:
    with torch.inference_mode(), using(True):
        yield


# What the kernels do not know


class Odd(Part):
    """A part that nobody knows."""

    def __init__(self, inner: Part):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, context: Any) -> Tensor:
        return 0.5 * hidden + self.inner(hidden, context)


class Held(KeyValues):
    """Keys and values of another kind."""


def stepped(target: Decoder, changed: Callable[[Any], object] = lambda state: None) -> tuple[Tensor, bool]:
    """Logits in pieces, and whether they claim to be exact."""
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    state = target.start(2, 4)
    changed(state)
    found = [target.step(part, state) for part in tokens.split([5, 1, 1, 3, 2], 1)]
    return torch.cat(found, 1), state.exact


def shared(target: Decoder) -> None:
    """Attention that runs once within a layer that is known, and once within one that is not."""
    target.layers[1].sublayers[0].inner = target.layers[0].sublayers[0].inner
    target.layers[1] = Odd(target.layers[1])


ODD: dict[str, Callable[[Decoder], object]] = {
    "a hook": lambda target: (
        target.layers[1].sublayers[0].inner.register_forward_hook(lambda part, given, out: 2 * out)
    ),
    "a hook before": lambda target: (
        target.layers[0].sublayers[1].norm.register_forward_pre_hook(lambda part, given: (given[0] + 1,))
    ),
    "a hook on the output": lambda target: target.output.map.register_forward_hook(lambda part, given, out: out + 1),
    "training": lambda target: target.train(),
    "another forward": lambda target: setattr(target.layers[0].sublayers[1].inner, "forward", lambda x, context: 3 * x),
    "a layer unknown": lambda target: target.layers.insert(1, Odd(target.layers[0])),
    "a norm unknown": lambda target: setattr(target, "norm", torch.nn.Tanh()),
    "an attention shared": shared,
    "double": lambda target: target.double(),
    "weights turned": lambda target: setattr(
        target.output.map, "weight", torch.nn.Parameter(target.output.map.weight.T.contiguous().T)
    ),
    "no window": lambda target: [setattr(one.sublayers[0].inner, "mask", causal & window(0)) for one in target.layers],
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_unknown_runs_by_its_own_forward(odd: str) -> None:
    target = decoder(Rotary(), window(40) & causal, key_value_heads=2).eval()
    ODD[odd](target)
    with using(False):
        wanted, exact = stepped(target)
        assert not exact
    found, exact = stepped(target)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not exact or odd == "no window"


def test_a_layer_memory_of_another_class_is_left_to_its_part() -> None:
    target = decoder(Rotary()).eval()
    first = target.layers[0].sublayers[0].inner

    def held(state: Any) -> None:
        state.layers[first, 0] = Held(state.slots, 4, 8, 8, torch.float32)

    with using(False):
        wanted, _ = stepped(target, held)
    torch.testing.assert_close(stepped(target, held)[0], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stepped(target)[0], wanted, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_plain_path() -> None:
    with torch.inference_mode(False), torch.enable_grad():
        target, tokens = decoder(Rotary()).eval(), torch.tensor([[1, 2, 3]])
        target(tokens).sum().backward()
        assert all(weight.grad is not None for weight in target.parameters())
    with torch.inference_mode(False), torch.no_grad():
        assert not target(tokens).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_pytorch_makes_by_default_does_not_matter(dtype: torch.dtype) -> None:
    target = decoder(Rotary()).eval()
    tokens = torch.randint(0, 97, (2, 12))
    wanted = target(tokens)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(target(tokens), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    positions = torch.arange(12, dtype=torch.int32).expand(2, 12)
    assert torch.equal(target(tokens, positions), wanted)


MISFITS: dict[str, Callable[[Any, Any], object]] = {
    "up": lambda attention, mlp: mlp.replace("up", Linear(32, 500)),
    "down": lambda attention, mlp: mlp.replace("down", Linear(64, 500)),
    "query": lambda attention, mlp: attention.replace("query", Linear(500, 32)),
    "codes": lambda attention, mlp: attention.key.replace("weight", Codes(16, 500)),
    "shift": lambda attention, mlp: setattr(attention.key, "shift", torch.nn.Parameter(torch.zeros(3))),
}


@pytest.mark.parametrize("misfit", [*MISFITS, "norm", "last norm", "output"])
def test_parts_that_do_not_fit_together_are_no_way_into_other_memory(misfit: str) -> None:
    target: Any = decoder(Rotary(), key_value_heads=2).eval()
    first, second = target.layers[0].sublayers
    if misfit in MISFITS:
        MISFITS[misfit](first.inner, second.inner)
    elif misfit == "output":
        target.output.map.replace("weight", Codes(97, 16))
    else:
        (first if misfit == "norm" else target).replace("norm", RMSNorm(500 if misfit == "norm" else 16))
    with pytest.raises(RuntimeError):
        target(torch.tensor([[1, 2, 3]]))


# Building


def forgetful(monkeypatch: pytest.MonkeyPatch, place: Path) -> Path:
    """As if nothing had been built or loaded; the place where it would be."""
    path = place / "kernels" / "kernels.so"
    path.parent.mkdir()
    monkeypatch.setattr(build, "target", lambda: path)
    monkeypatch.setattr(build, "_loaded", {})
    return path


def told(wrong: Callable[[], object]) -> str:
    with pytest.raises(FormeryError) as error:
        wrong()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    return str(error.value)


def test_without_a_compiler_all_is_computed_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = model("rotary")
    tokens = torch.tensor([[1, 2, 3]])
    with using(False):
        wanted = target(tokens)
    forgetful(monkeypatch, tmp_path)
    monkeypatch.setattr(build, "compiler", lambda: None)
    assert not build.begin.__wrapped__()
    assert "there is no C++ compiler here" in told(lambda: target(tokens))
    target.compiled = False
    assert torch.equal(target(tokens), wanted)
    target.compiled = "auto"
    with using("auto"), using(False):
        assert torch.equal(target(tokens), wanted)


def test_a_compiler_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = forgetful(monkeypatch, tmp_path)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert "could not be built" in told(build.build)
    monkeypatch.setattr(build, "command", lambda output: [str(tmp_path / "none")])
    assert "could not be built" in told(build.build)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_damaged_file_of_kernels_is_never_used(
    content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = forgetful(monkeypatch, tmp_path)
    path.write_bytes(content)
    assert build.library() is None
    with suppress(FormeryError):
        assert build.library(wait=True) is not None


CHILD = "from formery.parts.native import build; build.build(); print(build.library(wait=True) is not None)"


def test_two_programs_build_at_once_and_one_that_begins_does_not_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(build.__file__).parents[3]))
    path = tmp_path / "kernels" / build.target().name
    monkeypatch.setattr(build, "target", lambda: path)
    before = perf_counter()
    assert build.begin.__wrapped__() and perf_counter() - before < 1
    child = subprocess.run(
        [sys.executable, "-c", f"import torch; {CHILD}"], capture_output=True, text=True, timeout=300
    )
    assert child.stdout.strip() == "True", child.stderr
    while list(path.parent.glob(".kernels-*")) and perf_counter() - before < 300:
        sleep(0.1)
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_kernels_that_was_cut_short_ends_no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole, path = build.target().read_bytes(), tmp_path / "kernels" / build.target().name
    path.parent.mkdir()
    path.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(build.__file__).parents[3]))
    told = "import torch; from formery.parts.native import build; print(build.library())"
    child = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=300)
    assert child.returncode == 0 and child.stdout.strip() == "None"
