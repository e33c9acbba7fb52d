"""Layers that mix the tokens of a sequence otherwise than by attention; each file one."""

from formery.parts.mixers.mamba2 import CausalConvolution, GatedRMSNorm, Mamba2

__all__ = ["CausalConvolution", "GatedRMSNorm", "Mamba2"]
