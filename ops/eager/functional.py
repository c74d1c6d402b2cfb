"""The small ops of the ``eager`` set: norm, activation, rotary, embedding. Plain PyTorch on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.plan import StepInputs
from ops.spec import Activation, ModelSpec, RotaryPositions
from ops.weights import Norm

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


def norm(x: Tensor, weights: Norm, spec: ModelSpec) -> Tensor:
    """The model's norm of the last axis of ``x`` [..., size]; statistics in fp32 whatever the dtype."""
    size = weights.weight.shape
    if spec.norm == "layernorm":
        return F.layer_norm(x, size, weights.weight, weights.bias, spec.norm_eps)
    return F.rms_norm(x, size, weights.weight, spec.norm_eps)


def rotary_tables(inputs: StepInputs, rotary: RotaryPositions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, 1, dim] of the step's positions, each pair's value on both of its elements; once a step.

    Angles are computed in fp32 and rounded to ``dtype`` at the end, as Hugging Face does.
    """
    tables: tuple[Tensor, Tensor] | None = inputs.memo.get("rotary")
    if tables is None:
        positions = inputs.positions.float()[:, None]
        angles = positions * torch.tensor(rotary.inv_freq, dtype=torch.float32, device=positions.device)
        angles = angles.repeat_interleave(2, -1) if rotary.interleaved else torch.cat((angles, angles), -1)
        angles = angles[:, None]
        tables = ((angles.cos() * rotary.factor).to(dtype), (angles.sin() * rotary.factor).to(dtype))
        inputs.memo["rotary"] = tables
    return tables


def rotate(x: Tensor, inputs: StepInputs, rotary: RotaryPositions) -> Tensor:
    """Rotary embedding of ``x`` [T, heads, head_dim] at the step's positions; a new tensor."""
    cos, sin = rotary_tables(inputs, rotary, x.dtype)
    turned = x[..., : rotary.dim]
    if rotary.interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    else:
        half = rotary.dim // 2
        partner = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    result = turned * cos + partner * sin
    return result if rotary.dim == x.shape[-1] else torch.cat((result, x[..., rotary.dim :]), dim=-1)
