"""A training by many processes: PyTorch's FSDP2 keeps a part of each parameter in each, and gathers it when it is used.

Each process learns from its own rows of every batch, so that a step is the step of one process, and any number of
processes can go on with what any other number began.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from formery.errors import FormeryError
from formery.train import checkpoint
from formery.train.alone import Alone, layers, newest, recompute
from formery.train.layout import layout
from formery.train.objective import IGNORED, Batch, Objective, target_count, targets
from formery.train.plan import Plan
from formery.train.sharded_checkpoint import Saver, load
from formery.train.sharded_checkpoint import read_data as data_of_parts
from formery.train.tensor_parallel import share_layers
from formery.train.world import said_plainly, world

STREAMS = 1_000_003  # between the seeds of two processes


class Objectified(nn.Module):
    """A model and its objective as one module: FSDP gathers parameters for modules that are called."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        return self.objective(self.model, batch)


class Together(Alone):
    """A run whose model is spread over all processes of the world.

    module: as the model, its parameters in parts. The model itself holds none meanwhile, but in the leading process
    while it is evaluated; afterwards it is whole in every process.
    """

    def __init__(self, model: nn.Module, objective: Objective, plan: Plan) -> None:
        self.model, self.objective, self.plan, self.world = model, objective, plan, world()
        layout().check(self.world.size)
        groups = (self.world.size // layout().tensor_parallel, layout().tensor_parallel)
        self.mesh = init_device_mesh(self.world.device.type, groups, mesh_dim_names=("rows", "heads"))
        if layout().tensor_parallel > 1:
            self.mesh._flatten("all")  # sums over both take one message then
        self.places = _places(model)
        self.module = _same_weights(model)
        share_layers(self.module, self.mesh["heads"])
        if layout().recompute:
            recompute(self.module)
        for layer in layers(self.module):
            if plan.compile:
                layer.compile()
            fully_shard(layer, mesh=self.mesh["rows"])
        self.step = fully_shard(Objectified(self.module, objective), mesh=self.mesh["rows"])
        self._put({})
        self.saver: Saver | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def row_group(self) -> int:
        """Which rows of a batch this process learns from; those that share layers have the same."""
        return self.mesh["rows"].get_local_rank()

    @property
    def seed(self) -> int:
        return self.plan.seed + STREAMS * self.row_group

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        return cast(Tensor, cast(nn.Module, self.step)(batch))

    def rows(self, batch: Batch, targets: int) -> tuple[Batch, float]:
        """Every n-th row of n processes; one that has no target among its own computes a row for nothing.

        Raises FormeryError where the batch does not consist of rows.
        """
        mine, count = part(batch, self.row_group, self.mesh["rows"].size())
        # FSDP takes the mean over the processes that have other rows.
        return mine, count / max(1, targets) * self.mesh["rows"].size()

    def clip(self, most: float) -> float:
        meshes: dict[DeviceMesh, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                meshes[cast(DTensor, parameter).device_mesh].append(parameter)
        norms = [
            cast(DTensor, nn.utils.get_total_norm([one.grad for one in alike if one.grad is not None])).full_tensor()
            for alike in meshes.values()
        ]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if math.isfinite(most):
            for alike in meshes.values():
                nn.utils.clip_grads_with_norm_(alike, most, total)
        return float(total)

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        with said_plainly():
            self._put(self._gathered(self.world.leads))
        try:
            yield self.model if self.world.leads else None
        finally:
            self._put({})

    def save(self, out: Path, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> None:
        if self.saver is None:
            self.saver = Saver(out, dist.new_group(backend="gloo"), self.world.leads)
        tensors = checkpoint.weights(self.module) | checkpoint.moments(self.module, optimizer)
        with said_plainly():
            self.saver.begin(tensors | checkpoint.random_state(self.world.rank), data)

    def restore(self, out: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        if (kept := newest(out)) is None:
            return None
        data, read = kept
        self.plan.refuse_change_from(data["plan"])
        checkpoint.begin_moments(optimizer)
        own = checkpoint.weights(self.module) | checkpoint.moments(self.module, optimizer)
        random = checkpoint.random_state(self.world.rank)
        if data == data_of_parts(out):
            load(out, own | random)
        else:
            _fill(own, read(), out / checkpoint.LAST)
        if data.get("processes") == self.world.size:
            checkpoint.restore_random(random, self.world.rank)
        else:
            torch.manual_seed(self.seed + data["step"])
        return data

    def finish(self) -> None:
        with said_plainly():
            if self.saver is not None:
                self.saver.wait()
            self._put(self._gathered(keep=True))
            dist.barrier()

    @torch.no_grad()
    def _gathered(self, keep: bool) -> dict[str, Tensor]:
        """The whole parameters by name; all processes take part, those that don't keep them give nothing."""
        found = {}
        for name, parameter in self.module.named_parameters():
            full = cast(DTensor, parameter).full_tensor()
            if keep:
                found[name] = full
        return found

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Gives the model these parameters, and ones without storage where there are none."""
        for name, (parameter, holders) in self.places.items():
            tensor = tensors[name] if name in tensors else torch.empty_like(parameter, device="meta")
            new = nn.Parameter(tensor, parameter.requires_grad)
            for module, key in holders:
                module._parameters[key] = new
            empty = torch.empty_like(parameter, device="meta", requires_grad=parameter.requires_grad)
            self.places[name] = (empty, holders)


def part(batch: Batch, rank: int, size: int) -> tuple[Batch, int]:
    """Every `size`-th row of a batch from that of `rank` on, and how many targets they have.

    Where they have none it is a row that has some, and the count is 0: all processes have to compute something.
    """
    rows = {len(tensor) for tensor in batch.values() if tensor.dim()}
    if len(rows) != 1:
        raise FormeryError(
            f"a batch whose tensors have {' and '.join(map(str, sorted(rows))) or 'no'} rows cannot be spread over "
            f"{size} processes; train it with one."
        )
    if rank < rows.pop():
        mine = {name: tensor[rank::size] if tensor.dim() else tensor for name, tensor in batch.items()}
        if count := target_count(mine):
            return mine, count
    full = int((targets(batch) != IGNORED).sum(1).argmax()) if "tokens" in batch else 0
    return {name: tensor[full : full + 1] if tensor.dim() else tensor for name, tensor in batch.items()}, 0


def _places(model: nn.Module) -> dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]]:
    """Each parameter by its first name, and all the modules that hold it, with the name that it has there."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[Tensor, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(names[id(parameter)], (parameter, []))[1].append((module, key))
    return found


def _same_weights(model: nn.Module) -> nn.Module:
    """A model of the same parameters, not of copies of them, whose modules are others."""
    kept: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    tokenizer = getattr(model, "tokenizer", None)
    return copy.deepcopy(model, kept | {id(tokenizer): tokenizer})


@torch.no_grad()
def _fill(own: checkpoint.Tensors, tensors: checkpoint.Tensors, path: Path) -> None:
    """Copies each process's part of whole tensors; raises FormeryError where they do not fit."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random/")}
    checkpoint.refuse_other_shapes(own, tensors, path)
    for name, tensor in tensors.items():
        mine = own[name]
        if isinstance(mine, DTensor):
            tensor = distribute_tensor(tensor.to(mine.device), mine.device_mesh, mine.placements)
        mine.copy_(tensor)
