"""Which of our models the engines that serve exported folders compute as we do: vLLM, llama.cpp, CTranslate2.

A converter may read a folder, leave out what it has no notion of, and say nothing. So a family stands here only where
its logits were compared (docs/serving.md), or, for vLLM, where its documentation lists it; and a limit stands here for
every part that the engine or its converter takes in one way only.
"""

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formery.errors import FormeryError, unknown
from formery.models.hub.anatomy import parts
from formery.models.hub.family import Family
from formery.models.hub.gguf import unlike
from formery.parts import (
    MLP,
    Attention,
    Experts,
    GatedMLP,
    LayerNorm,
    Llama3Scaling,
    Mamba2,
    Output,
    RMSNorm,
    TiedOutput,
    YarnScaling,
)
from formery.parts.mask import Window
from formery.parts.position import Scaling

Fits = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Limit:
    """Parts of a kind that are taken only if they fit, which is asked of the part and its model; unless told, none do.

    told: the arguments that the sentence shows. of: the families that it holds for, by their `model_type`, or all.
    """

    kind: type
    fits: Fits = lambda part, model: False
    told: tuple[str, ...] = ()
    of: tuple[str, ...] = ()


def only(kind: type, name: str, *values: Any, of: tuple[str, ...] = ()) -> Limit:
    """Parts of a kind whose argument has one of these values."""
    return Limit(kind, lambda part, model: getattr(part, name) in values, (name,), of)


@dataclass(frozen=True)
class Engine:
    """An engine: the families that it computes as we do, by their `model_type`, what it takes only so, and commands.

    objections: what a model as a whole lacks for it, as the end of a sentence. next: what to run on a written folder.
    unknown: whether its converter asks for the name of an unknown token.
    """

    title: str
    families: tuple[str, ...]
    limits: tuple[Limit, ...]
    objections: tuple[Callable[[Any, Family], str | None], ...]
    next: tuple[str, ...]
    unknown: bool = False

    def commands(self, folder: str | Path) -> list[str]:
        """What to run next, for a folder that was written for it."""
        place = shlex.quote(str(folder))
        return [one.format(folder=place, file=shlex.quote(f"{folder}.gguf"), new=shlex.quote(f"{folder}-ctranslate2"))
                for one in self.next]  # fmt: skip


def engine_named(name: str) -> Engine:
    """The engine of that name; FormeryError, with those known, for any other."""
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    return ENGINES[name]


def check(engine: Engine, model: Any, family: Family) -> None:
    """Raises FormeryError, naming the part, where the engine would not serve the model as it is."""
    for sentence in _objections(engine, model, family):
        raise FormeryError(f"{engine.title} cannot serve this model as it is: {sentence}.")


def _objections(engine: Engine, model: Any, family: Family) -> Iterator[str]:
    for path, part in parts(model):
        for limit in engine.limits:
            concerns = isinstance(part, limit.kind) and (not limit.of or family.kind in limit.of)
            if concerns and not limit.fits(part, model):
                told = ", ".join(f"{name}={getattr(part, name)!r}" for name in limit.told)
                yield f"it has no notion of {type(part).__name__}({told}) at {path}"
    if family.kind not in engine.families:
        known = ", ".join(engine.families)
        yield f"{type(model).__name__} is exported as {family.kind}, and what is known to work is {known}"
    for objection in engine.objections:
        if (sentence := objection(model, family)) is not None:
            yield sentence


# ------------------------------------------------------------------------------------------ what parts have to be like


def _wide(part: Any, model: Any) -> bool:
    return model.max_length is not None and part.size >= model.max_length


def _usual_scale(part: Any, model: Any) -> bool:
    return part.scale is None or math.isclose(part.scale, part.dim**-0.5)


def _unbounded(part: Any, model: Any) -> bool:
    return part.shortest_step == 0.0 and part.longest_step is None


_WHOLE_WINDOW = Limit(Window, _wide, ("size",))
_GATED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "olmoe")
_SILU = only(GatedMLP, "activation", "silu", of=_GATED)
_GPT2_SCALE = Limit(Attention, _usual_scale, ("scale",), ("gpt2",))
_PLAIN_STEPS = Limit(Mamba2, _unbounded, ("shortest_step", "longest_step"))


# --------------------------------------------------------------------------------------------- what a model has to have


def _no_tokenizer(model: Any, family: Family) -> str | None:
    if model.tokenizer is None:
        return "it needs a tokenizer, and the model has none"
    if model.tokenizer.vocabulary_size > model.vocabulary:
        return f"the tokenizer has {model.tokenizer.vocabulary_size} tokens, and the embedding {model.vocabulary}"
    return None


def _never_written(model: Any, family: Family) -> str | None:
    """CTranslate2's Marian has no token for padding, so that it need not be told."""
    told = {*model.conventions.suppressed, *model.conventions.suppressed_first}
    if family.kind == "marian":
        told -= {model.start_token}
    return f"it has no notion of tokens that are never written ({sorted(told)[:5]})" if told else None


