"""Weights of 8 or 4 bits: whole numbers with scales, in the place of a table of floating-point weights."""

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.parts.native.mode import enabled
from formery.parts.part import Part

PANEL = 16  # outputs that lie side by side
GROUP = 32  # inputs of one output that share a scale, where weights have 4 bits
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's largest weight: which of them the codes reach


class Codes(Part):
    """`weight[o, i] = scale[o] · code[o, i]` with 8 bits (a scale for each output), or with 4 and scales for groups.

    codes: one byte each and stored with 128 added, or two in a byte and with 8 added; laid out in panels of 16 outputs,
    [panel, inputs / 4, 16, 4], or [panel, group, 4, 16, 4] with the inputs 8j … 8j+3 of a group in the lower half of
    part j and 8j+4 … 8j+7 in the upper one. scales: the bits of numbers of 32 bits, or of 16 where codes have 4, kept
    as whole numbers so that no change of type touches them. Outputs and inputs are filled up with zeros.
    """

    def __init__(self, outputs: int, inputs: int, bits: int = 8):
        super().__init__()
        if bits not in (4, 8):
            raise ValueError(f"weights can have 8 or 4 bits, not {bits}")
        self.outputs, self.inputs, self.bits = outputs, inputs, bits
        panels, groups = -(-outputs // PANEL), -(-inputs // GROUP)
        if bits == 8:
            codes = torch.full((panels, groups * GROUP // 4, PANEL, 4), 128, dtype=torch.uint8)
            scales = torch.zeros(panels * PANEL, dtype=torch.int32)
        else:
            codes = torch.full((panels, groups, 4, PANEL, 4), 0x88, dtype=torch.uint8)
            scales = torch.zeros(panels, groups, PANEL, dtype=torch.int16)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    @classmethod
    def of(cls, weight: Float[Tensor, "outputs inputs"], bits: int = 8) -> "Codes":
        """The codes nearest to these weights; a group's scale is the one with the least squared error."""
        with weight.device:
            return cls._of(weight, bits)

    @classmethod
    def _of(cls, weight: Float[Tensor, "outputs inputs"], bits: int) -> "Codes":
        made = cls(weight.shape[0], weight.shape[1], bits)
        panels, groups = -(-made.outputs // PANEL), -(-made.inputs // GROUP)
        full = torch.zeros(panels * PANEL, groups * GROUP)
        full[: made.outputs, : made.inputs] = weight.detach().float()
        if bits == 8:
            scale = full.abs().amax(1, keepdim=True) / 127
            whole = (full / scale.clamp(min=1e-30)).round().clamp(-127, 127)
            codes = (whole + 128).to(torch.uint8)
            made.codes.data = codes.view(panels, PANEL, -1, 4).transpose(1, 2).contiguous()
            made.scales.data = scale.flatten().contiguous().view(torch.int32)
            return made
        grouped = full.view(panels * PANEL, groups, GROUP)
        scale = _best_scale(grouped)
        used = torch.where(scale == 0, torch.ones_like(scale), scale).float()
        whole = (grouped / used[..., None]).round().clamp(-8, 7)
        codes = (whole + 8).to(torch.uint8).view(panels, PANEL, groups, 4, 2, 4).permute(0, 2, 3, 1, 4, 5)
        made.codes.data = (codes[..., 0, :] | codes[..., 1, :] << 4).contiguous()
        made.scales.data = scale.view(torch.int16).view(panels, PANEL, groups).transpose(1, 2).contiguous()
        return made

    @property
    def shape(self) -> torch.Size:
        """That of the weights."""
        return torch.Size((self.outputs, self.inputs))

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def rows(self, index: Int[Tensor, "..."]) -> Float[Tensor, "... inputs"]:
        """The weights of these outputs."""
        library = enabled(self.codes, index)
        if isinstance(library, ctypes.CDLL):
            self._check(index)
            index = index.long().contiguous()
            found = torch.empty(*index.shape, self.inputs, dtype=torch.float32)
            places = [one.data_ptr() for one in (self.codes, self.scales, index, found)]
            library.formery_weights(*places[:2], self.bits, self.inputs, places[2], index.numel(), places[3])
            return found
        panel, place = index // PANEL, index % PANEL
        if self.bits == 8:
            whole = self.codes[panel, :, place].flatten(-2).int() - 128
            weights = whole * self.scales.view(torch.float32)[index][..., None]
        else:
            both = self.codes[panel, :, :, place]
            whole = torch.stack((both & 15, both >> 4), -2).flatten(-3).int() - 8
            weights = (whole * self.scales.view(torch.float16)[panel, :, place].float()[..., None]).flatten(-2)
        return weights[..., : self.inputs]

    def _check(self, index: Tensor) -> None:
        """Raises IndexError, as tensors do, where an output is asked for that is not there."""
        if index.numel():
            least, most = (int(one) for one in index.aminmax())
            if least < 0 or most >= self.outputs:
                raise IndexError(f"output {most if least >= 0 else least} is asked for, of {self.outputs}")

    def weights(self) -> Float[Tensor, "outputs inputs"]:
        """All weights, as they are computed with."""
        return self.rows(torch.arange(self.outputs, device=self.codes.device))


def _best_scale(grouped: Float[Tensor, "outputs groups group"]) -> Float[Tensor, "outputs groups"]:
    """For each group the scale, of those that reach a share of its largest weight, with the least squared error.

    The largest weight gets the code -8 on its own side, since there is one more code there.
    """
    place = grouped.abs().argmax(-1, keepdim=True)
    largest = grouped.gather(-1, place).squeeze(-1)
    best = torch.zeros(grouped.shape[:-1], dtype=torch.float16)
    least = torch.full(grouped.shape[:-1], torch.inf)
    for share in SHARES:
        scale = (largest * (share / -8)).half()
        used = torch.where(scale == 0, torch.ones_like(scale), scale).float()[..., None]
        error = ((grouped / used).round().clamp(-8, 7) * scale.float()[..., None] - grouped).square().sum(-1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best
