"""Position-wise feed-forward networks."""

from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Context
from formery.parts.linear import Linear
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
        return self.down(function(self.activation)(self.up(hidden)))


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
        return self.down(function(self.activation)(self.gate(hidden)) * self.up(hidden))
