"""What models are made of; each file one small module with one job."""

from formery.parts.attention import Attention, CrossAttention
from formery.parts.codes import Codes
from formery.parts.context import Context, Visibility
from formery.parts.embed import Embedding, Output, TiedOutput
from formery.parts.experts import Experts
from formery.parts.feedforward import MLP, GatedMLP
from formery.parts.head import Classifier, FirstPlace, MaskedOutput, MeanPool, Normalised, Pooler
from formery.parts.kernels import Packing, attend, kernel
from formery.parts.linear import Linear
from formery.parts.mask import Mask, block_causal, causal, dilated, everything, prefix, window
from formery.parts.mixers import CausalConvolution, GatedRMSNorm, Mamba2
from formery.parts.nested import Nested
from formery.parts.norm import AcrossHeads, LayerNorm, RMSNorm
from formery.parts.part import Described, Part, build
from formery.parts.patches import Patches
from formery.parts.position import (
    Alibi,
    Learned,
    LinearScaling,
    Llama3Scaling,
    Position,
    RelativeBuckets,
    Rotary,
    Sinusoidal,
    Together,
    TokenTypes,
    YarnScaling,
)
from formery.parts.recurrence import RecurrentState
from formery.parts.residual import Layer, Parallel, PostNorm, PreNorm, Sandwich
from formery.parts.state import KeyValues, LayerState, Memory, Slots, State
from formery.parts.stem import SpeechStem

__all__ = [
    "MLP",
    "AcrossHeads",
    "Alibi",
    "Attention",
    "CausalConvolution",
    "Classifier",
    "Codes",
    "Context",
    "CrossAttention",
    "Described",
    "Embedding",
    "Experts",
    "FirstPlace",
    "GatedMLP",
    "GatedRMSNorm",
    "KeyValues",
    "Layer",
    "LayerNorm",
    "LayerState",
    "Learned",
    "Linear",
    "LinearScaling",
    "Llama3Scaling",
    "Mamba2",
    "Mask",
    "MaskedOutput",
    "MeanPool",
    "Memory",
    "Nested",
    "Normalised",
    "Output",
    "Packing",
    "Parallel",
    "Part",
    "Patches",
    "Pooler",
    "Position",
    "PostNorm",
    "PreNorm",
    "RMSNorm",
    "RecurrentState",
    "RelativeBuckets",
    "Rotary",
    "Sandwich",
    "Sinusoidal",
    "Slots",
    "SpeechStem",
    "State",
    "TiedOutput",
    "Together",
    "TokenTypes",
    "Visibility",
    "YarnScaling",
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
