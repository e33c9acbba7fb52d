"""transformers as most people use it: `generate` with its dynamic cache."""

from typing import Any

import torch
import transformers
from transformers import DynamicCache

from bench.cases import Case
from bench.shapes import CLASSES
from bench.systems.system import System, everything
from bench.training.step import Training

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class HuggingFace(System):
    """For int8 and int4 it stands there in float32, as what one would use without them."""

    does = {
        **everything("float32", "bfloat16", "int8", "int4"),
        "translate": ("float32", "bfloat16", "int8"),
        "train": ("float32", "bfloat16"),
    }

    def __init__(self, case: Case):
        super().__init__(case)
        if case.dtype in ("int8", "int4"):
            self.detail = "float32 weights"
        self.model = self.load()
        if case.work == "train":
            self.training = Training(self.model, self.prompts, case.dtype, lambda tokens: self.model(tokens).logits)
            return
        self.tokens = torch.tensor(self.prompts)
        if case.work == "verify":
            self.begin()

    def load(self) -> Any:
        """The model, with what a subclass changes about it."""
        dtype = torch.float32 if self.case.dtype in ("int8", "int4") else getattr(torch, self.case.dtype)
        if self.case.work == "train":
            dtype = torch.float32
        kind = getattr(transformers, CLASSES[self.case.shape.kind])
        return kind.from_pretrained(self.case.shape.folder(), dtype=dtype).eval()

    @torch.inference_mode()
    def write(self) -> list[list[int]]:
        new = self.case.new
        found = self.model.generate(
            self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=self.case.shape.vocabulary - 1,
        )
        written: list[list[int]] = found[:, -new:].tolist()
        return written

    @torch.inference_mode()
    def read(self) -> list[list[int]]:
        logits = self.model(self.tokens, logits_to_keep=1).logits
        found: list[list[int]] = logits.argmax(-1).tolist()
        return found

    @torch.inference_mode()
    def begin(self) -> None:
        """Reads the prompt into a cache that calls are timed on."""
        self.cache = DynamicCache(config=self.model.config)
        self.model(self.tokens, cache=self.cache, use_cache=True)

    @torch.inference_mode()
    def rewind(self) -> None:
        if written := self.cache.get_seq_length() - self.case.prompt:
            self.cache.crop(-written)

    @torch.inference_mode()
    def extend(self, tokens: list[int]) -> list[list[int]]:
        given = torch.tensor([tokens] * self.case.batch)
        found: list[list[int]] = self.model(given, cache=self.cache, use_cache=True).logits.argmax(-1).tolist()
        return found

    def step(self) -> float:
        return self.training.step()
