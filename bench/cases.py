"""What is done: each case is one work on one model, and knows its prompts and the least it must read and compute."""

import random
from dataclasses import dataclass

from bench.shapes import SHAPES, Shape
from formery.errors import FormeryError, unknown

WORKS = ("decode", "batch", "prefill", "verify", "translate", "train")
Names = dict[str, tuple[str, ...]]
DTYPES: Names = dict.fromkeys(WORKS[:4], ("float32", "bfloat16", "int8", "int4"))
DTYPES |= {"translate": ("float32", "bfloat16", "int8"), "train": ("float32", "bfloat16")}
MODELS: Names = dict.fromkeys(WORKS[:4], ("gpt2-124m", "llama-100m"))
MODELS |= {"translate": ("marian-48m",), "train": ("llama-10m",)}
SMALL: Names = dict.fromkeys(WORKS[:4], ("gpt2-tiny", "llama-tiny"))
SMALL |= {"translate": ("marian-tiny",), "train": ("llama-tiny",)}
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Pass:
    """`tokens` go through `weights` weights together, `times` over."""

    weights: int
    tokens: int
    times: int = 1


@dataclass(frozen=True)
class Case:
    """One work on one model in one dtype.

    prompt, new: tokens read and written in each row. widths: of the calls that are timed, where single calls are.
    """

    work: str
    shape: Shape
    dtype: str
    batch: int
    prompt: int
    new: int
    widths: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"{self.work} · {self.shape.name} · {self.dtype} · batch {self.batch}"

    def prompts(self) -> list[list[int]]:
        """The rows' tokens, the same in every run."""
        length = self.prompt + (self.work == "train")  # the last token is only ever predicted
        draw = random.Random(f"{self.shape.name} {self.batch} {self.prompt}")
        return [[draw.randrange(1, self.shape.vocabulary - 1) for _ in range(length)] for _ in range(self.batch)]

    def tokens(self, width: int | None = None) -> int:
        """How many tokens a lap is worth: those written, or where none are, those read."""
        return self.batch * (width or self.new or self.prompt)

    def passes(self, width: int | None = None) -> list[Pass]:
        """Every pass through weights that the work cannot do without."""
        shape, rows, read = self.shape, self.batch, self.batch * self.prompt
        if width:
            return [Pass(shape.stack + shape.output, rows * width)]
        if self.work == "train":
            return [Pass(3 * (shape.stack + shape.output), read)]  # forward, and backward twice as much
        if self.work == "prefill":
            return [Pass(shape.stack, read), Pass(shape.output, rows)]
        if self.work == "translate":
            decoder = shape.stack + shape.crossing
            return [Pass(decoder, read), Pass(decoder, rows, self.new), Pass(shape.output, rows, self.new)]
        return [Pass(shape.stack, read), Pass(shape.stack, rows, self.new - 1), Pass(shape.output, rows, self.new)]


def cases(work: str, dtypes: list[str] | None, models: list[str] | None, quick: bool) -> list[Case]:
    """All cases of a work; raises FormeryError for a dtype or model that it is not measured with."""
    usual = SMALL if quick else MODELS
    for kind, asked, known in (("dtype", dtypes, DTYPES[work]), ("model", models, usual[work])):
        for name in asked or ():
            if name not in known:
                raise unknown(f"{kind} for {work}", name, known)
    chosen = [SHAPES[name] for name in models or usual[work]]
    return [
        _case(work, shape, dtype, batch, quick)
        for shape in chosen
        for batch in _batches(work, quick)
        for dtype in dtypes or DTYPES[work]
    ]


def _batches(work: str, quick: bool) -> tuple[int, ...]:
    if quick:
        return (4,) if work in ("batch", "train") else (1,)
    return {"batch": (8, 32), "translate": (1, 32), "train": (16,)}.get(work, (1,))


def _case(work: str, shape: Shape, dtype: str, batch: int, quick: bool) -> Case:
    prompt, new = {"decode": (32, 64), "batch": (32, 64), "prefill": (512, 0), "verify": (96, 0),
                   "translate": (24, 48), "train": (256, 0)}[work]  # fmt: skip
    if quick:
        prompt, new = min(prompt, 48), min(new, 8)
    return Case(work, shape, dtype, batch, prompt, new, (1, 4, 8) if work == "verify" else ())


def split(text: str, what: str) -> list[str]:
    """The names between the commas; raises FormeryError where there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise FormeryError(f"{what} names nothing; give names with commas between them.")
    return names
