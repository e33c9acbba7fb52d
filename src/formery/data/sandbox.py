"""Rendering a published chat template, which is a program of strangers: sandboxed, and within a budget of work.

Jinja's sandbox keeps a template away from Python's inner workings; the budget keeps it from running forever or
filling the memory. Every turn of a loop, call and piece of text that is made costs, and what would make a text
much larger than its parts (repeating, padding, replacing, joining) is paid for before it is done.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes, utils
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter, SecurityError
from jinja2.visitor import NodeTransformer

# In characters made; a turn of a loop or a call counts as `STEP` of them, an entry of a list as `ENTRY`.
BUDGET, STEP, ENTRY = 2**26, 256, 16
# Filters that only pad or break lines, or guess: no chat needs them.
DROPPED = {"batch", "center", "filesizeformat", "pprint", "random", "slice", "urlize", "wordwrap", "xmlattr"}
PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format_map", "translate"}
# Filters that take a whole list without writing it out.
LISTS = {"attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map"}
LISTS |= {"max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"}
_HOLDERS: tuple[type, ...] = (list, tuple, set, frozenset, type({}.keys()), type({}.values()), type({}.items()))


class Refusal(jinja2.TemplateError):
    """What a template itself raises about the messages, by `raise_exception`."""


class _Namespace(utils.Namespace):
    """A template's variables that outlive a loop; without Python's own names, and never written out whole."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _own_name(name)
        utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _own_name(name)
        utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _own_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore, such as {name}")


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its content is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Counting(NodeTransformer):
    """Sends what jinja compiles without asking through filters that count: loops, `~`, slices, lists and tables."""

    def _through(self, node: nodes.Node, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._through(node.iter, "_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._through(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "_joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through(node, "_made") if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return self._through(node, "_counted")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return self._through(node, "_counted")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through(node, "_counted") if node.ctx == "load" else node


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        _narrow(format_spec)
        return str(super().format_field(value, format_spec))


def _narrow(widths: str) -> None:
    if re.search(r"\d{4}", widths):
        raise SecurityError("a text is padded to thousands of characters")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one rendering, with what chat templates expect and `budget` characters of work."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: int = BUDGET) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._written,
        )
        self.left = budget
        for name in DROPPED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = self._to_json
        self.filters = {name: self._paid(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_joined": self._joined, "_counted": self._counted, "_made": self._made}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
        # The class itself would bring its own methods along.
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)

    def spend(self, amount: int) -> None:
        """Pays for `amount` characters of work; raises SecurityError when nothing is left."""
        self.left -= max(amount, 0)
        if self.left < 0:
            raise SecurityError("it takes more work than any conversation needs")

    # ------------------------------------------------------------------- what jinja asks before it acts

    def compile(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compiles a template whose loops, joins and literals count."""
        tree = self._parse(source, None, None) if isinstance(source, str) else source
        return super().compile(_Counting().visit(tree), *args, **kwargs)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls a function or macro of the template."""
        self.spend(STEP)
        if isinstance(function, LoopContext) and args:
            args = (self._turns(args[0]), *args[1:])
        self._foresee(getattr(function, "__name__", ""), getattr(function, "__self__", None), args, kwargs)
        return self._made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Adds, multiplies, raises or formats."""
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(times, int):
                    self.spend(times * len(one) if isinstance(one, Sized) else _digits(one) + _digits(times))
        elif operator == "**" and isinstance(right, int):
            self.spend(_digits(left) * right)
        elif operator == "%" and isinstance(left, str):
            self._foresee("format", left, (right,), {})
        return self._counted(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, without access to attributes that are not the template's to see, or wide padding."""
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or getattr(value, "__name__", "") != "format":
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            self._foresee("format", text, args, kwargs)
            return str(_Formatter(self).vformat(str(text), args, kwargs))

        return formatted

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have this attribute."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in PADDING)

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what a template writes, while there is budget left."""
        found = []
        for part in parts:
            self.spend(len(part) + 1)
            found.append(part)
        return "".join(found)

    # ------------------------------------------------------------------------------------- what costs

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(STEP)
            yield item

    def _joined(self, parts: list[Any]) -> str:
        return self.concat(str(self._written(part)) for part in parts)

    def _counted(self, value: Any) -> Any:
        """Pays for a value whose parts were there already: its characters, or its entries, however deep."""
        self.spend(len(value) if isinstance(value, str) else self._size(value, letters=False))
        return value

    def _made(self, value: Any) -> Any:
        """Pays for a value with all the text in it."""
        self.spend(self._size(value, letters=True))
        return value

    def _written(self, value: Any) -> Any:
        """Pays for a value that is about to be written out; text is paid for where it is joined."""
        return value if isinstance(value, str) else self._made(value)

    def _size(self, value: Any, letters: bool) -> int:
        """How many entries (and letters, if asked) a value has, counted no further than the budget goes."""
        total, open_ = 1, [value]
        while open_ and total <= self.left:
            one: Any = open_.pop()
            if isinstance(one, str):
                total += len(one) if letters else 0
            elif isinstance(one, int):
                total += _digits(one)
            elif isinstance(one, Mapping):
                total += 2 * ENTRY * len(one)
                open_ += [*one.keys(), *one.values()]
            elif type(one) in _HOLDERS:
                total += ENTRY * len(one)
                open_ += one
        return total

    def _foresee(self, name: str, value: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """Pays in advance for the text that a method or filter makes out of `value`."""
        given = [*args, *kwargs.values()]
        texts = [one for one in given if isinstance(one, str)]
        if name == "replace" and len(texts) > 1:
            self.spend(str(value).count(texts[0]) * len(texts[1]))
        elif name == "join" and isinstance(value, str):
            for one in given:
                self.spend(self._size(one, letters=True) + len(value) * (len(one) if hasattr(one, "__len__") else 0))
        elif name == "indent":
            width = sum(len(one) if isinstance(one, str) else one for one in given if isinstance(one, str | int))
            self.spend((4 + width) * (str(value).count("\n") + 1))
        elif name == "format":
            form = str(value)
            _narrow(form)
            if re.search(r"%[^a-zA-Z%]*\*", form):
                raise SecurityError("a text is padded to a width that is not written down")
            self.spend((form.count("{") + form.count("%")) * self._size(given, letters=True))

    def _paid(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter `function`, which pays for what it reads and makes."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.spend(STEP)
            front, value, rest = list(args[:first]), args[first], args[first + 1 :]
            if name == "join":
                value = list(self._turns(value))
                between = [str(self._written(one)) for one in (*rest[:1], kwargs.get("d", ""))]
                self.spend(self._size(value, letters=True) + len(value) * sum(map(len, between)))
            elif isinstance(value, Iterator):
                value = self._turns(value)
            elif name in LISTS:
                self.spend((1 if isinstance(value, str) else ENTRY) * len(value) if isinstance(value, Sized) else 1)
            else:
                self._written(value)
            self._foresee(name, value, rest, kwargs)
            return self._counted(function(*front, value, *rest, **kwargs))

        return filtered

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as chat templates expect it: letters stay letters, and nothing is escaped for a web page."""
        if isinstance(indent, int) and indent > 100:
            raise SecurityError("a text is indented by hundreds of characters")
        encoder = json.JSONEncoder(
            ensure_ascii=bool(ensure_ascii), indent=indent, separators=separators, sort_keys=bool(sort_keys)
        )
        return self.concat(encoder.iterencode(value))


def _digits(value: Any) -> int:
    return value.bit_length() // 3 + 1 if isinstance(value, int) else 1


def _raise(message: object) -> None:
    raise Refusal(str(message))


def _now(form: str) -> str:
    _narrow(form)
    return datetime.now().strftime(form)
