"""Normalisation of each vector by its own statistics."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.native.mode import enabled
from formery.parts.part import Part


class LayerNorm(Part):
    """`(x - mean) / sqrt(variance + epsilon) * weight + shift` (Ba et al., 2016)."""

    def __init__(self, width: int, epsilon: float = 1e-5, bias: bool = True):
        super().__init__()
        self.width, self.epsilon = width, epsilon
        self.weight = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if bias else None

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added."""
        return self.shift is not None

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        return nn.functional.layer_norm(hidden, (self.width,), self.weight, self.shift, self.epsilon)


class AcrossHeads(Part):
    """`norm` of all heads of a token together, where queries or keys are otherwise normed head by head (OLMoE)."""

    def __init__(self, norm: Part):
        super().__init__()
        self.norm = norm

    def forward(self, heads: Float[Tensor, "batch time head dim"]) -> Float[Tensor, "batch time head dim"]:
        return self.norm(heads.flatten(-2)).view_as(heads)


class RMSNorm(Part):
    """`x / sqrt(mean(x²) + epsilon) * (offset + weight)` (Zhang and Sennrich, 2019).

    offset: 1 where the stored weight is a difference from one, as in Gemma; the weight then starts at zero.
    """

    def __init__(self, width: int, epsilon: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.width, self.epsilon, self.offset = width, epsilon, offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))

    def forward(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        library = enabled(hidden)
        if library is not None:
            # PyTorch's mean may sum in another order where there are fewer vectors.
            from formery.parts.native.stack import alone

            found = alone(library, hidden, self.width, lambda writer: writer.norm(self, 0, 1))
            if found is not None:
                return found
        weight = self.weight + self.offset if self.offset else self.weight
        return nn.functional.rms_norm(hidden, (self.width,), weight, self.epsilon)
