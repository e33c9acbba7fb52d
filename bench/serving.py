"""A model that was trained here, served by other engines: is its text ours, token for token?

The model goes out by `formery.export`, and in by each engine's own converter; all weights and sums are float32.
"""

import ctypes
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console

import formery
from bench.table import progress
from formery.data.works import work
from formery.models.hub.gguf import convert

NEW, PROMPTS = 64, 100
Write = Callable[[Sequence[Sequence[int]]], list[list[int]]]


def ctranslate2(model: Any, folder: Path, converter: str) -> Iterator[tuple[str, Write]]:
    """CTranslate2 on this processor."""
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    formery.export(model, folder, engine="ctranslate2")
    place = TransformersConverter(str(folder)).convert(f"{folder}-ctranslate2", quantization="float32")
    program = Generator(str(place), compute_type="float32")

    def write(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        words = [[model.tokenizer.inner.id_to_token(token) for token in one] for one in prompts]
        found = program.generate_batch(words, beam_size=1, max_length=NEW, include_prompt_in_result=False)
        return [one.sequences_ids[0] for one in found]

    yield f"CTranslate2 {version('ctranslate2')}", write


def llama_cpp(model: Any, folder: Path, converter: str) -> Iterator[tuple[str, Write]]:
    """llama.cpp with keys and values as it keeps them unless told, and in float32."""
    import llama_cpp as library

    silent = library.llama_log_callback(lambda level, text, data: None)
    library.llama_log_set(silent, ctypes.c_void_p(0))
    formery.export(model, folder, engine="llama.cpp")
    file = convert(folder, f"{folder}.gguf", converter)
    for kept, options in (("16", {}), ("32", {"type_k": 0, "type_v": 0, "flash_attn": False})):
        program: Any = library.Llama(str(file), n_ctx=model.max_length, verbose=False, **options)

        def one(prompt: Sequence[int], program: Any = program) -> list[int]:
            found: list[int] = []
            for token in program.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0):
                if token == model.tokenizer.eos or len(found) == NEW:
                    break
                found.append(token)
            return found

        name = f"llama.cpp of llama-cpp-python {version('llama_cpp_python')}, keys and values in {kept} bits"
        yield name, lambda prompts, one=one: [one(prompt) for prompt in prompts]


def measure(asked: Namespace) -> int:
    """Writes with each engine and with greedy, and tells how many texts are the same; 0."""
    model = formery.load("code", dtype=torch.float32)
    prompts = [model.tokenizer.encode(one.prompt) for one in work("code").examples(limit=PROMPTS)]
    ours = [[*one.tokens] for one in formery.generate(model, prompts, method="greedy", max_new_tokens=NEW)]
    rows = []
    console = Console()
    with TemporaryDirectory() as temporary, progress(Console(stderr=True), "serving") as tell:
        for engine in (ctranslate2, *((llama_cpp,) if asked.converter else ())):
            for name, write in engine(model, Path(temporary) / engine.__name__, str(asked.converter)):
                tell(len(rows), 0, name)
                theirs = write(prompts)
                same = [one == other for one, other in zip(ours, theirs, strict=True)]
                rows.append({"engine": name, "texts": len(same), "same": sum(same), "tokens": sum(map(len, ours))})
                console.print(f"{name}: {sum(same)} of {len(same)} texts ({rows[-1]['tokens']:,} tokens) are the same")
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0
