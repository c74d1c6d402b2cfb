"""Weights as the CUDA C++ kernels read them: plain, by their addresses."""

from __future__ import annotations

from torch import Tensor

from ops.weights import Linear, ModelWeights, Norm


def not_plain(weights: ModelWeights) -> str | None:
    """Why kernels that read plain weights cannot read these, in one line, or None."""
    linears = [linear for layer in weights.layers for linear in (layer.qkv, layer.out, layer.up, layer.down)]
    found = next((linear.weight for linear in linears if not isinstance(linear.weight, Tensor)), None)
    return None if found is None else f"it reads plain weights, not {type(found).__name__}"


def norm_parts(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias."""
    return (None, None) if norm is None else (norm.weight, norm.bias)


def linear_parts(linear: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain one."""
    assert isinstance(linear.weight, Tensor), "other weights have been refused"
    return linear.weight, linear.bias


def address(tensor: Tensor | None) -> int:
    """Where it begins, 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 16 == 0, "bulk copies and vector loads need 16-byte addresses"
    return tensor.data_ptr()
