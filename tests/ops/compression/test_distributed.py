"""Real processes: Gloo and NCCL give the virtual ranks' bits, whatever is in flight together; bytes; faults."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ops.compression import Errors, SimulatedCollective, TorchCollective
from ops.compression import collective as collectives
from ops.errors import KernelError
from tests.ops.compression.equations import noise

SIZES = (0, 1, 7, 64, 1001)
#: Of buffers of these sizes.
PARTS = (None, (1,), (0, 2, 5), (63, 1), (10, 3, 0, 700, 1, 1, 286))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def data(n: int, at: int, rank: int, dtype: torch.dtype, device: str) -> Tensor:
    return (noise(n, 10 * at + rank) * (1 + rank)).to(dtype).to(device)


def same_as_virtual_ranks(rank: int, size: int, device: str) -> None:
    """Buckets of several sizes in flight together, a full mean between them, waits in another order."""
    real, virtual = TorchCollective(), SimulatedCollective(size)
    for dtype in DTYPES:
        mine = [Errors.zeros(n, rank, size, device) for n in SIZES]
        theirs = [[Errors.zeros(n, each, size, device) for n in SIZES] for each in range(size)]
        for at in range(2):
            buckets = [data(n, at, rank, dtype, device) for n in SIZES]
            full = [data(5, at, rank, dtype, device), data(6, at, rank, torch.float32, device).view(2, 3).t()]
            pending = [real.compressed_mean(*each) for each in zip(buckets, mine, PARTS, strict=True)]
            pending.insert(2, real.mean(full))
            assert all(bool(each.wait()) for each in pending[::-1])
            for n, bucket, index in zip(SIZES, buckets, range(len(SIZES)), strict=True):
                others = [data(n, at, each, dtype, device) for each in range(size)]
                for each, other in enumerate(others):
                    virtual.ranks[each].compressed_mean(other, theirs[each][index], PARTS[index])
                assert torch.equal(bucket, others[0])
            for index, errors in enumerate(mine):
                assert torch.equal(errors.worker, theirs[rank][index].worker)
                assert torch.equal(errors.server, theirs[rank][index].server)
            for tensor, wanted in zip(full, exact_means(at, size, dtype), strict=True):
                limit = 4 * torch.finfo(tensor.dtype).eps
                torch.testing.assert_close(tensor.double().cpu(), wanted, rtol=limit, atol=limit)
    assert real.sent == virtual_sent(real, virtual, rank)


def exact_means(at: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    first = torch.stack([data(5, at, each, dtype, "cpu").double() for each in range(size)]).mean(0)
    second = torch.stack([data(6, at, each, torch.float32, "cpu").double() for each in range(size)]).mean(0)
    return first, second.view(2, 3).t()


def virtual_sent(real: TorchCollective, virtual: SimulatedCollective, rank: int) -> object:
    found = virtual.ranks[rank].sent
    found.full = real.sent.full
    return found


def faults(rank: int, size: int, device: str) -> None:
    collective, errors = TorchCollective(), Errors.zeros(9, rank, size, device)
    buffer = torch.ones(9, device=device)
    if rank == size - 1:
        buffer[0] = torch.nan
    assert not collective.compressed_mean(buffer, errors, (5, 4)).wait()
    assert buffer.isnan().all()
    assert not errors.worker.any()
    assert not errors.server.any()


def full_mean_in_pieces(rank: int, size: int) -> None:
    """Several of each dtype: the mean, the same bits on all ranks; a fault in any of them on one rank shows on all."""
    shapes = ((4,), (5,), (30,), (0,), (3, 4), (), (7,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "PIECE_ELEMENTS", 10)
        pieces = collectives.flattened([torch.zeros(shape) for shape in shapes], size)
        assert [flat.numel() for _, flat in pieces] == [9, 30, 12, 8]
        for spoilt in (None, 0, 4, 8, 12, 3, 5, 9, 13):  # a tensor of each piece in fp16, then in fp32
            given = [in_two_dtypes(shapes, each) for each in range(size)]
            if spoilt is not None:
                given[-1][spoilt].view(-1)[-1] = torch.nan
            collective, mine = TorchCollective(), [tensor.clone() for tensor in given[rank]]
            assert bool(collective.mean(mine).wait()) == (spoilt is None)
            assert collective.sent.full == sum(2 * (size - 1) * t.numel() * t.element_size() // size for t in mine)
            for at, tensor in enumerate(mine):
                check_mean(tensor, torch.stack([one[at].double() for one in given]))


def in_two_dtypes(shapes: Sequence[tuple[int, ...]], rank: int) -> list[Tensor]:
    """Of each shape one tensor in fp16 and one in fp32, side by side."""
    values = [noise(math.prod(shape), 20 + 10 * at + rank).view(shape) for at, shape in enumerate(shapes)]
    return [tensor for value in values for tensor in (value.half(), value * 3)]


def check_mean(found: Tensor, given: Tensor) -> None:
    """``given`` [ranks, ...] in fp64: as many quotients and one sum less are rounded, none larger than the largest."""
    size, largest = len(given), float(given.nan_to_num(0).abs().amax()) if given.numel() else 0.0
    limit = size * torch.finfo(found.dtype).eps * largest
    torch.testing.assert_close(found.double(), given.mean(0), rtol=0, atol=limit, equal_nan=True)
    others = [torch.empty_like(found) for _ in range(size)]
    dist.all_gather(others, found)
    for other in others:
        torch.testing.assert_close(other, found, rtol=0, atol=0, equal_nan=True)


def rank_main(rank: int, size: int, store: str, backend: str) -> None:
    device = "cpu" if backend == "gloo" else f"cuda:{rank}"
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    same_as_virtual_ranks(rank, size, device)
    faults(rank, size, device)
    if device == "cpu":
        full_mean_in_pieces(rank, size)
    dist.destroy_process_group()


def gloo_on_gpu_main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    same_as_virtual_ranks(rank, 2, "cuda:0")
    faults(rank, 2, "cuda:0")
    dist.destroy_process_group()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, 3])
def test_gloo(size: int, tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.spawn(rank_main, (size, str(tmp_path / "store"), "gloo"), nprocs=size)


@pytest.mark.gpu
@pytest.mark.timeout(180)
def test_gloo_with_gpu_tensors(tmp_path: Path) -> None:
    mp.spawn(gloo_on_gpu_main, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.multigpu
@pytest.mark.timeout(180)
def test_nccl(tmp_path: Path) -> None:
    size = min(torch.cuda.device_count(), 3)
    mp.spawn(rank_main, (size, str(tmp_path / "store"), "nccl"), nprocs=size)


def test_no_process_group() -> None:
    with pytest.raises(KernelError, match="no process group"):
        TorchCollective()
