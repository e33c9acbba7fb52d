"""Position-wise feed-forward networks."""

from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.native.mode import enabled
from formery.parts.part import Part
from formery.parts.part import activation as function


class MLP(Part):
    """`down(activation(up(x)))` (Vaswani et al., 2017, equation 2)."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", bias: bool = False):
        super().__init__()
        self.width, self.hidden, self.activation, self.bias = width, hidden, activation, bias
        function(activation)  # an unknown name is told now, not in the first pass
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        found = _by_kernels(self, hidden)
        return self.down(function(self.activation)(self.up(hidden))) if found is None else found


class GatedMLP(Part):
    """`down(activation(gate(x)) * up(x))` (Shazeer, 2020: "GLU variants improve Transformer")."""

    def __init__(self, width: int, hidden: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.width, self.hidden, self.activation, self.bias = width, hidden, activation, bias
        function(activation)
        self.gate = Linear(width, hidden, bias)
        self.up = Linear(width, hidden, bias)
        self.down = Linear(hidden, width, bias, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        found = _by_kernels(self, hidden)
        if found is not None:
            return found
        return self.down(function(self.activation)(self.gate(hidden)) * self.up(hidden))


def _by_kernels(part: MLP | GatedMLP, hidden: Tensor) -> Tensor | None:
    """What the compiled kernels make of it, where they are used.

    PyTorch computes an activation of the last few of a tensor otherwise than of the rest.
    """
    library = enabled(hidden)
    if library is None:
        return None
    from formery.parts.native.lower import sublayer
    from formery.parts.native.stack import alone
    from formery.parts.native.writer import SET

    return alone(library, hidden, part.width, lambda writer: sublayer(part, writer, 0, 1, SET))
