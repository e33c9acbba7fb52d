"""What models are made of; each file one small module with one job."""

from formery.parts.attention import Attention, CrossAttention
from formery.parts.context import Context, Visibility
from formery.parts.embed import Embedding, Output, TiedOutput
from formery.parts.feedforward import MLP, GatedMLP
from formery.parts.kernels import Packing, attend, kernel
from formery.parts.linear import Linear
from formery.parts.mask import Mask, block_causal, causal, dilated, everything, prefix, window
from formery.parts.norm import LayerNorm, RMSNorm
from formery.parts.part import Described, Part, build
from formery.parts.position import (
    Alibi,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Position,
    RelativeBuckets,
    Rotary,
    Sinusoidal,
)
from formery.parts.residual import Layer, Parallel, PostNorm, PreNorm, Sandwich
from formery.parts.state import KeyValues, LayerState, Memory, Slots, State

__all__ = [
    "MLP",
    "Alibi",
    "Attention",
    "Context",
    "CrossAttention",
    "Described",
    "Embedding",
    "GatedMLP",
    "KeyValues",
    "Layer",
    "LayerNorm",
    "LayerState",
    "Learned",
    "Linear",
    "LinearScaling",
    "Llama3Scaling",
    "Mask",
    "Memory",
    "Output",
    "Packing",
    "Parallel",
    "Part",
    "Position",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "RelativeBuckets",
    "Rotary",
    "Sandwich",
    "Sinusoidal",
    "Slots",
    "State",
    "TiedOutput",
    "Visibility",
    "attend",
    "block_causal",
    "build",
    "causal",
    "dilated",
    "everything",
    "kernel",
    "prefix",
    "window",
]
