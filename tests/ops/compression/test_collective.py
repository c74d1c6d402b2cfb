"""Whether numbers are finite, against the definition."""

from __future__ import annotations

import pytest
import torch

from ops.compression.collective import all_finite

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_anywhere(bad: float, dtype: torch.dtype, device: str) -> None:
    """In whole vectors of the processor and behind them; the largest finite numbers are finite."""
    for n in (1, 2, 67):
        numbers = (torch.linspace(-1, 1, n, dtype=torch.float64) * torch.finfo(dtype).max).to(dtype).to(device)
        assert all_finite([numbers])
        for at in range(n):
            spoilt = numbers.clone()
            spoilt[at] = bad
            assert not all_finite([spoilt])


@pytest.mark.parametrize("device", DEVICES)
def test_several_tensors(device: str) -> None:
    """Empty, of one element, transposed, of several dtypes: 1e300 is finite."""
    tensors = [torch.zeros(shape, device=device) for shape in ((0,), ())] + [torch.zeros(2, 3, device=device).t()]
    tensors += [torch.full((3,), 1e300, dtype=torch.float64, device=device)]
    tensors += [torch.ones(3, dtype=dtype, device=device) for dtype in DTYPES]
    found = all_finite(tensors)
    assert found
    assert (found.shape, found.dtype, found.device) == ((), torch.bool, tensors[0].device)
    for at, tensor in enumerate(tensors[1:], 1):
        spoilt = [*tensors]
        spoilt[at] = tensor.clone()
        spoilt[at][(-1,) * tensor.dim()] = torch.nan
        assert not all_finite(spoilt)


def test_nothing_is_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.zeros(0), torch.zeros(3, 0)])
