"""A published configuration, read with suspicion: each setting has a type and bounds, and what is not known is said."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from formery.errors import FormeryError, first_line

Value = TypeVar("Value")
REQUIRED: Any = object()
MOST = 2**31

# Published names of activations, and ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "linear": "identity",
}


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; raises FormeryError where there is none."""
    data = _parsed(path)
    if not isinstance(data, dict):
        raise FormeryError(f"{path} should hold a table of settings, not a {type(data).__name__}.")
    return data


def read_tables(path: Path) -> list[dict[str, Any]]:
    """The list of tables in a JSON file; raises FormeryError where there is none."""
    data = _parsed(path)
    if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
        raise FormeryError(f"{path} should hold a list of tables.")
    return data


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormeryError(f"{path} is not readable JSON ({first_line(error)}).") from error


class Config:
    """The settings of a checkpoint, and the names of the tensors that it holds.

    Several names may be given for one setting; where more than one is there, they must agree. A setting that is null is
    not there; a flag or a choice cannot be null.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "the configuration", holds: Collection[str] = ()):
        self.data, self.where, self.holds = data, where, holds

    @property
    def architecture(self) -> str | None:
        """The first architecture that is named."""
        named = self.data.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None

    def get(self, *names: str, default: Any = None) -> Any:
        """The setting as it stands, or the default; FormeryError where two of its names contradict each other."""
        told = [(name, self.data[name]) for name in names if self.data.get(name) is not None]
        for name, value in told[1:]:
            if value != told[0][1]:
                raise self.wrong(name, f"contradicts {told[0][0]}, which is another name for it")
        return told[0][1] if told else default

    def whole(self, *names: str, default: Any = REQUIRED, least: int = 1, most: int = MOST) -> Any:
        """A whole number within bounds."""
        value = self._given(names, default)
        if value is default:
            return default
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(names[0], f"should be a whole number from {least} to {most}")
        return value

    def layers(self, *names: str, default: Any = REQUIRED, least: int = 1) -> Any:
        """How many layers (or experts) there are: no more than the checkpoint has tensors."""
        value = self.whole(*names, default=default, least=least)
        if value is not None and value > len(self.holds):
            raise self.wrong(names[0], f"tells of more than the {len(self.holds)} tensors that are there")
        return value

    def real(self, *names: str, default: Any = REQUIRED, least: float = 0.0, most: float = 1e12) -> Any:
        """A number within bounds."""
        value = self._given(names, default)
        if value is default:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(names[0], f"should be a number from {least:g} to {most:g}")
        return float(value)

    def optional(self, name: str, default: Value) -> Value | None:
        """A number of the default's kind; None where the setting is null, the default where it is not there."""
        if name in self.data and self.data[name] is None:
            return None
        read = self.real if isinstance(default, float) else self.whole
        return read(name, default=default)

    def flag(self, *names: str, default: Any = REQUIRED) -> bool:
        """True or false."""
        value = self._given(names, REQUIRED if any(name in self.data for name in names) else default)
        if type(value) is not bool:
            raise self.wrong(names[0], "should be true or false")
        return value

    def choice(self, *names: str, options: Mapping[str, Value], default: str | None = None) -> Value:
        """What the named option stands for."""
        value = self._given(names, REQUIRED if any(name in self.data for name in names) or default is None else default)
        if not isinstance(value, str) or value not in options:
            raise self.wrong(names[0], f"is not known here; known are {', '.join(options)}")
        return options[value]

    def activation(self, *names: str, default: str | None = None) -> str:
        """Our name of an activation."""
        return self.choice(*names, options=ACTIVATIONS, default=default)

    def kinds(self, name: str, count: int, options: Iterable[str], default: list[str]) -> list[str]:
        """A kind for each of `count` layers."""
        value = self.get(name, default=default)
        known = list(options)
        if not isinstance(value, list) or len(value) != count or not all(one in known for one in value):
            raise self.wrong(name, f"should name one of {', '.join(known)} for each of {count} layers")
        return value

    def only(self, name: str, *values: Any) -> None:
        """Raises FormeryError where the setting is there and none of these values: what it asks for is not built."""
        value = self.data.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            known = ", ".join(json.dumps(one) for one in values) or "null"
            raise self.wrong(name, f"asks for something that is not known here (known: {known})")

    def replaced(self, **settings: Any) -> "Config":
        """The same with other settings."""
        return Config({**self.data, **settings}, self.where, self.holds)

    def inner(self, name: str) -> "Config | None":
        """The table under a setting, where there is one."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "should be a table")
        return Config(value, f"{self.where}, {name}", self.holds)

    def wrong(self, name: str, what: str) -> FormeryError:
        """The error for a setting."""
        shown = "is missing" if self.data.get(name) is None else f"{self.data.get(name)!r:.200}"
        return FormeryError(f"{self.where}: {name} ({shown}) {what}.")

    def _given(self, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names, default=default)
        if value is REQUIRED:
            raise FormeryError(f"{self.where} does not say {names[0]}, without which the model cannot be built.")
        return value
