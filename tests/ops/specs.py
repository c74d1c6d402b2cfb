"""Small specs and weights for tests of the kernel sets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ops.spec import ModelSpec, NoPositions

BASE = ModelSpec(
    family="test",
    vocab_size=50,
    hidden=48,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=8,
    ffn=40,
    activation="silu",
    norm="rmsnorm",
    norm_eps=1e-5,
    placement="pre",
    positions=NoPositions(),
    max_positions=128,
    attention_scale=0.3,
    causal=True,
)


def spec(**changes: Any) -> ModelSpec:
    """The base spec with ``changes``."""
    return replace(BASE, **changes)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Reproducible normal numbers, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(device, dtype)


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Relative to the largest output: a rounding of inputs and result, and a random walk over a sum of ``terms``."""
    return torch.finfo(dtype).eps * (2 + terms**0.5)


def assert_near(ours: Tensor, exact: Tensor, dtype: torch.dtype, terms: int) -> None:
    """``ours`` is ``exact`` (fp64) to :func:`tolerance`."""
    assert ours.shape == exact.shape
    if exact.numel():
        limit = tolerance(dtype, terms) * max(float(exact.abs().max()), 1.0)
        assert float((ours.double().cpu() - exact.double().cpu()).abs().max()) <= limit
