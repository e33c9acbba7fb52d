"""Kernels in C++ that run a whole stack of layers in one call, at the memory's speed, with the same bits at any width.

`using` says whether they may be used; `Program` is a stack as a list of steps; `lower` writes it from parts.
Everything here has a plain counterpart in PyTorch, the parts' own `forward`, which is used wherever these cannot be.
"""

from formery.parts.native.mode import enabled, prepare, using

__all__ = ["enabled", "prepare", "using"]
