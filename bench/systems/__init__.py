"""The programs that are timed; one small file each, imported only when it runs."""

import importlib
import importlib.util
from dataclasses import dataclass

from bench.systems.system import Refused, System

__all__ = ["KNOWN", "OURS", "REFERENCE", "Known", "Refused", "System"]

OURS, REFERENCE = "formery", "transformers"


@dataclass(frozen=True)
class Known:
    """A system's name, where its class is, and the package that it needs with what pip calls it."""

    name: str
    place: str
    package: str
    pip: str

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.package) is not None

    def find(self) -> type[System]:
        """Its class."""
        module, name = self.place.split(":")
        found: type[System] = getattr(importlib.import_module(module), name)
        return found


KNOWN = {
    known.name: known
    for known in (
        Known(OURS, "bench.systems.ours:Formery", "formery", "formery"),
        Known(REFERENCE, "bench.systems.hugging_face:HuggingFace", "transformers", "transformers"),
        Known("transformers-compiled", "bench.systems.hugging_face_compiled:Compiled", "transformers", "transformers"),
        Known("transformers-int8", "bench.systems.hugging_face_int8:Quantised", "transformers", "transformers"),
        Known("torchao", "bench.systems.weight_only:WeightOnly", "torchao", "torchao transformers"),
        Known("x-transformers", "bench.systems.x_transformer:XTransformer", "x_transformers", "x-transformers"),
        Known("ctranslate2", "bench.systems.converted:CTranslate2", "ctranslate2", "ctranslate2"),
        Known("llama.cpp", "bench.systems.llama_cpp:LlamaCpp", "llama_cpp", "llama-cpp-python gguf"),
        Known("nanogpt-style", "bench.training.plain:Plain", "torch", "torch"),
        Known("nanogpt-style-compiled", "bench.training.plain:PlainCompiled", "torch", "torch"),
    )
}
