"""Layers whose heads and hidden units lie in several processes, by DTensor's parallel styles.

The maps into heads and hidden units are cut by their outputs, those out of them by their inputs, so that a layer talks
once for its attention and once for its feed-forward network (Shoeybi et al., 2019, "Megatron-LM"). Whatever else a
layer has is whole in each of these processes.
"""

from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)  # fmt: skip
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from formery.errors import FormeryError
from formery.parts import MLP, Attention, CrossAttention, GatedMLP, Rotary
from formery.parts.linear import Linear


class Cut(ParallelStyle):
    """A map of which each process has a part of the weight. Vectors go in and come out as plain tensors.

    by_outputs: cut by its outputs, and read by whole vectors; otherwise by its inputs, and its results are summed.
    """

    def __init__(self, by_outputs: bool) -> None:
        super().__init__()
        self.by_outputs = by_outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        weight: Placement = Shard(0) if self.by_outputs else Shard(1)
        shift: Placement = Shard(0) if self.by_outputs else Replicate()
        given: Placement = Replicate() if self.by_outputs else Shard(-1)
        wanted: Placement = Shard(-1) if self.by_outputs else Replicate()

        def cut(_: str, part: nn.Module, mesh: DeviceMesh) -> None:
            for name, parameter in list(part.named_parameters(recurse=False)):
                placement = weight if parameter.dim() == 2 else shift
                own = nn.Parameter(distribute_tensor(parameter, mesh, [placement]), parameter.requires_grad)
                part.register_parameter(name, own)

        def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return (DTensor.from_local(inputs[0], mesh, [given], run_check=False), *inputs[1:])

        def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return cast(DTensor, output).redistribute(placements=[wanted]).to_local()

        return distribute_module(module, device_mesh, cut, enter, leave)


def share_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts the attention and the feed-forward networks of a model, in place, over the processes of a mesh.

    Raises FormeryError for a part whose heads or hidden units cannot be shared evenly.
    """
    if mesh.size() == 1:
        return
    for name, part in model.named_modules():
        if isinstance(part, Attention | CrossAttention):
            _refuse_uneven(name, part, mesh.size())
            parallelize_module(part, mesh, {one: Cut(one != "output") for one in ("query", "key", "value", "output")})
            part.heads, part.groups = part.heads // mesh.size(), part.groups // mesh.size()
        elif isinstance(part, MLP | GatedMLP):
            if part.hidden % mesh.size():
                raise FormeryError(f"{part.hidden} hidden units of {name} cannot be shared by {mesh.size()} processes.")
            maps = [one for one, inner in part.named_children() if isinstance(inner, Linear)]
            parallelize_module(part, mesh, {one: Cut(one != "down") for one in maps})


def _refuse_uneven(name: str, part: Attention | CrossAttention, size: int) -> None:
    if part.heads % size or part.groups % size:
        raise FormeryError(
            f"{part.heads} heads and {part.groups} key-value heads of {name} cannot be shared by {size} processes."
        )
    if isinstance(part, Attention):
        others = [one for one in (part.position, part.query_norm, part.key_norm) if one is not None]
        for other in others:
            if not isinstance(other, Rotary):
                raise FormeryError(
                    f"the heads of {name} cannot be shared by processes: its {type(other).__name__} knows them all."
                )
