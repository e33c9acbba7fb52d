"""Whether two models compute the same: all that their parts were made with, and which weights they share."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from formery.parts import Attention, CrossAttention, Part
from formery.parts.part import Described

# What only training or a fresh start cares for.
_ASIDE = {"dropout", "deviation", "gain", "reach"}


def anatomy(model: Part) -> dict[str, Any]:
    """Every fact about the model's parts, by path; of each weight its shape, and the name it is first found under."""
    facts = dict(_facts(model, ""))
    first: dict[int, str] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        facts[f"the shape of {name}"] = list(one.shape)
        facts[f"the weight {name}"] = f"that of {first.setdefault(id(one), name)}"
    return facts


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What differs between two anatomies, in order: "layers.0 is Parallel, not Layer"."""
    absent = "nothing"
    pairs = [(path, ours.get(path, absent), theirs.get(path, absent)) for path in dict.fromkeys([*ours, *theirs])]
    return [f"{path or 'the whole'} is {own}, not {other}" for path, own, other in pairs if own != other]


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Described]]:
    """All parts of a model by path, and what they were made with: masks, scalings."""
    if isinstance(value, Described):
        yield path or "the whole", value
        inner = {f"{path}.{name}" if path else name: one for name, one in _arguments(value).items()}
    elif isinstance(value, list | tuple | nn.ModuleList):
        inner = {f"{path}.{place}": one for place, one in enumerate(value)}
    else:
        return
    for below, one in inner.items():
        yield from parts(one, below)


def _facts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Described):
        yield path, type(value).__name__
        for name, one in _arguments(value).items():
            yield from _facts(one, f"{path}.{name}" if path else name)
    elif isinstance(value, list | tuple | nn.ModuleList):
        yield f"the length of {path}", len(value)
        for place, one in enumerate(value):
            yield from _facts(one, f"{path}.{place}")
    else:
        yield path, value


def _arguments(part: Described) -> dict[str, Any]:
    names: Sequence[str] = [*part.parameters_of_constructor(), *sorted(getattr(part, "replaced", ()))]
    values = {name: getattr(part, name) for name in names if name not in _ASIDE}
    if isinstance(part, Attention | CrossAttention):
        values["key_value_heads"], values["head_width"] = part.groups, part.dim
        values["scale"] = part.dim**-0.5 if part.scale is None else part.scale
        values["output_bias"] = part.output.bias
    return values
