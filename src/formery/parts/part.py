"""`Part`: a module that can say what it is made of, and be made again from that."""

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar, Self, cast

import torch
from torch import nn

from formery.errors import FormeryError, unknown

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


class Described:
    """Something that keeps every constructor argument as an attribute of the same name.

    That one convention is what lets it be described as plain data, compared and rebuilt, also after it was
    changed in place. Subclasses register themselves under their class name; only those can be rebuilt.
    """

    registry: ClassVar[dict[str, type["Described"]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        known = Described.registry.setdefault(cls.__name__, cls)
        if known.__module__ != cls.__module__:
            raise TypeError(f"{cls.__module__} and {known.__module__} both define a part named {cls.__name__}")
        Described.registry[cls.__name__] = cls

    @classmethod
    def parameters_of_constructor(cls) -> dict[str, inspect.Parameter]:
        """The constructor's parameters by name (none where it takes whatever comes, as nn.Module's own does)."""
        whatever = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {name: one for name, one in inspect.signature(cls).parameters.items() if one.kind not in whatever}

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that differ from their defaults, as they are now."""
        values = {name: getattr(self, name) for name in self.parameters_of_constructor()}
        defaults = {name: one.default for name, one in self.parameters_of_constructor().items()}
        return {name: value for name, value in values.items() if not _same(value, defaults[name])}

    def describe(self) -> dict[str, Plain]:
        """This thing as plain data from which `build` makes an equal one (weights aside).

        A part that occurs twice (tied embeddings, a shared position table) is described once; its later
        occurrences are `{"same_as": path of the first}`.
        """
        return cast(dict[str, Plain], _describe(self, "", {}))


class Part(Described, nn.Module):
    """The base of all modules: holds parameters only (whatever can be computed is computed in the pass)."""

    def replace(self, name: str, part: "Part") -> None:
        """Puts `part` in the place of the inner part `name`, so that `describe` and `build` know of it."""
        if not isinstance(getattr(self, name, None), nn.Module | nn.Parameter):
            raise FormeryError(f"{type(self).__name__} has no inner part {name!r} to replace.")
        if name in self._parameters:
            delattr(self, name)  # PyTorch would not have a part where a parameter is
        setattr(self, name, part)
        if name not in self.parameters_of_constructor():
            self.__dict__.setdefault("replaced", set()).add(name)

    def parameter_count(self) -> int:
        """How many numbers the weights hold, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def clone(self) -> Self:
        """A part of the same make with weights of its own."""
        twin = build(self.describe())
        assert isinstance(twin, Part)
        like = next(self.parameters(), torch.empty(0))
        twin.to(like if like.is_floating_point() else like.device)
        with torch.no_grad():
            for own, other in zip(twin.parameters(), self.parameters(), strict=True):
                own.copy_(other)
        return cast(Self, twin.train(self.training))

    def __repr__(self) -> str:
        return "\n".join(_tree(self, "", set()))


def build(data: Plain) -> Described:
    """Makes the part that `data` (from `describe`) tells of; weights are freshly initialised.

    Raises FormeryError for an unknown part, an unknown or missing argument, or an argument it cannot take.
    """
    try:
        made = _build(data, "", {})
    except RecursionError as error:
        raise FormeryError("the description of the model is nested too deeply to be one.") from error
    if not isinstance(made, Described):
        raise FormeryError(f"the description of the model is {type(data).__name__}, not a part.")
    return made


def _same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and not isinstance(value, nn.Module) and value == default)


def _describe(value: Any, path: str, seen: dict[int, str]) -> Plain:
    if isinstance(value, Described):
        if isinstance(value, Part):
            if id(value) in seen:
                return {"same_as": seen[id(value)]}
            seen[id(value)] = path
        replaced = sorted({*getattr(value, "replaced", ()), *_changed(value)})
        inner = {**value.arguments(), **{name: getattr(value, name) for name in replaced}}
        described = {name: _describe(one, _join(path, name), seen) for name, one in inner.items()}
        return {"part": type(value).__name__, **described, **({"replaced": [*replaced]} if replaced else {})}
    if isinstance(value, list | tuple | nn.ModuleList):
        return [_describe(one, _join(path, str(index)), seen) for index, one in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path}: {type(value).__name__} is no plain data")


def _changed(value: Described) -> list[str]:
    """The inner parts that the constructor makes itself and in which something was replaced."""
    if not isinstance(value, Part):
        return []
    given = value.parameters_of_constructor()
    made = [(name, one) for name, one in value.named_children() if isinstance(one, Part) and name not in given]
    return [name for name, one in made if any(hasattr(part, "replaced") for part in one.modules())]


def _build(data: Plain, path: str, made: dict[str, Any]) -> Any:
    if isinstance(data, list):
        return [_build(one, _join(path, str(index)), made) for index, one in enumerate(data)]
    if not isinstance(data, dict):
        return data
    if "same_as" in data:
        first = data["same_as"]
        if not isinstance(first, str) or first not in made:
            raise FormeryError(f"{path or 'the model'} refers to {first!r}, which is not there.")
        return made[first]
    name = data.get("part")
    if not isinstance(name, str) or name not in Described.registry:
        raise unknown("part", str(name), Described.registry)
    cls = Described.registry[name]
    replaced = data.get("replaced", [])
    if not isinstance(replaced, list) or not all(isinstance(one, str) and one in data for one in replaced):
        raise FormeryError(f"{path or name}: 'replaced' must name parts that are described beside it.")
    inner = {key: _build(one, _join(path, key), made) for key, one in data.items() if key not in ("part", "replaced")}
    arguments = {key: one for key, one in inner.items() if key not in replaced}
    try:
        _check(cls, arguments)
        built = cls(**arguments)
        for key in cast(list[str], replaced):
            cast(Part, built).replace(key, inner[key])
    except FormeryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise FormeryError(f"{path or 'the model'}: {name} cannot be made from that description ({reason}).") from error
    made[path] = built
    return built


def _check(cls: type[Described], arguments: dict[str, Any]) -> None:
    """TypeError where arguments are missing, unknown, or not of the types that the constructor names."""
    inspect.Signature(list(cls.parameters_of_constructor().values())).bind(**arguments)
    hints = typing.get_type_hints(cls.__init__)
    for name, value in arguments.items():
        if not _fits(value, hints.get(name, Any)):
            given = repr(value) if isinstance(value, int | float | str) else f"a {type(value).__name__}"
            raise TypeError(f"{name} cannot be {given}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`; what is neither a class, a union nor a sequence is not looked into."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin in (Sequence, list):
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _tree(part: nn.Module, label: str, seen: set[int]) -> Iterator[str]:
    """A line for each part; neighbours in a list that print alike are one line with a count."""
    name = type(part).__name__
    if id(part) in seen:
        yield f"{label}{name} (shared)"
        return
    seen.add(id(part))
    plain = part.arguments() if isinstance(part, Part) else {}
    facts = ", ".join(f"{key}={_short(value)}" for key, value in plain.items() if _is_fact(value))
    yield f"{label}{name}({facts})  {_count(part)}"
    for key, child in part.named_children():
        if not isinstance(child, nn.ModuleList):
            if isinstance(child, Part) and (any(True for _ in child.children()) or key in plain):
                yield from ("  " + line for line in _tree(child, f"{key}: ", seen))
            continue
        for _, alike in groupby(child, lambda one: "\n".join(_tree(one, "", set()))):
            one, *others = alike
            times = f"{len(others) + 1} × " if others else ""
            yield from ("  " + line for line in _tree(one, f"{key}: {times}", seen))


def _is_fact(value: Any) -> bool:
    return not isinstance(value, nn.Module) and not (
        isinstance(value, list) and value and isinstance(value[0], nn.Module)
    )


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(part: nn.Module) -> str:
    number = sum(one.numel() for one in part.parameters())
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"[{number / size:.3g} {unit}]"
    return f"[{number}]"


def normal(*shape: int, deviation: float) -> nn.Parameter:
    """A weight drawn from a normal distribution; on the meta device a shape alone (drawing there is slow)."""
    weight = torch.empty(*shape)
    return nn.Parameter(weight if weight.is_meta else weight.normal_(std=deviation))


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The element-wise function of that name (relu, gelu, gelu_tanh, silu, …: `_ACTIVATIONS` lists them)."""
    if name not in _ACTIVATIONS:
        raise unknown("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
