"""The kernels of graphics cards: carried out by Triton's interpreter here, which needs no card."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from generation import decoder, model
from test_native_exact import alone, fed, mixed, stored, texts_of

from formery.models import Decoder
from formery.parts import Rotary
from formery.parts.native import build, using

numpy = pytest.importorskip("numpy")
triton = pytest.importorskip("triton")
if os.environ["TRITON_INTERPRET"] != "1" or build.compiler() is None:
    pytest.skip("the interpreter is switched off, or there is nothing to compare with", allow_module_level=True)

from triton import language  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from formery.parts.native.cards.program import Card, grouped  # noqa: E402

STORES = ("float32", "bfloat16", "int8", "int4")
CARD = Card(torch.device("cpu"))


def widened(one: Any) -> Any:
    """Numbers of 16 bits, which numpy does not know, as numbers of 32."""
    if one.dtype.scalar != language.bfloat16:
        return one.data
    return (one.data.astype(numpy.uint32) << 16).view(numpy.float32)


def dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
    product = numpy.matmul(widened(a), widened(b), dtype=numpy.float32)
    return interpreter.TensorHandle(product + acc.data, acc.dtype.scalar)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter multiplies numbers of 16 bits as if they were whole ones, and asks numpy 2.4 what it refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    with torch.inference_mode(), using(True):
        yield


def windowed() -> Decoder:
    return model("window")  # type: ignore[return-value]


CASES: list[tuple[Callable[[], Any], str]] = [
    *((lambda: decoder(Rotary(), width=40, key_value_heads=2, layers=1), store) for store in STORES),
    (mixed, "float32"),
    (windowed, "float32"),
    (lambda: model("translator"), "float32"),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("make", "store"), CASES)
def test_a_card_computes_what_a_processor_does_and_each_row_as_if_alone(
    make: Callable[[], Any], store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    target = stored(make(), store).eval()
    prompts, texts = texts_of(target, 3, [3, 5])
    wanted = [alone(target, prompt, text).float() for prompt, text in zip(prompts, texts, strict=True)]
    monkeypatch.setattr(build, "library", lambda wait=False: CARD)
    found = [alone(target, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    # On a processor vectors meet weights of 16 bits, and of codes, as numbers of 16 bits too.
    off = {"float32": 2e-5, "bfloat16": 0.2}.get(store, 2e-3)
    for one, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), exact, rtol=0, atol=off)
    for one, again in zip(found, fed(target, prompts, texts, 4), strict=True):
        assert torch.equal(one, again)


def test_steps_that_belong_together_are_launched_together() -> None:
    target = decoder(Rotary(), key_value_heads=2, layers=1).eval()
    from formery.parts.native.lower import lower

    [program] = lower(CARD, list(target.layers), None, 32)
    assert not isinstance(program, torch.nn.Module)
    groups = grouped([one for one in zip(program.steps, program.operands, strict=True) if one[0].kind != 3])
    # norm; query, key and value; both turned, and kept; attention; its map; norm; gate and up; down
    assert [len(group) for group in groups] == [1, 3, 3, 1, 1, 1, 2, 1]
