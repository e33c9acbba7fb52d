"""Formery itself."""

from typing import Any

import torch

import formery
from bench.cases import Case
from bench.systems.system import System, everything
from formery.generate.prompts import encoded
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.models.compose import language_model
from formery.train.alone import Alone
from formery.train.loop import adamw, update
from formery.train.plan import Plan
from formery.train.recipes.code import objective


class Formery(System):
    """Loaded and called as a user would."""

    does = {
        **everything("float32", "bfloat16", "int8", "int4"),
        "translate": ("float32", "bfloat16", "int8"),
        "train": ("float32", "bfloat16"),
    }

    def __init__(self, case: Case):
        super().__init__(case)
        if case.work == "train":
            self._begin_training()
            return
        self.model = loaded(case)
        if case.work == "verify":
            with torch.inference_mode():
                self.target = Target(self.model, self._sources(spare=[0]), Settings(max_new_tokens=32))

    def write(self) -> list[list[int]]:
        found = formery.generate(self.model, self.prompts, max_new_tokens=self.case.new, stop_tokens=[])
        guarded = sum(one.guarded for one in found)
        self.detail = f"{guarded} of {self.case.tokens()} choices were near ties, decided apart" if guarded else ""
        return [one.tokens for one in found]

    @torch.inference_mode()
    def read(self) -> list[list[int]]:
        target = Target(self.model, self._sources(), Settings(max_new_tokens=1))
        return likeliest(target.feed([prefix[-1:] for prefix in target.prefixes]))

    @torch.inference_mode()
    def rewind(self) -> None:
        self.target.state.rollback([self.case.prompt] * self.case.batch)

    @torch.inference_mode()
    def extend(self, tokens: list[int]) -> list[list[int]]:
        return likeliest(self.target.feed([tokens] * self.case.batch))

    def step(self) -> float:
        self.steps += 1
        return update(self.training, [self.batch], self.optimizer, self.steps)

    def _sources(self, spare: list[int] | None = None) -> list[Any]:
        """The prompts, with a token behind that the target leaves for the first call."""
        return [encoded(self.model, [*prompt, *(spare or [])], 1) for prompt in self.prompts]

    def _begin_training(self) -> None:
        shape = self.case.shape
        self.model = language_model(
            shape.vocabulary, shape.width, shape.layers, shape.heads, shape.key_value_heads, shape.hidden, shape.length
        )
        self.model.load_state_dict(formery.load(shape.folder()).state_dict())
        precision: Any = self.case.dtype
        plan = Plan(steps=10**6, learning_rate=1e-4, precision=precision, compile=True)
        self.optimizer = adamw(self.model, plan)
        self.batch = {"tokens": torch.tensor(self.prompts)}
        self.steps = 0
        self.training = Alone(self.model.train(), objective, plan)


def loaded(case: Case) -> Any:
    """The model as `formery.load` gives it for that dtype."""
    quantised: Any = case.dtype if case.dtype in ("int8", "int4") else None
    return formery.load(
        case.shape.folder(), dtype="float32" if quantised else case.dtype, quantize=quantised, compile=True
    )


def likeliest(logits: torch.Tensor) -> list[list[int]]:
    """The likeliest token at each place of each row."""
    found: list[list[int]] = logits.argmax(-1).tolist()
    return found
