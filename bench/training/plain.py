"""A decoder in one screen of plain PyTorch, trained eagerly or compiled, as small training scripts do."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Case
from bench.shapes import Shape
from bench.systems.system import System
from bench.training.step import Training
from bench.weights import stored


class Block(nn.Module):
    """Attention, then a gated feed-forward, each behind a norm."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.heads, self.dim, width = shape.heads, shape.head_width, shape.width
        self.memory = shape.key_value_heads * self.dim
        self.first, self.second = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)
        self.project = nn.Linear(width, width + 2 * self.memory, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, time, width = hidden.shape
        parts = self.project(self.first(hidden)).split([width, self.memory, self.memory], -1)
        query, key, value = (part.view(batch, time, -1, self.dim).transpose(1, 2) for part in parts)
        query, key = turned(query, cosine, sine), turned(key, cosine, sine)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape != key.shape)
        hidden = hidden + self.merge(seen.transpose(1, 2).reshape(batch, time, width))
        gate, up = self.up(self.second(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Embedding, blocks, norm; the output is the embedding again."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, 1e-6)
        turns = 10000.0 ** -(torch.arange(0, shape.head_width, 2) / shape.head_width)
        angles = torch.outer(torch.arange(shape.length), turns).repeat(1, 2)
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, time = self.embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            hidden = block(hidden, self.cosine[:time], self.sine[:time])
        return F.linear(self.norm(hidden), self.embedding.weight)


def turned(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions; the halves of a head belong together."""
    first, second = vectors.chunk(2, -1)
    return (vectors * cosine + torch.cat((-second, first), -1) * sine).to(vectors.dtype)


def filled(shape: Shape) -> Model:
    """The model with the stored weights."""
    model, found = Model(shape), stored(shape)
    with torch.no_grad():
        model.embedding.weight.copy_(found["model.embed_tokens.weight"])
        model.norm.weight.copy_(found["model.norm.weight"])
        for number, one in enumerate(model.blocks):
            block: Any = one
            layer = {name.split(".", 3)[3]: value for name, value in found.items() if f"layers.{number}." in name}
            block.first.weight.copy_(layer["input_layernorm.weight"])
            block.second.weight.copy_(layer["post_attention_layernorm.weight"])
            block.project.weight.copy_(torch.cat([layer[f"self_attn.{name}_proj.weight"] for name in "qkv"]))
            block.merge.weight.copy_(layer["self_attn.o_proj.weight"])
            block.up.weight.copy_(torch.cat([layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up")]))
            block.down.weight.copy_(layer["mlp.down_proj.weight"])
    return model


class Plain(System):
    """Eager."""

    does = {"train": ("float32", "bfloat16")}
    kinds = ("llama",)

    def __init__(self, case: Case):
        super().__init__(case)
        model = filled(case.shape)
        self.training = Training(model, self.prompts, case.dtype, self.prepared(model))

    def prepared(self, model: Model) -> Any:
        """What computes the logits."""
        return model

    def step(self) -> float:
        return self.training.step()


class PlainCompiled(Plain):
    """Through torch.compile."""

    def prepared(self, model: Model) -> Any:
        torch._dynamo.reset()
        return torch.compile(model)
