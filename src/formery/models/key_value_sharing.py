"""Decoders in which only some layers own keys and values: made anew, or merged from a trained one."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.models.rewrite import rewritten
from formery.parts import Attention, Linear
from formery.parts.shared_attention import OwningAttention, SharedAttention


def spaced(layers: int, owners: int) -> list[int]:
    """The owner of each layer where so many own keys and values, evenly spaced from the first on.

    Every other layer has the nearest owner below it.
    """
    if not 1 <= owners <= layers:
        raise FormeryError(f"of {layers} layers 1 to {layers} can own keys and values, not {owners}.")
    places = [number * layers // owners for number in range(owners)]
    return [max(place for place in places if place <= layer) for layer in range(layers)]


def shared(model: Decoder, owners: Sequence[int], key_value_heads: int | None = None) -> Decoder:
    """A model in which layer i attends to the keys and values of layer owners[i]; `rewritten` tells what it shares.

    The key and value maps of an owner are the mean over all layers that read them, and over neighbouring heads where
    `key_value_heads` are fewer than there were. Norms of keys and positions are the owner's. All else is as in `model`,
    so that the result is exact only where nothing is merged; otherwise it has to be trained a little. Raises
    FormeryError where the owners are no such map, or the layers' attentions cannot be merged.
    """
    if not isinstance(model, Decoder):
        raise FormeryError(
            f"only the layers of a Decoder can share keys and values, not those of {type(model).__name__}."
        )
    if any(isinstance(part, SharedAttention | OwningAttention) for part in model.modules()):
        raise FormeryError("the layers of this model share keys and values already: begin with the model before that.")
    parts = [part for part in model.layers.modules() if isinstance(part, Attention)]
    _check_map(owners, len(parts))
    groups = [[parts[reader] for reader, owner in enumerate(owners) if owner == number] for number in range(len(parts))]
    for group in filter(None, groups):
        _check_group(group, key_value_heads)
    owning: dict[int, OwningAttention] = {}

    def change(part: Attention, number: int) -> nn.Module:
        if owners[number] != number:
            return _reader(part, owning[owners[number]])
        group = groups[number]
        if len(group) == 1 and key_value_heads in (None, part.groups):
            return part
        made = _owner(part, group, part.groups if key_value_heads is None else key_value_heads)
        if isinstance(made, OwningAttention):
            owning[number] = made
        return made

    return rewritten(model, Attention, change)


def _check_map(owners: Sequence[int], layers: int) -> None:
    if len(owners) != layers:
        raise FormeryError(f"{len(owners)} owners are named for {layers} layers with attention: name one for each.")
    for layer, owner in enumerate(owners):
        if not 0 <= owner <= layer or owners[owner] != owner:
            raise FormeryError(
                f"layer {layer} cannot read the keys and values of layer {owner}: an owner is the layer itself or one "
                "below it, and reads its own."
            )


def _check_group(group: Sequence[Attention], key_value_heads: int | None) -> None:
    first = group[0]
    if any(type(part) is not Attention or hasattr(part, "replaced") for part in group):
        raise FormeryError("layers can share keys and values whose attention is as it was built; one was changed.")
    if any(not isinstance(one.weight, nn.Parameter) for part in group for one in (part.key, part.value)):
        raise FormeryError("keys and values of quantised weights cannot be merged: merge first, then quantise.")
    shapes = {(part.width, part.groups, part.dim, part.bias) for part in group}
    if len(shapes) > 1:
        raise FormeryError("layers of unlike attention (width, heads, head width, bias) cannot share keys and values.")
    if key_value_heads is not None and (key_value_heads < 1 or first.groups % key_value_heads):
        raise FormeryError(
            f"{first.groups} key and value heads cannot be averaged into {key_value_heads}: name a divisor."
        )


def _owner(part: Attention, group: Sequence[Attention], heads: int) -> Attention:
    given = {name: getattr(part, name) for name in part.parameters_of_constructor()}
    kind = OwningAttention if len(group) > 1 else Attention
    with torch.device("meta"):  # all maps are put in below
        made = kind(**{**given, "key_value_heads": heads})
    made.query, made.output = part.query, part.output
    made.key = _merged([one.key for one in group], heads, part.groups)
    made.value = _merged([one.value for one in group], heads, part.groups)
    return made.train(part.training)


def _reader(part: Attention, owner: OwningAttention) -> SharedAttention:
    names = [name for name in SharedAttention.parameters_of_constructor() if name not in ("owner", "position")]
    with torch.device("meta"):
        made = SharedAttention(owner, position=owner.position, **{name: getattr(part, name) for name in names})
    made.query, made.output = part.query, part.output
    return made.train(part.training)


@torch.no_grad()
def _merged(maps: Sequence[Linear], heads: int, before: int) -> Linear:
    """The mean of these maps, and of neighbouring heads of theirs: `before` heads become `heads`."""
    with torch.device("meta"):
        made = Linear(maps[0].inputs, maps[0].outputs * heads // before, maps[0].bias)
    for name in ("weight", "shift"):
        tensors = [cast(torch.Tensor | None, getattr(one, name)) for one in maps]
        given = [one for one in tensors if one is not None]
        if given:
            mean = torch.stack([*given]).mean(0)
            grouped = mean.unflatten(0, (heads, before // heads, -1)).mean(1).flatten(0, 1)
            setattr(made, name, nn.Parameter(grouped))
    return made
