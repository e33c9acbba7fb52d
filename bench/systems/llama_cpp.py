"""llama.cpp, through the functions that llama-cpp-python gives of it."""

import ctypes
from collections.abc import Sequence

import llama_cpp
import numpy as np
import torch

from bench.cases import Case
from bench.systems.gguf_file import TYPES, written
from bench.systems.system import System, everything


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: object) -> None:
    """Says nothing of what the library tells."""


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))


class LlamaCpp(System):
    """Each row is a sequence of its own in one batch."""

    does = everything(*TYPES)
    kinds = ("gpt2", "llama")

    def __init__(self, case: Case):
        super().__init__(case)
        self.detail = f"{TYPES[case.dtype]} weights"
        path = str(written(case.shape, case.dtype)).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        room = case.prompt + max(case.new, *case.widths, 1)
        settings.n_ctx, settings.n_seq_max = case.batch * room, case.batch
        settings.n_batch = settings.n_ubatch = max(512, case.batch * case.prompt)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError("llama.cpp could not begin")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)
        if case.work == "verify":
            self._feed(self.prompts, 0, 1)

    def write(self) -> list[list[int]]:
        llama_cpp.llama_memory_clear(self.memory, True)
        token = self._feed(self.prompts, 0, 1)
        rows = [[one] for one in token]
        for place in range(self.case.prompt, self.case.prompt + self.case.new - 1):
            token = self._feed([[one] for one in token], place, 1)
            for row, one in zip(rows, token, strict=True):
                row.append(one)
        return rows

    def read(self) -> list[list[int]]:
        llama_cpp.llama_memory_clear(self.memory, True)
        return [[one] for one in self._feed(self.prompts, 0, 1)]

    def rewind(self) -> None:
        for row in range(self.case.batch):
            llama_cpp.llama_memory_seq_rm(self.memory, row, self.case.prompt, -1)

    def extend(self, tokens: list[int]) -> list[list[int]]:
        found = self._feed([tokens] * self.case.batch, self.case.prompt, len(tokens))
        return np.reshape(found, (self.case.batch, -1)).tolist()

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)

    def _feed(self, rows: Sequence[Sequence[int]], first: int, judged: int) -> list[int]:
        """Reads each row's tokens from that position on; the likeliest token after the last `judged` of each."""
        batch, filled = self.batch, 0
        for row, tokens in enumerate(rows):
            for place, token in enumerate(tokens):
                batch.token[filled], batch.pos[filled] = token, first + place
                batch.n_seq_id[filled], batch.seq_id[filled][0] = 1, row
                batch.logits[filled] = place >= len(tokens) - judged
                filled += 1
        batch.n_tokens = filled
        if code := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp could not read {filled} tokens (code {code})")
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits(self.context), (len(rows) * judged, self.case.shape.vocabulary)
        )
        found: list[int] = logits.argmax(-1).tolist()
        return found
