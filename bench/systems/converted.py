"""CTranslate2, through its own converter for models of transformers."""

from typing import Any

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter

from bench.cases import Case
from bench.shapes import Shape
from bench.systems.system import Refused, System
from formery.files import atomic_folder

COMPUTES = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8_float32"}


class Words:
    """Stands for a tokenizer, which these models lack: a word for each token, its number."""

    bos_token, eos_token, unk_token = "0", "0", "0"

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        """Every word with its token; the last pads where the converter looks for padding."""
        return {str(token): token for token in range(self.vocabulary - 1)} | {"<pad>": self.vocabulary - 1}


class Converter(TransformersConverter):
    """The usual converter, without a tokenizer on disk."""

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **options: Any) -> Words:
        """The words that stand for a tokenizer."""
        return Words(self.vocabulary)

    def __init__(self, shape: Shape):
        super().__init__(str(shape.folder()))
        self.vocabulary = shape.vocabulary


class CTranslate2(System):
    """In float32 or int8 (weights and activations); bfloat16 where its CPU kernels offer it."""

    does = dict.fromkeys(("decode", "batch", "prefill", "translate"), tuple(COMPUTES))

    def __init__(self, case: Case):
        super().__init__(case)
        computes = COMPUTES[case.dtype]
        if computes not in ctranslate2.get_supported_compute_types("cpu"):
            raise Refused(f"ctranslate2 has no {case.dtype} on this processor.")
        kind = ctranslate2.Translator if case.work == "translate" else ctranslate2.Generator
        threads = torch.get_num_threads()
        folder = converted(case.shape, case.dtype)
        self.program: Any = kind(str(folder), compute_type=computes, intra_threads=threads, inter_threads=1)
        self.words = [[str(token) for token in prompt] for prompt in self.prompts]
        self.end = [case.shape.vocabulary - 2]  # an end must be named; one that random weights do not write
        if case.dtype == "int8":
            self.detail = "int8 weights and activations"

    def write(self) -> list[list[int]]:
        return self._write(self.case.new)

    def read(self) -> list[list[int]]:
        return self._write(1)

    def _write(self, new: int) -> list[list[int]]:
        if self.case.work == "translate":
            found = self.program.translate_batch(
                self.words, beam_size=1, min_decoding_length=new, max_decoding_length=new, end_token=self.end
            )
            return [[int(word) for word in one.hypotheses[0]] for one in found]
        found = self.program.generate_batch(
            self.words, beam_size=1, min_length=new, max_length=new, end_token=self.end, include_prompt_in_result=False
        )
        return [one.sequences_ids[0] for one in found]


def converted(shape: Shape, dtype: str) -> Any:
    """The folder with the model in its own format."""
    place = shape.folder().with_name(f"{shape.folder().name}-ctranslate2-{dtype}")
    if not (place / "model.bin").is_file():
        with atomic_folder(place) as temporary:
            Converter(shape).convert(str(temporary), quantization=COMPUTES[dtype], force=True)
    return place
