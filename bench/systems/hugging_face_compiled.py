"""transformers at its fastest on a CPU: a static cache, and its forward compiled with the weights folded in."""

from typing import Any

import torch
from transformers import StaticCache

from bench.cases import Case
from bench.systems.hugging_face import HuggingFace
from bench.systems.system import everything

FOLDED: dict[str, Any] = {"freezing": True}


class Compiled(HuggingFace):
    """The prompt is read eagerly, as `generate` does; the calls after it are compiled."""

    does = everything("float32", "bfloat16")
    kinds = ("gpt2", "llama")

    def __init__(self, case: Case):
        torch._dynamo.reset()
        super().__init__(case)
        self.forward: Any = torch.compile(self.model.forward, dynamic=False, options=FOLDED)

    @torch.no_grad()
    def write(self) -> list[list[int]]:
        if not hasattr(self, "cache"):
            self.begin()
        self.cache.reset()
        token = self.model(self.tokens, cache=self.cache, logits_to_keep=1).logits.argmax(-1)
        found = [token]
        for _ in range(self.case.new - 1):
            token = self.forward(token, cache=self.cache).logits.argmax(-1)
            found.append(token)
        written: list[list[int]] = torch.cat(found, 1).tolist()
        return written

    @torch.no_grad()
    def read(self) -> list[list[int]]:
        found: list[list[int]] = self.forward(self.tokens, logits_to_keep=1, use_cache=False).logits.argmax(-1).tolist()
        return found

    @torch.no_grad()
    def begin(self) -> None:
        room = self.case.prompt + max(self.case.new, *self.case.widths, 1)
        self.cache: Any = StaticCache(config=self.model.config, max_cache_len=room)
        self.model(self.tokens, cache=self.cache)

    @torch.no_grad()
    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.case.prompt)

    @torch.no_grad()
    def extend(self, tokens: list[int]) -> list[list[int]]:
        given = torch.tensor([tokens] * self.case.batch)
        found: list[list[int]] = self.forward(given, cache=self.cache).logits.argmax(-1).tolist()
        return found
