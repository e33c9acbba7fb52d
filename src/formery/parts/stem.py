"""The way into a model from sound: two convolutions over frames."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.parts.context import Context
from formery.parts.part import Part, normal


class Convolution(Part):
    """A convolution over time, three frames wide: `out[t] = Σ_k weight[:, :, k] · in[stride · t + k - 1] + shift`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.weight = normal(outputs, inputs, 3, deviation=(3 * inputs) ** -0.5)
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, frames: Float[Tensor, "batch inputs frame"]) -> Float[Tensor, "batch outputs time"]:
        return nn.functional.conv1d(frames, self.weight, self.shift, self.stride, padding=1)


class SpeechStem(Part):
    """`gelu(second(gelu(first(features)))) + positions`; `second` halves the frames (Radford et al., 2022).

    mels: bands of the features. length: how many vectors it makes, of 2 · length frames. positions: [length, width],
    sines and then cosines of geometrically growing wavelengths, stored since checkpoints hold them.
    """

    def __init__(self, mels: int, width: int, length: int):
        super().__init__()
        self.mels, self.width, self.length = mels, width, length
        self.first, self.second = Convolution(mels, width), Convolution(width, width, stride=2)
        half = width // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(10_000.0) / max(1, half - 1)))
        angle = torch.arange(length)[:, None] * frequencies
        table = torch.cat((angle.sin(), angle.cos(), torch.zeros(length, width - 2 * half)), 1)
        self.positions = nn.Parameter(table)

    def forward(
        self, features: Float[Tensor, "batch mel frame"], context: Context
    ) -> Float[Tensor, "batch time width"]:
        hidden = nn.functional.gelu(self.first(features.to(self.positions.dtype)))
        return nn.functional.gelu(self.second(hidden)).transpose(1, 2) + self.positions

    def places(self, features: Float[Tensor, "batch mel frame"]) -> Int[Tensor, "batch time"]:
        """The positions of the vectors that it makes."""
        return torch.arange(self.length, device=features.device).expand(len(features), -1)

    def collate(
        self, prompts: Sequence[Float[Tensor, "mel frame"]]
    ) -> tuple[Float[Tensor, "batch mel frame"], None]:
        """Features of recordings as one batch; raises FormeryError for those of another size."""
        wanted = (self.mels, 2 * self.length)
        for number, one in enumerate(prompts, 1):
            if not isinstance(one, Tensor) or tuple(one.shape) != wanted:
                found = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise FormeryError(
                    f"recording {number} should be features of {list(wanted)} (mel bands, frames), not {found}."
                )
        return torch.stack(list(prompts)), None
