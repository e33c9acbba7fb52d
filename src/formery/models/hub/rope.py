"""Rotary positions as published configurations tell of them, in their older and their newer form."""

import math
from typing import Any

from formery.errors import FormeryError
from formery.models.hub.config import Config
from formery.parts import Attention, LinearScaling, Llama3Scaling, Position, Rotary, YarnScaling
from formery.parts.position import Scaling

# What counts of the settings beside the table; the table goes before them.
_BESIDE = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings")


def rotary(config: Config, base: float = 10_000.0) -> Rotary:
    """The positions; base: the family's default.

    Raises FormeryError for a scaling that is not known, and for settings that contradict each other.
    """
    tables = (config.inner("rope_scaling"), config.inner("rope_parameters"))
    table = next((one for one in tables if one is not None and one.data), None)
    given = {} if table is None else table.data
    if any(isinstance(value, dict) for value in given.values()):
        raise config.wrong("rope_parameters", "has a table for each kind of layer, which is not known here")
    if (trained := given.get("original_max_position_embeddings")) is not None:
        config.only("original_max_position_embeddings", trained)
    beside = {name: config.data[name] for name in _BESIDE if name in config.data}
    told = Config({**beside, **given}, config.where if table is None else table.where)
    return Rotary(
        told.real("rope_theta", default=base, least=1e-6),
        told.real("partial_rotary_factor", default=1.0, most=1.0),
        scaling(told) if given else None,
    )


def fitting(config: Config, attention: Attention, partly: bool = False) -> Attention:
    """The attention; FormeryError where its rotary positions cannot turn its heads as the settings say.

    partly: whether models of the family may turn a part of each head only.
    """
    position = attention.position
    assert isinstance(position, Rotary)
    turned, scaled, wrong = int(attention.dim * position.fraction), position.scaling, ""
    if turned != attention.dim and not partly:
        wrong = "models of this family turn whole heads"
    elif turned % 2:
        wrong = "entries are turned in pairs"
    elif isinstance(scaled, YarnScaling) and (turned < 4 or position.base <= 1):
        wrong = "yarn needs two pairs at least, and a rope_theta above 1"
    elif isinstance(scaled, Llama3Scaling) and scaled.low >= scaled.high:
        wrong = "high_freq_factor should be above low_freq_factor"
    if wrong:
        raise FormeryError(
            f"{config.where} tells of rotary positions for {turned} of a head's {attention.dim} entries that cannot "
            f"be: {wrong}."
        )
    return attention


def scaling(told: Config) -> Scaling | None:
    """How the frequencies are changed, if they are."""
    kind = told.get("rope_type", "type", default="default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise told.wrong("rope_type", f"({kind!r:.100}) is not known here; known are default, linear, llama3, yarn")
    factor = told.real("factor", least=1e-3)
    if kind == "linear":
        return LinearScaling(factor)
    name = "original_max_position_embeddings"
    trained = told.whole("max_position_embeddings" if told.get(name) is None else name)
    if kind == "yarn":
        return yarn(told, factor, trained)
    low, high = told.real("low_freq_factor", least=1e-3), told.real("high_freq_factor", least=1e-3)
    return Llama3Scaling(factor, low, high, trained)


def yarn(told: Config, factor: float, trained: int) -> YarnScaling:
    """YaRN with the magnitude that is told, or that two factors of it make."""
    attention = told.real("attention_factor", default=None, least=1e-6)
    one, all_ = told.real("mscale", default=0.0), told.real("mscale_all_dim", default=0.0)
    if attention is None and one and all_ and factor > 1:
        attention = (0.1 * one * math.log(factor) + 1.0) / (0.1 * all_ * math.log(factor) + 1.0)
    fast, slow = told.real("beta_fast", default=32.0, least=1e-6), told.real("beta_slow", default=1.0, least=1e-6)
    return YarnScaling(factor, trained, fast, slow, attention, told.flag("truncate", default=True))


def rope_settings(position: Position | None) -> dict[str, Any]:
    """The settings from which `rotary` makes this position, in both forms."""
    assert isinstance(position, Rotary)
    table: dict[str, Any] = {"rope_type": "default"}
    if isinstance(position.scaling, LinearScaling):
        table = {"rope_type": "linear", "factor": position.scaling.factor}
    elif isinstance(position.scaling, Llama3Scaling):
        table = {
            "rope_type": "llama3",
            "factor": position.scaling.factor,
            "low_freq_factor": position.scaling.low,
            "high_freq_factor": position.scaling.high,
            "original_max_position_embeddings": position.scaling.original_length,
        }
    elif isinstance(position.scaling, YarnScaling):
        table = {
            "rope_type": "yarn",
            "factor": position.scaling.factor,
            "original_max_position_embeddings": position.scaling.original_length,
            "beta_fast": position.scaling.fast,
            "beta_slow": position.scaling.slow,
            "truncate": position.scaling.truncate,
            **({} if position.scaling.attention is None else {"attention_factor": position.scaling.attention}),
        }
    older: dict[str, Any] = {"rope_scaling": table} if position.scaling is not None else {}
    newer = {**table, "rope_theta": position.base}
    if position.fraction != 1.0:
        newer["partial_rotary_factor"] = older["partial_rotary_factor"] = position.fraction
    return {"rope_theta": position.base, **older, "rope_parameters": newer}
