"""Norms of the generic set against their definition in fp64."""

from __future__ import annotations

import pytest
import torch

from ops import reference
from ops.errors import KernelError
from ops.generic.launch import WIDEST_ROW
from ops.generic.norm import norm
from ops.spec import NormKind
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["layernorm", "rmsnorm"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 48), (7, 33), (0, 16), (3, 5, 8), (2, 1), (2, 152), (1, WIDEST_ROW + 3)])
def test_norm(device: str, dtype: torch.dtype, kind: NormKind, shape: tuple[int, ...]) -> None:
    x = noise(*shape, dtype=dtype) * 3 + 1
    weight = noise(shape[-1], dtype=dtype, seed=1) + 1
    for bias in (noise(shape[-1], dtype=dtype, seed=2), None):
        place = [None if t is None else t.to(device) for t in (weight, bias)]
        ours = norm(x.to(device), place[0], place[1], kind, 1e-5)
        exact = reference.norm(x.double(), kind, weight.double(), None if bias is None else bias.double(), 1e-5)
        assert ours.dtype == dtype
        assert_near(ours, exact, dtype, shape[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [96, WIDEST_ROW + 3])
def test_a_large_mean_does_not_cancel(device: str, width: int) -> None:
    """E[x^2] - E[x]^2 in fp32 would leave nothing of a deviation of 1 beside a mean of 3000."""
    x = noise(2, width) + 3000
    ours = norm(x.to(device), torch.ones(width, device=device), None, "layernorm", 0.0)
    exact = reference.norm(x.double(), "layernorm", torch.ones(width).double(), None, 0.0)
    assert float((ours.cpu().double() - exact).abs().max()) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_eps_counts(device: str) -> None:
    x = noise(2, 24) * 1e-3
    for kind in ("layernorm", "rmsnorm"):
        ours = norm(x.to(device), torch.ones(24, device=device), None, kind, 1e-5)
        assert_near(ours, reference.norm(x.double(), kind, torch.ones(24).double(), None, 1e-5), torch.float32, 24)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    x, weight = noise(4, 6, device=device), noise(6, device=device)
    with pytest.raises(KernelError, match=r"norm: x has strides \(1, 4\): call \.contiguous\(\)"):
        norm(noise(6, 4, device=device).t(), weight, None, "rmsnorm", 1e-5)
    with pytest.raises(KernelError, match=r"norm: weight is torch.float16, the first tensor torch.float32: cast it"):
        norm(x, weight.half(), None, "rmsnorm", 1e-5)
    with pytest.raises(KernelError, match=r"norm: weight has shape \[5\], wanted \[6\]"):
        norm(x, weight[:5], None, "rmsnorm", 1e-5)
    with pytest.raises(KernelError, match=r"norm: bias has shape \[7\], wanted \[6\]"):
        norm(x, weight, noise(7, device=device), "layernorm", 1e-5)
    with pytest.raises(KernelError, match="norm: weight is on meta, the first tensor on"):
        norm(x, weight.to("meta"), None, "rmsnorm", 1e-5)
    with pytest.raises(KernelError, match=r"norm: x is torch\.float64: cast it to fp32, bf16 or fp16"):
        norm(x.double(), weight.double(), None, "rmsnorm", 1e-5)


def test_a_cpu_is_refused_where_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.generic.launch.interpreted", lambda: False)
    with pytest.raises(KernelError, match="norm: x is on cpu: move it to a CUDA GPU"):
        norm(noise(2, 6), noise(6), None, "rmsnorm", 1e-5)
