"""Where a decode step's new tokens go, computed on the device."""

from __future__ import annotations

import pytest
import torch

from ops.errors import KernelError
from ops.generic.decoder import place
from tests.ops.devices import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 0])
def test_place(device: str, rows: int) -> None:
    positions = torch.tensor([0, 7, 8])[:rows].to(device)
    table = torch.tensor([[4, 1, 9], [2, 5, 0], [3, 8, 2**30]], dtype=torch.int32)[:rows].to(device)
    slots, context = place(positions, table, 4)
    assert (slots.dtype, context.dtype) == (torch.int64, torch.int32)
    assert slots.tolist() == [16, 23, 2**32][:rows]
    assert context.tolist() == [1, 8, 9][:rows]


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    positions = torch.arange(2, device=device)
    table = torch.zeros(2, 3, dtype=torch.int32, device=device)
    with pytest.raises(KernelError, match=r"place: positions is torch\.int32"):
        place(positions.int(), table, 4)
    with pytest.raises(KernelError, match=r"place: block_table is torch\.int64"):
        place(positions, table.long(), 4)
    with pytest.raises(KernelError, match=r"place: block_table has shape \[3, 2\], wanted \[2, 2\]"):
        place(positions, table.t(), 4)
    with pytest.raises(KernelError, match=r"place: block_table has shape \[2\], wanted \[R, pages\]"):
        place(positions, table[:, 0], 4)
