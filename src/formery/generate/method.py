"""The registry of decoding methods: a name, what it promises, and how to make it from its options."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch.nn import Module

from formery.errors import FormeryError, unknown
from formery.generate.draft import Drafter, NoDraft
from formery.generate.judge import Relaxed
from formery.generate.settings import Settings
from formery.generate.verify import Decoding, Event, draft_and_verify
from formery.models import Guide, Model, Source


@dataclass(frozen=True)
class Method:
    """A way to decode.

    lossless: greedy gives the very tokens of plain greedy, sampling the target's very distribution.
    make: makes the decoding from the method's own options, which are its keyword parameters.
    defaults: settings that it starts from. variants: option texts worth comparing ("form=plain").
    paper: the slug of the paper it comes from, if it has one here. guide: the method with whose guides it drafts, by
    default its own. kinds: of models that it is for. module: where it is
    registered, by `register`.
    """

    name: str
    summary: str
    lossless: bool
    make: Callable[..., Decoding]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    paper: str | None = None
    guide: str | None = None
    kinds: tuple[str, ...] = ("decoder", "encoder-decoder")
    module: str = ""

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The method's own options."""
        return dict(inspect.signature(self.make).parameters)

    @property
    def takes_draft(self) -> bool:
        """Whether it drafts with a second, smaller model, or a guide."""
        return "draft" in self.options

    @property
    def needs_draft(self) -> bool:
        """Whether it cannot do without one."""
        return self.takes_draft and self.options["draft"].default is inspect.Parameter.empty

    @property
    def guided(self) -> bool:
        """Whether that is a guide, which is trained for this method and one model."""
        return self.takes_draft and self.options["draft"].annotation in (Guide, Guide | None)

    def suits(self, model: Model) -> bool:
        """Whether it is for models of that kind."""
        return ("encoder-decoder" if model.reads_apart else "decoder") in self.kinds

    def draft_of(self, model: str) -> str:
        """The name of the draft, or guide, that ships with the shipped model of that name, if one does."""
        return f"{model}/{self.guide or self.name}" if self.guided else f"{model}-draft"


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Makes a method known by its name."""
    if METHODS.get(method.name, method).make is not method.make:
        raise ValueError(f"two methods are named {method.name}")
    if not method.module:
        method = replace(method, module=sys._getframe(1).f_globals["__name__"])
    METHODS[method.name] = method
    return method


def drafting(drafter: Callable[..., Drafter], relaxed: Callable[..., Relaxed] | None = None) -> Callable[..., Decoding]:
    """The decoding that a drafter makes of the shared loop; its options are the drafter's, and `adapt`.

    relaxed: makes a lossy acceptance from options of its own, which are the decoding's too.
    """
    own = dict(inspect.signature(drafter).parameters)
    lossy = {} if relaxed is None else dict(inspect.signature(relaxed).parameters)
    adapting = inspect.Parameter("adapt", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)

    def make(**options: Any) -> Decoding:
        adapt = options.pop("adapt", False)
        given = {name: value for name, value in options.items() if name in own}
        accepts = None if relaxed is None else relaxed(**{k: v for k, v in options.items() if k in lossy})

        def decode(model: Model, prompts: Sequence[Source], settings: Settings, first: int) -> Iterator[list[Event]]:
            return draft_and_verify(model, prompts, settings, first, drafter(**given), relaxed=accepts, adapt=adapt)

        drafter(**given)  # complains of bad options before any work
        return decode

    known = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (own | lossy).values()]
    extra = [] if drafter is NoDraft else [adapting]
    make.__signature__ = inspect.Signature([*known, *extra])  # type: ignore[attr-defined]
    return make


def find(text: str) -> tuple[Method, dict[str, Any]]:
    """The method that `text` names, and the options behind the name: "parallel-jacobi-decoding:form=plain:block=3".

    Raises FormeryError for a name or option that is not known.
    """
    name, *settings = text.split(":")
    if name not in METHODS:
        # Papers lie above this room and register here; they are fetched by name, when one is asked for.
        importlib.import_module("formery.methods").discover()
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise FormeryError(f"in {text!r}, {setting!r} should read option=value.")
        if key not in METHODS[name].options:
            raise unknown(f"option of {name}", key, METHODS[name].options)
        options[key] = _value(value)
    return METHODS[name], options


def _value(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _fits(value: Any, kind: Any) -> bool:
    if kind == Model:
        return isinstance(value, Module) and not isinstance(value, Guide)
    if kind in (Guide, Guide | None):
        return isinstance(value, Guide) or (value is None and kind is not Guide)
    if kind not in (bool, int, float, str):
        return True
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def bound(method: Method, options: Mapping[str, Any]) -> Decoding:
    """The decoding of `method` with these options; FormeryError where one is unknown, missing or unusable."""
    for key in options:
        if key not in method.options:
            raise unknown(f"option of {method.name}", key, [*method.options, *Settings.__dataclass_fields__])
    for key, parameter in method.options.items():
        if parameter.default is inspect.Parameter.empty and options.get(key) is None:
            raise FormeryError(f"{method.name} needs the option {key!r}.")
        if key in options and not _fits(options[key], parameter.annotation):
            kind = getattr(parameter.annotation, "__name__", "model").lower()
            raise FormeryError(f"the option {key!r} of {method.name} must be of kind {kind}, not {options[key]!r}.")
    return partial(method.make, **options)()
