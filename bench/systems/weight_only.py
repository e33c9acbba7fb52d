"""torchao: weights alone in int8, compiled, on the model of transformers."""

from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from bench.systems.hugging_face_compiled import Compiled
from bench.systems.hugging_face_int8 import with_linear
from bench.systems.system import everything


class WeightOnly(Compiled):
    """Activations in bfloat16, for which its kernels are made."""

    does = everything("int8")

    def load(self) -> Any:
        self.detail = "int8 weights, bfloat16 activations"
        model = with_linear(super().load()).to(torch.bfloat16)
        quantize_(model, Int8WeightOnlyConfig())
        return model
