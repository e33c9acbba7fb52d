"""What a family of published models is, and which there are."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from formery.errors import FormeryError
from formery.models.hub.config import Config
from formery.models.hub.names import Names


@dataclass(frozen=True)
class Family:
    """A family of published models: how to build one of our parts, how to say it in their words, where weights lie.

    kind: its `model_type`. architectures: those that are read; the first is for a configuration that names none.
    build: the model that a configuration tells of. settings: the configuration of a model; it may fail, or say
    something wrong, for a model that is not of the family, since `build` must give that model back before it is used.
    names: our weights' places, or how to find them. base: the module that checkpoints without a head leave out.
    derived: tensors that may lie beside and can be computed, by pattern. copies: tensors that may lie beside as
    copies of others.
    """

    kind: str
    title: str
    architectures: tuple[str, ...]
    build: Callable[[Config], Any]
    settings: Callable[[Any], dict[str, Any]]
    names: Names | Callable[[Any], Names]
    base: str = ""
    derived: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    def places(self, model: Any) -> Names:
        """Where the model's weights lie."""
        return self.names(model) if callable(self.names) else self.names


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes a family known by its architectures."""
    for architecture in family.architectures:
        if FAMILIES.setdefault(architecture, family) is not family and FAMILIES[architecture].build != family.build:
            raise ValueError(f"two families read {architecture}")
    return family


def families() -> list[Family]:
    """Every family, by title."""
    rooms = importlib.import_module("formery.models.hub.families")
    for module in pkgutil.iter_modules(rooms.__path__):
        importlib.import_module(f"{rooms.__name__}.{module.name}")
    unique = {id(family): family for family in FAMILIES.values()}
    return sorted(unique.values(), key=lambda one: one.title)


def family_of(config: Config) -> Family:
    """The family that a configuration names; raises FormeryError, with those known, for any other."""
    known = families()
    if "auto_map" in config.data or "custom_pipelines" in config.data:
        raise FormeryError(
            f"{config.where} asks for code of its own (auto_map), and code from a checkpoint is never run; "
            f"take a version of the model that needs none, of one of the families {_titles()}."
        )
    if config.get("quantization_config") is not None:
        raise FormeryError(
            f"{config.where} tells of quantised weights, which are not read; take the version that is not quantised."
        )
    named, kind = config.get("architectures"), config.get("model_type")
    if named is None:
        found = next((one for one in known if one.kind == kind), None)
    else:
        architecture = named[0] if isinstance(named, list) and named else named
        found = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if found is None or (kind is not None and kind != found.kind):
        what = f"{(named[0] if isinstance(named, list) and named else named)!r:.100}" if named is not None else "none"
        raise FormeryError(
            f"{config.where} names the architecture {what} (model_type {kind!r:.100}), which is not known here; "
            f"known are {', '.join(sorted(FAMILIES))}."
        )
    return found


def _titles() -> str:
    return ", ".join(one.title for one in families())
