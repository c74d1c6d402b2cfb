"""The compressed mean: bits, the paper's equations, real processes, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.compression import CompressionError, Errors, GradientCollective, SimulatedProcesses, SingleProcess, chunk_of
from ops.compression.signs import left_behind, pack, root_mean_square, unpack
from tests.ops.compression import processes
from tests.ops.devices import DEVICES


def together(size: int, run: Callable[[GradientCollective], Any]) -> list[Any]:
    """``run`` in a thread for each virtual process."""
    group, results = SimulatedProcesses(size), [None] * size

    def one(rank: int) -> None:
        results[rank] = run(group.of(rank))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("device", DEVICES)
@settings(deadline=None, max_examples=30)
@given(count=st.integers(0, 70), more=st.integers(0, 3))
def test_signs_go_and_come_back(device: str, count: int, more: int) -> None:
    """Of any number of elements, in more bytes than are needed; zero counts as positive, minus zero too."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    values[::5] = 0.0
    values[1::7] = -0.0
    size = -(-count // 8) * 8 + 8 * more
    packed = pack(values.to(device), size)
    wanted = np.packbits(np.pad(values.numpy() >= 0, (0, size - count), constant_values=True), bitorder="little")
    assert packed.dtype == torch.uint8
    assert np.array_equal(packed.cpu().numpy(), wanted)
    scale = torch.tensor(0.25, device=device)
    back = unpack(packed, scale, count).cpu()
    assert torch.equal(back, torch.where(values >= 0, 0.25, -0.25))
    assert torch.equal(left_behind(values.to(device), scale).cpu(), values - back)


def test_root_mean_square() -> None:
    assert float(root_mean_square(torch.tensor([3.0, 4.0]))) == pytest.approx(12.5**0.5)
    assert float(root_mean_square(torch.zeros(0))) == 0
    assert root_mean_square(torch.tensor([1.0, torch.nan])).isnan()


class Paper:
    """Algorithm 1 of arXiv 2102.02888 and section 4.2, in double precision."""

    def __init__(self, count: int, size: int) -> None:
        chunk = -(-count // (8 * size)) * 8
        self.parts = [slice(min(j * chunk, count), min((j + 1) * chunk, count)) for j in range(size)]
        self.worker = np.zeros((size, count))
        self.server = np.zeros(count)

    def mean(self, given: np.ndarray) -> np.ndarray:
        """[size, count]: what all get."""
        values = given + self.worker
        scales = np.sqrt((values**2).mean(1, keepdims=True))
        sent = scales * np.where(values >= 0, 1, -1)
        self.worker = values - sent
        whole = sent.mean(0) + self.server
        out = np.zeros_like(whole)
        for part in self.parts:
            if whole[part].size:
                out[part] = np.sqrt((whole[part] ** 2).mean()) * np.where(whole[part] >= 0, 1, -1)
        self.server = whole - out
        return out


@pytest.mark.parametrize("count", [1, 8, 50, 133])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_papers_equations(size: int, count: int) -> None:
    """Over several rounds, errors carried on; and what was given is what was got and what is still owed."""
    paper = Paper(count, size)
    given = torch.randn(6, size, count, generator=torch.Generator().manual_seed(count))

    def run(collective: GradientCollective) -> tuple[list[Tensor], Errors]:
        errors, found = Errors.zeros(count, size), []
        for one in given:
            buffer = one[collective.rank].clone()
            collective.compressed_mean(buffer, errors).wait()
            found.append(buffer)
        return found, errors

    results = together(size, run) if size > 1 else [run(SingleProcess())]
    wanted = [paper.mean(one.double().numpy()) for one in given]
    for rank, (found, errors) in enumerate(results):
        np.testing.assert_allclose(torch.stack(found).numpy(), np.stack(wanted), rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(errors.worker.numpy(), paper.worker[rank], rtol=2e-4, atol=1e-5)
    owed = torch.stack([errors.worker for _, errors in results]).mean(0)
    owed += torch.cat([errors.server for _, errors in results])[:count]
    torch.testing.assert_close(torch.stack(results[0][0]).sum(0) + owed, given.mean(1).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_real_processes_over_gloo(size: int, tmp_path: Path) -> None:
    """Bit for bit what virtual ones compute, with all buffers on their way at a time; and the bytes are counted."""
    mp.spawn(processes.main, (size, str(tmp_path), "gloo"), nprocs=size)
    compare(size, tmp_path, "gloo")


@pytest.mark.multigpu
def test_real_processes_over_nccl(tmp_path: Path) -> None:
    mp.spawn(processes.main, (2, str(tmp_path), "nccl"), nprocs=2)
    compare(2, tmp_path, "nccl", exact=False)


def compare(size: int, folder: Path, backend: str, exact: bool = True) -> None:
    """Files of real processes, beside virtual ones."""
    for rank, virtual in enumerate(together(size, processes.exchanged)):
        real = torch.load(folder / f"{backend}-{size}-{rank}.pt", weights_only=True)
        for (found, plain), (wanted, same) in zip(real[0], virtual[0], strict=True):
            for mine, other in zip(found, wanted, strict=True):
                assert torch.equal(mine, other) if exact else torch.allclose(mine, other, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(plain, same, rtol=1e-5, atol=1e-6)
        for mine, other in zip(real[1], virtual[1], strict=True):
            torch.testing.assert_close(mine, other, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-5)
        chunks = [chunk_of(count, size) // 8 + 4 for count, _ in processes.BUFFERS]
        each = sum(2 * (size - 1) * chunk for chunk in chunks)
        plain_bytes = sum(2 * (size - 1) * count * 4 // size for count in (6, 5))
        assert virtual[2] == processes.ROUNDS * (each + plain_bytes)
        assert abs(real[2] - virtual[2]) <= processes.ROUNDS, "real ones send several tensors as one"


def test_a_number_that_is_none_reaches_all_and_no_error() -> None:
    def run(collective: GradientCollective) -> tuple[Tensor, Errors, Errors]:
        errors = Errors.zeros(20, 2)
        collective.compressed_mean(torch.randn(20), errors).wait()
        before = Errors(errors.worker.clone(), errors.server.clone())
        buffer = torch.randn(20)
        if collective.rank:
            buffer[3] = torch.inf
        collective.compressed_mean(buffer, errors).wait()
        return buffer, errors, before

    for buffer, errors, before in together(2, run):
        assert buffer.isnan().all()
        assert torch.equal(errors.worker, before.worker)
        assert torch.equal(errors.server, before.server)


@pytest.mark.parametrize(
    ("buffer", "errors", "message"),
    [
        (torch.zeros(4, 2), Errors.zeros(8, 1), r"takes a contiguous fp32, fp16 or bf16 tensor \[n\], got .* \[4, 2\]"),
        (torch.zeros(8)[::2], Errors.zeros(4, 1), "contiguous"),
        (torch.zeros(4, dtype=torch.float64), Errors.zeros(4, 1), "got torch.float64"),
        (
            torch.zeros(4),
            Errors.zeros(5, 1),
            r"the worker error is torch.float32 \[5\] on cpu, wanted fp32 \[4\] on cpu",
        ),
        (torch.zeros(20), Errors.zeros(20, 3), r"the server error is torch.float32 \[8\] on cpu, wanted fp32 \[24\]"),
    ],
)
def test_tensors_that_do_not_fit(buffer: Tensor, errors: Errors, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        SingleProcess().compressed_mean(buffer, errors)


def test_an_aborted_group_ends_all_waits() -> None:
    group = SimulatedProcesses(2)
    ended: list[bool] = []

    def wait() -> None:
        with pytest.raises(threading.BrokenBarrierError):
            group.exchange(0, 1)
        ended.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    group.abort()
    waiting.join(10)
    assert ended == [True]
