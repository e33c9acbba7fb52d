"""Checkpoints: one safetensors file each, JSON data in its header, replaced as a whole or not at all.

`last.safetensors` holds all that a run needs to go on as if it had never stopped: weights, optimiser state
and the state of the random generators. `best.safetensors` holds the weights that evaluated best.
Nothing is pickled.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.files import atomic_write

LAST = "last.safetensors"
Tensors = dict[str, Tensor]


def weights(model: nn.Module) -> Tensors:
    """The parameters and the persistent buffers of a model, as "model/<name>"; shared ones appear once."""
    persistent = model.state_dict(keep_vars=True).keys()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {f"model/{name}": tensor.detach() for name, tensor in tensors.items() if name in persistent}


def write(path: Path, tensors: Tensors, data: dict[str, Any]) -> None:
    """Writes a checkpoint; raises FormeryError when the disk refuses: `path` is then as it was."""
    with atomic_write(path) as temporary:
        stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(stored, temporary, metadata={"formery": json.dumps(data)})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the data of a checkpoint; raises FormeryError when there is none or it is damaged."""
    with _opened(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["formery"])


def read_data(path: Path) -> dict[str, Any]:
    """The data alone; raises FormeryError as `read`."""
    with _opened(path) as file:
        data: dict[str, Any] = json.loads(file.metadata()["formery"])
    return data


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormeryError(
            f"{path} is no whole checkpoint ({error}); start anew in another folder."
        ) from error


def put_weights(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Copies `tensors`, read from `path`, into the model; raises FormeryError where they do not fit."""
    own = weights(model)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    refuse_other_shapes(own, tensors, path)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def refuse_other_shapes(own: Tensors, tensors: Tensors, path: Path) -> None:
    """Raises FormeryError where tensors read from `path` are not of the names and shapes that are wanted."""
    for name in sorted(own.keys() | tensors.keys()):
        here, there = (f"{tuple(side[name].shape)}" if name in side else "absent" for side in (own, tensors))
        if here != there:
            raise FormeryError(
                f"{path} belongs to another model: {name} is {there} there and {here} in this model."
            )


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Puts the weights of a checkpoint such as `Result.best_weights` into the model that was trained.

    Raises FormeryError when `path` is no whole checkpoint or belongs to a model of another shape.
    """
    tensors, _ = read(Path(path))
    put_weights(model, tensors, Path(path))


def save_weights(path: Path, model: nn.Module, data: dict[str, Any]) -> None:
    """Writes the weights alone."""
    write(path, weights(model), data)


def save_run(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> None:
    """Writes the weights, the optimiser's state and the random generators' state."""
    write(path, weights(model) | moments(model, optimizer) | random_state(), data)


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What the optimiser keeps of each parameter, as "optimizer/<key>/<name>"."""
    return {
        f"optimizer/{key}/{name}": tensor
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Has an AdamW that made no step yet allocate what it keeps, to be filled."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **state}


def random_state(rank: int = 0) -> Tensors:
    """The state of the random generators of that process, as "random/<device>"; of the first it has no number."""
    mark = f"-{rank}" if rank else ""
    tensors = {f"random/cpu{mark}": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"random/cuda{mark}"] = torch.cuda.get_rng_state()
    return tensors


def restore_run(path: Path, tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts back what `save_run` wrote to `path`; raises FormeryError where the model differs."""
    put_weights(model, tensors, path)
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition("/")
        if kind == "optimizer":
            key, _, name = rest.partition("/")
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
    restore_random(tensors)


def restore_random(tensors: Tensors, rank: int = 0) -> None:
    """Puts back the state of that process's random generators, as far as `tensors` has it."""
    mark = f"-{rank}" if rank else ""
    if f"random/cpu{mark}" in tensors:
        torch.set_rng_state(tensors[f"random/cpu{mark}"])
    if torch.cuda.is_available() and f"random/cuda{mark}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random/cuda{mark}"])
