"""transformers with PyTorch's own int8: weights quantised once, activations as they come."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bench.systems.hugging_face import HuggingFace


class Quantised(HuggingFace):
    """Every linear map by `quantize_dynamic`."""

    does = dict.fromkeys(("decode", "batch", "prefill", "verify", "translate"), ("int8",))

    def load(self) -> Any:
        self.detail = "int8 weights and activations"
        return torch.ao.quantization.quantize_dynamic(with_linear(super().load()), {nn.Linear}, torch.qint8)


def with_linear(model: nn.Module) -> nn.Module:
    """The model with GPT-2's transposed maps as ordinary linear ones, which is all that quantisers know."""
    for part in model.modules():
        for name, child in part.named_children():
            if isinstance(child, Conv1D):
                inner, outer = child.weight.shape
                linear = nn.Linear(inner, outer, dtype=child.weight.dtype)
                linear.weight = nn.Parameter(child.weight.T.contiguous())
                linear.bias = child.bias
                setattr(part, name, linear)
    return model
