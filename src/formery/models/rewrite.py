"""Rewrites: a model made from another, with some parts changed and all other weights shared with it."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from formery.errors import FormeryError
from formery.parts import Part

Whole = TypeVar("Whole", bound=nn.Module)
Kind = TypeVar("Kind", bound=Part)


def twin(model: Whole) -> Whole:
    """Modules of its own that hold the very weights of `model`: what is changed in one is changed in both."""
    shared = {id(one): one for one in (*model.parameters(), *model.buffers())}
    tokenizer = getattr(model, "tokenizer", None)
    return copy.deepcopy(model, shared | ({} if tokenizer is None else {id(tokenizer): tokenizer}))


def rewritten(model: Whole, kind: type[Kind], change: Callable[[Kind, int], nn.Module]) -> Whole:
    """A twin of `model` in which each part of that kind is what `change(part, number)` makes of it.

    number: counted from 0 in the order of the layers; a part that stands in several places is changed once. Raises
    FormeryError where the model has no such part.
    """
    made = twin(model)
    changed: dict[nn.Module, nn.Module] = {}
    places = [(parent, name, child) for parent in list(made.modules()) for name, child in parent.named_children()]
    for parent, name, child in places:
        if not isinstance(child, kind):
            continue
        if child not in changed:
            changed[child] = change(child, len(changed))
        if isinstance(parent, Part):
            parent.replace(name, changed[child])  # type: ignore[arg-type]
        else:
            setattr(parent, name, changed[child])
    if not changed:
        raise FormeryError(f"this model has no part of the kind {kind.__name__}, which is to be changed.")
    return made