def _one_end(model: Any, family: Family) -> str | None:
    stop = model.conventions.stop
    if stop is None and model.tokenizer.eos is not None:
        return None
    if stop is None or len(stop) != 1:
        return f"a text should end with one token, and here it may with {list(stop or ())}"
    if stop[0] != model.tokenizer.eos:
        return f"a text ends with token {stop[0]}, which is not the tokenizer's end token"
    return None


def _forced(model: Any, family: Family) -> str | None:
    prefix = getattr(model, "prefix", None)
    return f"it has no notion of first tokens that are forced ({list(prefix)})" if prefix else None


def _other_vocabulary(model: Any, family: Family) -> str | None:
    """Its converter fills up what lacks for some families only; it rounds up to eighths for OPT."""
    tokens, rows = model.tokenizer.vocabulary_size, model.vocabulary
    if family.kind in ("gpt2", "bart", "marian", "opt") and (tokens != rows or (family.kind == "opt" and rows % 8)):
        return f"the tokenizer's {tokens} tokens do not fill the embedding's {rows} rows as its converter asks"
    return None


def _marian_padding(model: Any, family: Family) -> str | None:
    """Its converter takes the last token for the padding that begins a text, and its vector for nothing."""
    if family.kind != "marian":
        return None
    last = model.vocabulary - 1
    tables = (model.encoder.embedding.weight, model.decoder.embedding.weight)
    if model.start_token == last == model.tokenizer.pad and not any(table[last].any() for table in tables):
        return None
    return "of the embedding of a Marian the last row should be <pad>, begin a text, and be zero"


def _unlike_gpt2(model: Any, family: Family) -> str | None:
    told = unlike(model.tokenizer)
    return None if told is None else f"its tokenizers take no {told}"


# ------------------------------------------------------------------------------------------------------------ the table

ENGINES = {
    # https://docs.vllm.ai/en/latest/models/supported_models.html, text generation.
    "vllm": Engine(
        "vLLM",
        ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "bloom", "mixtral", "olmoe",
         "mamba2"),
        (
            _SILU, _GPT2_SCALE, _PLAIN_STEPS, Limit(Window, _wide, ("size",), ("qwen2", "qwen3")),
            only(GatedMLP, "activation", "gelu_tanh", of=("gemma2",)),
        ),
        (_no_tokenizer, _never_written),
        ("vllm serve {folder}",),
    ),
    # Its converter's TEXT_MODEL_MAP, as far as logits agree.
    "llama.cpp": Engine(
        "llama.cpp",
        ("gpt2", "llama", "mistral", "qwen2", "qwen3", "bloom", "mixtral", "olmoe", "mamba2"),
        (
            _WHOLE_WINDOW, _SILU, _GPT2_SCALE, _PLAIN_STEPS,
            only(MLP, "activation", "gelu_tanh"),
            Limit(MLP, lambda part, model: part.hidden == 4 * part.width, ("width", "hidden"), ("gpt2",)),
            only(Attention, "bias", False, of=("qwen3",)),
            only(Mamba2, "bias", False),
            only(Mamba2, "convolution_bias", True),
            only(Experts, "normalised", False, of=("olmoe",)),
            Limit(Attention, lambda part, model: part.groups == part.heads, ("heads", "key_value_heads"), ("olmoe",)),
            Limit(Llama3Scaling, of=("qwen2", "qwen3")),
            Limit(Scaling, of=("olmoe",)),
            only(YarnScaling, "attention", None),
            only(YarnScaling, "truncate", True),
        ),
        (_no_tokenizer, _never_written, _one_end, _unlike_gpt2),
        ("formery gguf {folder} {file} --converter path/to/llama.cpp", "llama-server --model {file}"),
    ),
    # The loaders that ctranslate2.converters.transformers registers, as far as logits agree.
    "ctranslate2": Engine(
        "CTranslate2",
        ("gpt2", "llama", "mistral", "qwen2", "qwen3", "opt", "bloom", "t5", "bart", "marian"),
        (
            _WHOLE_WINDOW, _SILU, _GPT2_SCALE, Limit(Mamba2), Limit(Experts), Limit(Llama3Scaling), Limit(YarnScaling),
            only(Attention, "soft_cap", None),
            only(Output, "soft_cap", None),
            only(TiedOutput, "soft_cap", None),
            only(MLP, "activation", "gelu", "gelu_tanh", "quick_gelu", "relu", "silu"),
            only(GatedMLP, "activation", "gelu", "gelu_tanh", "silu", of=("t5",)),
            only(LayerNorm, "epsilon", 1e-5),
            only(RMSNorm, "epsilon", 1e-6, of=("t5",)),
            Limit(Attention, lambda part, model: part.heads * part.dim == part.width, ("heads", "head_width"),
                  ("llama", "qwen2")),
            Limit(Output, of=("t5",)),
            Limit(TiedOutput, lambda part, model: part.scale != 1.0, ("scale",), ("t5",)),
        ),
        (_no_tokenizer, _never_written, _one_end, _forced, _other_vocabulary, _marian_padding),
        ("ct2-transformers-converter --model {folder} --output_dir {new} --quantization float32",),
        unknown=True,
    ),
}  # fmt: skip
