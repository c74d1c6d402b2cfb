"""The linear layer of the ``eager`` set."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ops.quantization.reference import dequantize
from ops.quantization.tensor import QuantizedTensor
from ops.weights import Linear


def linear(x: Tensor, layer: Linear, *, bias: bool = True) -> Tensor:
    """``x W^T (+ b)``: ``x`` [T, in] to [T, out] in ``x``'s dtype. A quantized weight is dequantized first: the
    reference."""
    weight = layer.weight
    added = layer.bias if bias else None
    if isinstance(weight, QuantizedTensor):
        weight = dequantize(weight, x.dtype)
    if isinstance(weight, Tensor):
        return F.linear(x, weight, added)
    product = weight.apply(x)
    return product if added is None else product.add_(added)
