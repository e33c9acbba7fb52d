"""The stored weights, and the one change that two peers ask for."""

from torch import Tensor

from bench.shapes import Shape


def stored(shape: Shape) -> dict[str, Tensor]:
    """Every tensor by the name that transformers gives it."""
    from safetensors.torch import load_file

    return load_file(shape.folder() / "model.safetensors")


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key map in another order, for programs whose rotary pairs lie side by side."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
