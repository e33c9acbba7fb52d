"""MASFormer."""

from collections.abc import Sequence

from torch import nn

from formery.errors import FormeryError
from formery.models import Decoder
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.local import localised


def masformer(model: Decoder, full: Sequence[int], span: int) -> Decoder:
    """A twin of a decoder in which the layers `full` (from 0) attend as before, all others to the last `span` tokens.

    The weights are the model's own. Raises FormeryError where it has no such layers, or masks that cannot be narrowed.
    """
    if span < 1:
        raise FormeryError(f"a window shows at least the token itself, not {span}.")
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    if any(not 0 <= one < len(layers) for one in full):
        raise FormeryError(f"{list(full)} cannot be full: attention layers are 0 to {len(layers) - 1} here.")

    def change(part: Attention, number: int) -> nn.Module:
        try:
            return part if number in full else localised(part, span)
        except ValueError as error:
            raise FormeryError(f"layer {number} cannot have a window of its own: {error}.") from error

    return rewritten(model, Attention, change)
