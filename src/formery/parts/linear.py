"""The one linear map that all parts use."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.codes import Codes
from formery.parts.kernels.product import product
from formery.parts.part import Part, normal


class Linear(Part):
    """`outputs = weight · inputs + bias`.

    weight: [outputs, inputs], drawn from a normal distribution of standard deviation gain / sqrt(inputs); codes of 8 or
    4 bits may take its place.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False, gain: float = 1.0):
        super().__init__()
        self.inputs, self.outputs, self.gain = inputs, outputs, gain
        self.weight: nn.Parameter | Codes = normal(outputs, inputs, deviation=gain * inputs**-0.5)
        self.shift = nn.Parameter(torch.zeros(outputs)) if bias else None

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return self.weight.dtype

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added."""
        return self.shift is not None

    def forward(self, hidden: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        return product(hidden, self.weight, self.shift)
