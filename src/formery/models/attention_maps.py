"""Whom each query looks at, in every part of a decoder that attends: recorded in a pass from scratch, or cut off."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from formery.errors import FormeryError
from formery.models.decoder import Decoder
from formery.models.rewrite import twin
from formery.parts import Linear, Part
from formery.parts.codes import Codes
from formery.parts.kernels import kernel
from formery.parts.native import using

Head = tuple[int, int]
"""A part that attends, counted from 0 in the order of the layers, and one of its heads."""
Maps = list[Float[Tensor, "batch head query key"]]


def attending(model: nn.Module) -> list[Part]:
    """The parts that attend, each once, in the order of the layers: those with heads and a map for what they mix.

    Raises FormeryError where the model is no decoder, or has no such part.
    """
    if not isinstance(model, Decoder):
        raise FormeryError(f"heads are looked at in a decoder, which a {type(model).__name__} is not.")
    found = [part for part in model.layers.modules() if isinstance(part, Part) and _has_heads(part)]
    if not found:
        raise FormeryError("this model has no part with attention heads.")
    return found


def heads(model: nn.Module) -> list[Head]:
    """All heads of a decoder."""
    return [(number, head) for number, part in enumerate(attending(model)) for head in range(cast(int, part.heads))]


@torch.no_grad()
def attention_maps(
    model: Decoder, tokens: Int[Tensor, "batch time"], places: Sequence[int] | None = None
) -> tuple[Maps, Float[Tensor, "batch query vocabulary"]]:
    """The attention of each part that attends, at the queries in `places` (all unless given), and the logits there.

    Every part that attends by `formery.parts.kernels.attend` is recorded; weights that several runs of a shared part
    give are averaged. Raises FormeryError where a part attends in a way of its own.
    """
    parts = attending(model)
    chosen = torch.arange(tokens.shape[1]) if places is None else torch.tensor(places, dtype=torch.long)
    found: dict[nn.Module, Maps] = {part: [] for part in parts}
    with _listening(parts, lambda part, weights: found[part].append(weights[:, :, chosen])), kernel("eager"):
        hidden = model.hidden(tokens)
    silent = [type(part).__name__ for part in parts if not found[part]]
    if silent:
        raise FormeryError(f"{silent[0]} attends in a way of its own, which cannot be recorded.")
    return [torch.stack(found[part]).mean(0) for part in parts], model.logits(hidden[:, chosen])


def without(model: Decoder, cut: Iterable[Head]) -> Decoder:
    """A twin of `model` in which these heads say nothing: exact, and a model like any other.

    The columns of the output map that read a head are zero; all other weights are shared with `model`. Raises
    FormeryError for a head that is not there.
    """
    chosen = set(cut)
    for number, head in sorted(chosen - set(heads(model))):
        raise FormeryError(f"there is no head {head} in part {number}; `heads(model)` lists all.")
    made = twin(model)
    for number, part in enumerate(attending(made)):
        own = sorted(head for layer, head in chosen if layer == number)
        if own:
            part.replace("output", _silenced(cast(Linear, part.output), cast(int, part.heads), own))
    return made


def _has_heads(part: Part) -> bool:
    number, output = getattr(part, "heads", None), getattr(part, "output", None)
    return isinstance(number, int) and isinstance(output, Linear) and output.inputs % number == 0


def _silenced(output: Linear, number: int, own: list[int]) -> Linear:
    """The map with zeros where it reads these of `number` heads."""
    weight = output.weight.weights() if isinstance(output.weight, Codes) else output.weight
    new = weight.detach().clone()
    new.view(output.outputs, number, -1)[:, own] = 0
    made = Linear(output.inputs, output.outputs, output.bias, output.gain)
    made.weight, made.shift = nn.Parameter(new), output.shift
    return made.train(output.training)


@contextmanager
def _listening(parts: Sequence[nn.Module], hear: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Has `hear(part, weights)` called for each softmax of scores that these parts compute in this block."""
    running: list[nn.Module] = []
    hooks = []

    def begin(part: nn.Module, inputs: Any) -> None:
        running.append(part)

    def end(part: nn.Module, inputs: Any, made: Any) -> None:
        running.pop()

    for part in parts:
        hooks += [part.register_forward_pre_hook(begin), part.register_forward_hook(end)]
    try:
        with _Softmaxes(running, hear), using(False):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Softmaxes(TorchFunctionMode):
    """Hears what `Tensor.softmax` makes of scores while a part runs: the eager reference calls it just once."""

    def __init__(self, running: list[nn.Module], hear: Callable[[nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.running, self.hear = running, hear

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        if self.running and function is Tensor.softmax and made.ndim == 4:
            self.hear(self.running[-1], made)
        return made
