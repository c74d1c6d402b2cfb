"""The linear layer and the token embedding of the ``eager`` set."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.quantization.reference import dequantize, lookup
from ops.quantization.tensor import QuantizedTensor
from ops.weights import Linear

#: Elements of a quantized weight that are expanded at a time. On a CPU they stay in its cache until the product reads
#: them; a GPU has work for all its processors, and a launch or two less.
TILE = 1 << 18
GPU_TILE = 1 << 24


def linear(x: Tensor, layer: Linear, *, bias: bool = True) -> Tensor:
    """``x W^T (+ b)``: ``x`` [T, in] to [T, out] in ``x``'s dtype. A quantized weight is dequantized to that dtype, a
    tile of rows at a time: the reference."""
    weight = layer.weight
    added = layer.bias if bias else None
    if isinstance(weight, Tensor):
        return F.linear(x, weight, added)
    product = tiled_product(x, weight) if isinstance(weight, QuantizedTensor) else weight.apply(x)
    return product if added is None else product.add_(added)


def tiled_product(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """``x W^T`` [T, out]; the whole weight is never in ``x``'s dtype."""
    out, inner = weight.shape
    rows = max(1, (TILE if x.device.type == "cpu" else GPU_TILE) // inner)
    product = x.new_empty(x.shape[0], out)
    for start in range(0, out, rows):
        stop = min(start + rows, out)
        product[:, start:stop] = F.linear(x, dequantize(weight.rows(start, stop), x.dtype))
    return product


def embedded(index: Tensor, table: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` [T] of ``table`` as [T, width], in the table's dtype or, of a quantized one, in ``dtype``."""
    return lookup(table, index, dtype) if isinstance(table, QuantizedTensor) else F.embedding(index, table)
