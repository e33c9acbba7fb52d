"""The way into a model from pixels: a picture as a row of patches."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.part import Part, normal


class Patches(Part):
    """`[first; map(patch_1); map(patch_2); …] + positions` (Dosovitskiy et al., 2021, equation 1).

    image_size, patch_size: height and width in pixels. A patch is flattened channel by channel, row by row.
    first: what stands in front for the whole picture. Patches go from left to right, then down.
    """

    def __init__(self, channels: int, image_size: Sequence[int], patch_size: Sequence[int], width: int):
        super().__init__()
        if any(whole < part or part < 1 for whole, part in zip(image_size, patch_size, strict=True)):
            raise ValueError(f"patches of {list(patch_size)} pixels do not fit an image of {list(image_size)}")
        self.channels, self.image_size, self.patch_size, self.width = channels, image_size, patch_size, width
        self.rows, self.columns = (whole // part for whole, part in zip(image_size, patch_size, strict=True))
        self.map = Linear(channels * patch_size[0] * patch_size[1], width, bias=True)
        self.first = normal(width, deviation=0.02)
        self.positions = normal(self.rows * self.columns + 1, width, deviation=0.02)

    def forward(
        self, pixels: Float[Tensor, "batch channel height width"], context: Context
    ) -> Float[Tensor, "batch place dim"]:
        high, wide = self.patch_size
        cut = pixels[:, :, : self.rows * high, : self.columns * wide]
        grid = cut.unflatten(3, (self.columns, wide)).unflatten(2, (self.rows, high))
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        first = self.first.expand(len(pixels), 1, -1)
        return torch.cat((first, self.map(patches.to(self.first.dtype))), 1) + self.positions

    def places(self, pixels: Float[Tensor, "batch channel height width"]) -> Int[Tensor, "batch place"]:
        """The positions of the vectors that it makes: one in front, then the patches."""
        return torch.arange(len(self.positions), device=pixels.device).expand(len(pixels), -1)

    def collate(
        self, prompts: Sequence[Float[Tensor, "channel height width"]]
    ) -> tuple[Float[Tensor, "batch channel height width"], None]:
        """Pictures as one batch; raises FormeryError for one of another size."""
        wanted = (self.channels, *self.image_size)
        for number, one in enumerate(prompts, 1):
            if not isinstance(one, Tensor) or tuple(one.shape) != wanted:
                found = list(one.shape) if isinstance(one, Tensor) else type(one).__name__
                raise FormeryError(
                    f"picture {number} should be a tensor of {list(wanted)} (channels, height, width), not {found}."
                )
        return torch.stack(list(prompts)), None
