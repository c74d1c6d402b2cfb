"""The reference gives the bits of its definition, the kernels give its bits, errors and means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ops.compression import signs, triton_signs
from ops.compression.errors import chunk_of
from tests.ops.compression.equations import noise
from tests.ops.devices import DEVICES

BLOCK = triton_signs.BLOCK
TRUE = torch.tensor(True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [0, 1, 13, BLOCK, 2 * BLOCK + 5])
def test_pack(n: int, dtype: torch.dtype, device: str) -> None:
    x, error = noise(n, 0).to(dtype), noise(n, 1) / 3
    scale, mine = signs.measure(x, error), error.clone()
    wanted, packed = (torch.full((-(-n // 8) + 3,), 77, dtype=torch.uint8) for _ in range(2))
    signs.pack(x, error, scale, TRUE, wanted)
    x, mine, packed = x.to(device), mine.to(device), packed.to(device)
    torch.testing.assert_close(triton_signs.measure(x, mine).cpu(), scale, rtol=1e-5, atol=0)
    before = mine.clone()
    triton_signs.pack(x, mine, scale.to(device), ~TRUE.to(device), packed)
    assert torch.equal(mine, before)
    triton_signs.pack(x, mine, scale.to(device), TRUE.to(device), packed)
    assert torch.equal(packed.cpu(), wanted)
    assert torch.equal(mine.cpu(), error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "size"), [(1, 1), (9, 5), (BLOCK + 5, 3), (2 * BLOCK, 2)])
def test_unpack(n: int, size: int, dtype: torch.dtype, device: str) -> None:
    chunk = chunk_of(n, size)
    # Rows with a gap between them, as the exchange leaves them.
    rows = torch.randint(0, 256, (size, chunk // 8 + 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, scales = rows[:, :-4], torch.arange(1, size + 1) / 3
    wanted, out = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype, device=device)
    signs.unpack(packed, scales, chunk, wanted)
    triton_signs.unpack(rows.to(device)[:, :-4], scales.to(device), chunk, out)
    # The interpreter cuts bf16 off where a GPU rounds.
    torch.testing.assert_close(out.cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=0)
    part = min(chunk, n)
    mean, wanted_mean = torch.empty(part, device=device), torch.empty(part)
    signs.mean_of_signs(packed, scales, wanted_mean)
    triton_signs.mean_of_signs(rows.to(device)[:, :-4], scales.to(device), mean)
    torch.testing.assert_close(mean.cpu(), wanted_mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skipped", [1, 3, 8])
@pytest.mark.parametrize("n", [5, 8, signs.BLOCK + 21])
def test_unpack_into_a_part_of_a_buffer(n: int, skipped: int, dtype: torch.dtype) -> None:
    """Beginning at any element, in the dtype's rounding of the scale."""
    packed = torch.randint(0, 256, (-(-n // 8) + 4,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.full((skipped + n + 1,), 7.0, dtype=dtype)
    signs.unpack(packed[None], torch.tensor([1 / 3]), 8 * len(packed), whole[skipped:-1])
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), bitorder="little")[:n])
    step = torch.tensor(1 / 3).to(dtype)
    assert torch.equal(whole[skipped:-1], torch.where(bits.bool(), step, -step))
    assert whole[:skipped].eq(7).all()
    assert whole[-1] == 7


@pytest.mark.parametrize("n", [1, 8, 1001, signs.BLOCK + 21])
def test_bits_of_the_reference(n: int) -> None:
    """numpy's: an element's bit is 1 where it is not negative, -0 included; bits behind the last are 0."""
    x, error = noise(n, 0), noise(n, 1) / 3
    x[::5] = error[::5] = -0.0
    b, packed = x + error, torch.full((-(-n // 8) + 3,), 77, dtype=torch.uint8)
    scale = torch.tensor([0.7])
    signs.pack(x, error, scale, TRUE, packed)
    assert packed[:-3].tolist() == np.packbits(b.numpy() >= 0, bitorder="little").tolist()
    assert not packed[-3:].any()
    assert torch.equal(error, b - torch.where(b >= 0, scale, -scale))
