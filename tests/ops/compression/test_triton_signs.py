"""The reference gives the bits of its definition, the kernels give its bits, errors and means; by parts as by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ops.compression import signs, triton_signs
from ops.compression.parts import cut
from tests.ops.compression.equations import noise
from tests.ops.devices import DEVICES

TRUE = torch.tensor(True)


#: By name: how n elements are parted. Boundaries within bytes and at them, none, many in a byte, beyond a block.
PARTS = {
    "one": lambda n: (n,),
    "odd": lambda n: (n // 3, n // 5, n - n // 3 - n // 5),
    "empty": lambda n: (0, 0, n // 8 * 4, 0, n - n // 8 * 4, 0),
    "tiny": lambda n: (*[1] * min(n, 21), max(n - 21, 0)),
    "long": lambda n: (min(n, 3), max(n - 8, 0), min(max(n - 3, 0), 5)),
}


def parted(kind: str, n: int) -> tuple[int, ...]:
    parts = PARTS[kind](n)
    assert sum(parts) == n
    return parts


@pytest.fixture(params=[64, triton_signs.BLOCK])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a program: a few bytes, and as many as are used."""
    monkeypatch.setattr(triton_signs, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("blocks", "more"), [(0, 0), (0, 1), (0, 13), (1, 0), (2, 5)])
def test_pack(blocks: int, more: int, kind: str, dtype: torch.dtype, device: str, block: int) -> None:
    n = blocks * block + more
    parts = parted(kind, n)
    x, error = noise(n, 0).to(dtype), noise(n, 1) / 3
    scales, mine = signs.measure(x, error, parts), error.clone()
    wanted, packed = (torch.full((-(-n // 8) + 3,), 77, dtype=torch.uint8) for _ in range(2))
    signs.pack(x, error, parts, scales, TRUE, wanted)
    x, mine, packed = x.to(device), mine.to(device), packed.to(device)
    torch.testing.assert_close(triton_signs.measure(x, mine, parts).cpu(), scales, rtol=1e-5, atol=0)
    before = mine.clone()
    triton_signs.pack(x, mine, parts, scales.to(device), ~TRUE.to(device), packed)
    assert torch.equal(mine, before)
    triton_signs.pack(x, mine, parts, scales.to(device), TRUE.to(device), packed)
    assert torch.equal(packed.cpu(), wanted)
    assert torch.equal(mine.cpu(), error)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize(("blocks", "more", "size"), [(0, 1, 1), (0, 9, 5), (1, 5, 3), (2, 0, 2), (5, 3, 2)])
def test_unpack(blocks: int, more: int, size: int, kind: str, dtype: torch.dtype, device: str, block: int) -> None:
    n = blocks * block + more
    found = cut(parted(kind, n), size)
    # Rows with a gap between them, as the exchange leaves them.
    rows = torch.randint(0, 256, (size, found.row + 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed, scales = rows[:, :-4], torch.arange(1.0, 1 + size * found.most).view(size, found.most) / 3
    wanted, out = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype, device=device)
    signs.unpack(packed, scales, found.pieces, wanted)
    triton_signs.unpack(rows.to(device)[:, :-4], scales.to(device), found.pieces, out)
    # The interpreter cuts bf16 off where a GPU rounds.
    torch.testing.assert_close(out.cpu(), wanted, rtol=torch.finfo(dtype).eps, atol=0)
    votes = torch.arange(1.0, 1 + size * len(found.parts)).view(size, -1) / 3
    for first, pieces in zip(found.firsts, found.pieces, strict=True):
        # A part of the scales, as all ranks' are more.
        theirs = votes[:, first : first + len(pieces)]
        mean, wanted_mean = torch.empty(sum(pieces), device=device), torch.empty(sum(pieces))
        signs.mean_of_signs(packed, theirs, pieces, wanted_mean)
        moved = votes.to(device)[:, first : first + len(pieces)]
        triton_signs.mean_of_signs(rows.to(device)[:, :-4], moved, pieces, mean)
        # Signs cancel: what a sum of as many terms rounds is of the size of the terms.
        rounding = size / 2 * torch.finfo(torch.float32).eps * float(theirs.max())
        torch.testing.assert_close(mean.cpu(), wanted_mean, rtol=0, atol=rounding)


@pytest.mark.parametrize("device", DEVICES)
def test_many_sums_of_one_part(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are added up at a time, beside parts of fewer and of none."""
    monkeypatch.setattr(triton_signs, "BLOCK", 64)
    monkeypatch.setattr(triton_signs, "SUMS", 4)
    parts = (100, 0, 1000, 3, 0)
    x, error = noise(sum(parts), 0), noise(sum(parts), 1)
    found = triton_signs.measure(x.to(device), error.to(device), parts).cpu()
    torch.testing.assert_close(found, signs.measure(x, error, parts), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("n", [1, 13, 1001, signs.BLOCK + 21])
def test_the_reference_by_its_definition(n: int, kind: str) -> None:
    """Element by element: each with its part's scale, wherever in a byte the part begins."""
    parts = parted(kind, n)
    x, error = noise(n, 0), noise(n, 1) / 3
    b = x + error
    scales = torch.stack([part.double().square().sum().div(max(len(part), 1)).sqrt() for part in b.split(parts)])
    found = signs.measure(x, error, parts)
    torch.testing.assert_close(found.double(), scales, rtol=1e-5, atol=0)
    each = found.repeat_interleave(torch.tensor(parts))
    packed = torch.empty(-(-n // 8), dtype=torch.uint8)
    signs.pack(x, error, parts, found, TRUE, packed)
    assert torch.equal(error, b - torch.where(b >= 0, each, -each))
    assert packed.tolist() == np.packbits(b.numpy() >= 0, bitorder="little").tolist()
    out, mean = torch.empty(n), torch.empty(n)
    signs.unpack(packed[None], found[None], (parts,), out)
    assert torch.equal(out, torch.where(b >= 0, each, -each))
    signs.mean_of_signs(torch.stack([packed, ~packed]), torch.stack([found, 3 * found]), parts, mean)
    torch.testing.assert_close(mean, torch.where(b >= 0, -each, each), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("skipped", [1, 3, 8])
@pytest.mark.parametrize("n", [5, 8, signs.BLOCK + 21])
def test_unpack_into_a_part_of_a_buffer(n: int, skipped: int, dtype: torch.dtype) -> None:
    """Beginning at any element, in the dtype's rounding of the scale."""
    packed = torch.randint(0, 256, (-(-n // 8) + 4,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.full((skipped + n + 1,), 7.0, dtype=dtype)
    signs.unpack(packed[None], torch.tensor([[1 / 3]]), ((n,),), whole[skipped:-1])
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
    signs.pack(x, error, (n,), scale, TRUE, packed)
    assert packed[:-3].tolist() == np.packbits(b.numpy() >= 0, bitorder="little").tolist()
    assert not packed[-3:].any()
    assert torch.equal(error, b - torch.where(b >= 0, scale, -scale))
