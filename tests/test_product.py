"""Products with weights: the packed way equals the plain one, and a packing is what it says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.generate import generate
from formery.models.compose import language_model
from formery.parts import Linear, Packing
from formery.parts.kernels.product import available, product
from formery.parts.native import using

needs_onednn = pytest.mark.skipif(not available(), reason="this build of PyTorch has no oneDNN product")


@needs_onednn
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 90),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_packed_equals_float64(rows: int, inputs: int, outputs: int, biased: bool, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    shift = torch.randn(outputs) if biased else None
    exact = hidden.double() @ weight.double().T + (0 if shift is None else shift.double())
    with torch.inference_mode(), using(False), Packing() as packing:
        found = product(hidden, weight, shift)
        assert bool(packing.copies) == (rows > 1)
    torch.testing.assert_close(found.double(), exact, atol=2e-4, rtol=1e-4)


@needs_onednn
def test_a_packing_ends_with_its_block_and_is_not_used_for_gradients() -> None:
    part = Linear(8, 8)
    hidden = torch.randn(3, 8)
    packing = Packing()
    with packing:
        part(hidden).sum().backward()
    assert part.weight.grad is not None and not packing.copies
    with torch.no_grad(), using(False):
        part(hidden)
        assert not packing.copies
        with packing:
            part(hidden)
    assert len(packing.copies) == 1


def test_weights_changed_between_two_generations_count() -> None:
    """Also when they are changed behind autograd's back, as optimizers and editors do."""
    torch.manual_seed(0)
    model = language_model(50, width=32, layers=2, heads=4, key_value_heads=2, hidden=64, max_length=64).eval()
    first = generate(model, [[1, 2, 3]], max_new_tokens=20)[0].tokens
    for parameter in model.parameters():
        parameter.data.normal_()
    second = generate(model, [[1, 2, 3]], max_new_tokens=20)[0].tokens
    assert second == generate(model.clone().eval(), [[1, 2, 3]], max_new_tokens=20)[0].tokens
    assert first != second


def test_streams_that_take_turns_do_not_disturb_each_other() -> None:
    from formery.generate import stream

    torch.manual_seed(0)
    models = [
        language_model(50, width=32, layers=2, heads=4, key_value_heads=2, hidden=64, max_length=64).eval()
        for _ in range(2)
    ]
    alone = [generate(model, [[1, 2, 3]], max_new_tokens=20)[0].tokens for model in models]
    together: list[list[int]] = [[], []]
    for events in zip(*(stream(model, [1, 2, 3], max_new_tokens=20) for model in models), strict=True):
        for tokens, event in zip(together, events, strict=True):
            tokens += event.emitted
    assert together == alone
