"""Attention and products with weights, each behind one function.

`attend` computes `softmax(scale · query · keyᵀ + bias) · value` where allowed, `product` a linear map.
"""

from formery.parts.kernels.choose import KERNELS, attend, kernel
from formery.parts.kernels.product import Packing, product

__all__ = ["KERNELS", "Packing", "attend", "kernel", "product"]
