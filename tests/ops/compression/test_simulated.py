"""Virtual ranks against the equations in double precision; faults; what is refused; errors on another world size."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.compression import Errors, SimulatedCollective, SingleProcess, for_other_size, signs
from ops.errors import KernelError
from tests.ops.compression.equations import noise, nothing_owed, step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def run(
    collective: SimulatedCollective, buffers: list[Tensor], errors: list[Errors], parts: Sequence[int] | None = None
) -> list[Tensor]:
    given = zip(collective.ranks, buffers, errors, strict=True)
    pending = [rank.compressed_mean(buffer, error, parts) for rank, buffer, error in given]
    return [each.wait() for each in pending]


def zeros(n: int, size: int, device: str = "cpu") -> list[Errors]:
    return [Errors.zeros(n, rank, size, device) for rank in range(size)]


def check_steps(
    n: int, size: int, dtype: torch.dtype, device: str, steps: int = 3, parts: Sequence[int] | None = None
) -> None:
    collective, errors, exact = SimulatedCollective(size), zeros(n, size, device), nothing_owed(n, size)
    for at in range(steps):
        # Sizes that differ between ranks, so that a mixed-up scale shows.
        buffers = [(noise(n, 100 * at + rank) * (1 + rank)).to(dtype) for rank in range(size)]
        wanted = step([buffer.double() for buffer in buffers], exact, parts)
        moved = [buffer.to(device) for buffer in buffers]
        assert all(bool(sound) for sound in run(collective, moved, errors, parts))
        for buffer in moved:
            assert torch.equal(buffer, moved[0])
        # Rounding to the dtype; fp32 sums of n squares, whose errors mostly cancel, and of errors over a few steps.
        summed = (64 + n**0.5) * torch.finfo(torch.float32).eps
        limit = torch.finfo(dtype).eps + summed
        torch.testing.assert_close(moved[0].cpu().double(), wanted, rtol=limit, atol=limit)
        for mine, worker in zip(errors, exact.workers, strict=True):
            torch.testing.assert_close(mine.worker.cpu().double(), worker, rtol=2 * summed, atol=2 * summed)
        server = torch.cat([mine.server for mine in errors]).cpu().double()
        torch.testing.assert_close(server, exact.server, rtol=2 * summed, atol=2 * summed)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(0, 300), st.integers(1, 5), st.sampled_from(DTYPES))
def test_any_size(n: int, size: int, dtype: torch.dtype) -> None:
    check_steps(n, size, dtype, "cpu")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 5), st.sampled_from(DTYPES))
def test_any_parts(parts: list[int], size: int, dtype: torch.dtype) -> None:
    """Also empty ones, none, and several in a byte or in a chunk."""
    check_steps(sum(parts), size, dtype, "cpu", parts=parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [(9,), (3, 0, 70, 1, 1, 1), (5000, 0, 4096, 3, 8193), (0, 1, 12287, 0)])
@pytest.mark.parametrize("size", [1, 3])
def test_parts(size: int, parts: tuple[int, ...], device: str) -> None:
    """Longer than a block of the kernels, cut by chunks, several in a byte."""
    check_steps(sum(parts), size, torch.float32, device, parts=parts)


@pytest.mark.parametrize(("parts", "small"), [(None, False), ((40,), False), ((21, 19), True)])
def test_a_scale_is_a_part_s_own(parts: Sequence[int] | None, small: bool) -> None:
    """Elements a millionth of their neighbours' size stay so."""
    buffers = [noise(40, rank) * (torch.arange(40) < 21).float().clamp(min=1e-6) for rank in range(2)]
    run(SimulatedCollective(2), buffers, zeros(40, 2), parts)
    assert bool(buffers[0][21:].abs().max() < 1e-5) is small


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "size"), [(1, 1), (1, 5), (9, 2), (2**18 + 13, 1), (2**18 + 13, 3)])
def test_blocks(n: int, size: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, and an end of one."""
    monkeypatch.setattr(signs, "BLOCK", 2**17)
    check_steps(n, size, dtype, device, steps=2)


@pytest.mark.parametrize("device", DEVICES)
def test_zero_is_positive(device: str) -> None:
    errors = zeros(3, 1, device)
    errors[0].worker[1] = -0.0
    buffer = torch.tensor([0.0, -0.0, -3.0], device=device)
    run(SimulatedCollective(1), [buffer], errors)
    assert torch.equal(buffer.sign().cpu(), torch.tensor([1.0, 1.0, -1.0]))
    torch.testing.assert_close(errors[0].worker.cpu(), torch.tensor([-(3**0.5), -(3**0.5), 3**0.5 - 3]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [None, (3, 0, 3, 3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fault_on_one_rank_is_seen_by_all_and_leaves_the_errors(
    bad: float, parts: Sequence[int] | None, device: str
) -> None:
    # Nine elements on three ranks: the last serves none.
    n, size = 9, 3
    collective, errors = SimulatedCollective(size), zeros(n, size, device)
    run(collective, [noise(n, rank).to(device) for rank in range(size)], errors, parts)
    before = [each.worker.clone() for each in errors] + [each.server.clone() for each in errors]
    buffers = [noise(n, rank).to(device) for rank in range(size)]
    buffers[1][4] = bad
    assert not any(bool(sound) for sound in run(collective, buffers, errors, parts))
    assert all(bool(buffer.isnan().all()) for buffer in buffers)
    after = [each.worker for each in errors] + [each.server for each in errors]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_what_is_owed_is_paid() -> None:
    """Over many steps the sum of what came is the sum of the means, up to what is still owed."""
    n, size = 50, 2
    collective, errors = SimulatedCollective(size), zeros(n, size)
    given_, came = torch.zeros(n), torch.zeros(n)
    for at in range(30):
        buffers = [noise(n, 2 * at + rank) for rank in range(size)]
        given_ += torch.stack(buffers).mean(0)
        run(collective, buffers, errors)
        came += buffers[0]
    torch.testing.assert_close(came + owed(errors), given_, rtol=1e-4, atol=1e-4)


def owed(errors: list[Errors]) -> Tensor:
    return torch.stack([each.worker for each in errors]).mean(0) + torch.cat([each.server for each in errors])


@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 5), (1, 4), (4, 1)])
@pytest.mark.parametrize("n", [0, 1, 37])
def test_another_world_size_owes_the_same(n: int, old: int, new: int) -> None:
    saved = zeros(n, old)
    for rank, each in enumerate(saved):
        each.worker += noise(n, rank)
        each.server += noise(n, 50 + rank)[: each.server.numel()]
    with pytest.warns(UserWarning, match=f"errors of {old} ranks go on with {new}"):
        found = [for_other_size(saved, rank, new) for rank in range(new)]
    torch.testing.assert_close(owed(found), owed(saved))
    run(SimulatedCollective(new), [noise(n, rank) for rank in range(new)], found)


def test_state_comes_back_bit_for_bit() -> None:
    saved = zeros(20, 2)
    saved[1].worker += noise(20, 0)
    saved[1].server += noise(4, 1)
    again = Errors.zeros(20, 1, 2)
    again.load_state_dict(saved[1].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = for_other_size(saved, 1, 2)
    for found in (again, other):
        assert torch.equal(found.worker, saved[1].worker)
        assert torch.equal(found.server, saved[1].server)
    with pytest.raises(KernelError, match=r"server was saved as torch\.float32 \[4\], wanted torch\.float32 \[16\]"):
        Errors.zeros(20, 0, 2).load_state_dict(saved[1].state_dict())
    with pytest.raises(KernelError, match=r"those of rank 0 have 20 and 4 elements, wanted 20 and 16"):
        for_other_size(saved[::-1], 0, 3)


def test_what_does_not_fit_is_refused() -> None:
    rank = SimulatedCollective(1).ranks[0]
    errors = Errors.zeros(6, 0, 1)
    for buffer, message in (
        (torch.zeros(2, 3), r"shape \[2, 3\]: flatten it"),
        (torch.zeros(6, dtype=torch.float64), r"is torch\.float64: cast it"),
        (torch.zeros(12)[::2], r"buffer has strides \(2,\)"),
        (torch.zeros(6, device="meta"), "is on meta"),
        (torch.zeros(7), r"worker error has shape \[6\], wanted \[7\] on rank 0 of 1"),
    ):
        with pytest.raises(KernelError, match=message):
            rank.compressed_mean(buffer, errors)
    with pytest.raises(KernelError, match=r"worker error is torch\.float16: keep errors in fp32"):
        rank.compressed_mean(torch.zeros(6), Errors(errors.worker.half(), errors.server))
    with pytest.raises(KernelError, match=r"mean: a tensor is torch\.int64"):
        rank.mean([torch.zeros(3, dtype=torch.int64)])
    for collective in (rank, SingleProcess()):
        with pytest.raises(KernelError, match="the parts have 5 elements in all, the buffer 6"):
            collective.compressed_mean(torch.zeros(6), errors, (2, 3))
        with pytest.raises(KernelError, match="part 1 has -1 elements: use 0 or more"):
            collective.compressed_mean(torch.zeros(6), errors, (7, -1))


def test_ranks_whose_parts_differ_are_told() -> None:
    collective, errors = SimulatedCollective(2), zeros(6, 2)
    pending = collective.ranks[0].compressed_mean(torch.zeros(6), errors[0], (2, 4))
    collective.ranks[1].compressed_mean(torch.zeros(6), errors[1], (4, 2))
    with pytest.raises(KernelError, match="the ranks' buffers differ in their parts"):
        pending.wait()


def test_full_means_and_bytes() -> None:
    collective = SimulatedCollective(4)
    tensors = [[torch.full((2, 3), float(rank)).t(), torch.full((5,), float(rank)).half()] for rank in range(4)]
    pending = [rank.mean(each) for rank, each in zip(collective.ranks, tensors, strict=True)]
    assert all(bool(each.wait()) for each in pending)
    assert all(bool((tensor == 1.5).all()) for each in tensors for tensor in each)
    run(collective, [torch.zeros(100) for _ in range(4)], zeros(100, 4))
    for rank in collective.ranks:
        # 24 and 10 bytes, three quarters of each out twice; 100 elements are four chunks of 32, 4 bytes of signs.
        assert rank.sent.full == 36 + 15
        assert rank.sent.compressed == 3 * (4 + 4) * 2
    run(collective, [torch.zeros(100) for _ in range(4)], zeros(100, 4), (10, 10, 70, 0, 10))
    for rank in collective.ranks:
        # Five scales there; back three, for the 10, 10 and 12 elements of the first chunk.
        assert rank.sent.compressed == 3 * ((4 + 4) * 2 + (4 + 4 * 5) + (4 + 4 * 3))


def test_ranks_in_threads_and_a_rank_that_does_not_come() -> None:
    collective, errors = SimulatedCollective(2, timeout=20), zeros(10, 2)
    found: dict[int, Tensor] = {}

    def main(rank: int) -> None:
        for at in range(3):
            found[rank] = noise(10, 10 * at + rank)
            collective.ranks[rank].compressed_mean(found[rank], errors[rank]).wait()

    threads = [threading.Thread(target=main, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    exact = nothing_owed(10, 2)
    for at in range(3):
        wanted = step([noise(10, 10 * at + rank).double() for rank in range(2)], exact)
    torch.testing.assert_close(found[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])
    alone = SimulatedCollective(2, timeout=0.05)
    with pytest.raises(KernelError, match=r"ranks \[1\] made no call in 0\.05 s"):
        alone.ranks[0].mean([torch.zeros(1)]).wait()
    mixed = SimulatedCollective(2)
    pending = mixed.ranks[0].mean([torch.zeros(1)])
    mixed.ranks[1].compressed_mean(torch.zeros(10), errors[1])
    with pytest.raises(KernelError, match="some ranks ask for mean"):
        pending.wait()


def test_one_process() -> None:
    single, buffer = SingleProcess(), noise(10, 0)
    before, errors = buffer.clone(), Errors.zeros(10, 0, 1)
    assert single.compressed_mean(buffer, errors).wait()
    assert single.mean([buffer]).wait()
    assert torch.equal(buffer, before)
    assert not errors.worker.any()
    assert not single.compressed_mean(buffer / 0, errors).wait()
    assert single.sent.full == single.sent.compressed == 0
