"""Bias, activation and gate of the generic set against their definitions in fp64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from ops import reference
from ops.errors import KernelError
from ops.generic.activation import activate
from ops.spec import Activation
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = get_args(Activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate(device: str, dtype: torch.dtype, gated: bool, activation: Activation) -> None:
    for rows, n in ((1, 300), (5, 33), (0, 8), (2, 1)):
        width = 2 * n if gated else n
        x = noise(rows, width, dtype=dtype) * 4
        for bias in (noise(width, dtype=dtype, seed=1), None):
            ours = activate(x.to(device), None if bias is None else bias.to(device), activation, gated=gated)
            exact = reference.activate(x.double(), None if bias is None else bias.double(), activation, gated)
            assert ours.dtype == dtype
            assert_near(ours, exact, dtype, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_values_and_what_is_not_finite(device: str, activation: Activation) -> None:
    """Nothing overflows on the way, and NaN is not hidden."""
    x = torch.tensor([[-3e4, -90.0, -1e-3, -0.0, 0.0, 1e-3, 90.0, 3e4, torch.nan]])
    ours = activate(x.to(device), None, activation).cpu()
    assert bool(ours[0, -1].isnan())
    assert_near(ours[:, :-1], reference.activation(x.double(), activation)[:, :-1].nan_to_num(0.0), torch.float32, 4)


@pytest.mark.parametrize("device", DEVICES)
def test_small_values_keep_their_digits(device: str) -> None:
    """tanh by exponentials alone would lose them; across the seam of its two formulas too."""
    x = torch.cat((torch.logspace(-6, 0.5, 200), torch.linspace(0.19, 0.21, 50)))[None]
    exact = torch.tanh(x.double())
    ours = activate(x.to(device), None, "tanh").cpu().double()
    assert float(((ours - exact) / exact).abs().max()) < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    x = noise(4, 6, device=device)
    with pytest.raises(KernelError, match=r"activate: x has strides \(1, 4\)"):
        activate(noise(6, 4, device=device).t(), None, "relu")
    with pytest.raises(KernelError, match=r"activate: bias has shape \[3\], wanted \[6\]"):
        activate(x, noise(3, device=device), "relu", gated=True)
    with pytest.raises(KernelError, match=r"activate: bias is torch\.bfloat16"):
        activate(x, noise(6, dtype=torch.bfloat16, device=device), "relu")
    with pytest.raises(KernelError, match=r"activate: x has shape \[4, 5\], wanted \[T, 2 n\]"):
        activate(noise(4, 5, device=device), None, "relu", gated=True)
    with pytest.raises(KernelError, match="activate: bias is on meta"):
        activate(x, noise(6, device="meta"), "relu")
