"""What a compressed all-reduce still owes, and where a buffer is cut."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.errors import KernelError
from ops.triton_support import DTYPES


def chunk_of(n: int, size: int) -> int:
    """Elements that each of ``size`` ranks serves of ``n``: a multiple of 8, the last ranks may have fewer or none."""
    return -(-n // (8 * size)) * 8


def served(n: int, rank: int, size: int) -> slice:
    """The elements that ``rank`` serves."""
    chunk = chunk_of(n, size)
    return slice(min(rank * chunk, n), min((rank + 1) * chunk, n))


@dataclass
class Errors:
    """The residuals of one buffer of ``n`` elements on one rank, both fp32 and updated in place: state to be saved."""

    worker: Tensor
    """[n]: what this rank's signs have missed of its own buffers."""
    server: Tensor
    """[elements that this rank serves]: what the second phase has missed of the mean."""

    @classmethod
    def zeros(cls, n: int, rank: int, size: int, device: torch.device | str = "cpu") -> Errors:
        """Nothing is owed yet."""
        part = served(n, rank, size)
        return cls(torch.zeros(n, device=device), torch.zeros(part.stop - part.start, device=device))

    def state_dict(self) -> dict[str, Tensor]:
        """The two tensors themselves."""
        return {"worker": self.worker, "server": self.server}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies bit for bit; raises :class:`KernelError` where a tensor has another size (another number of ranks:
        :func:`for_other_size`) or is not fp32."""
        for name, mine in self.state_dict().items():
            if name not in state:
                raise KernelError(f'errors: the saved state has no "{name}": it is not one of Errors')
            found = state[name]
            if found.shape != mine.shape or found.dtype != mine.dtype:
                raise KernelError(
                    f"errors: {name} was saved as {found.dtype} {list(found.shape)}, wanted {mine.dtype} "
                    f"{list(mine.shape)}: from another number of ranks, use for_other_size"
                )
        for name, mine in self.state_dict().items():
            mine.copy_(state[name])


def for_other_size(saved: Sequence[Errors], rank: int, size: int) -> Errors:
    """The errors of ``rank`` of ``size``, from those of all ranks of a run of another size, in their order.

    Every rank takes the mean of the worker errors, and the server errors are cut anew. What is owed to the mean,
    ``mean(worker) + all servers' errors``, stays the same element by element (to a rounding of fp32); which rank owed
    it is lost, so training goes on close to, not exactly as, before. Says so in a warning. With the same size, each
    rank gets its own back bit for bit, without one. Raises :class:`KernelError` for errors that are not one run's.
    """
    if not saved:
        raise KernelError("errors: none were saved: start with Errors.zeros")
    n = saved[0].worker.numel()
    for at, each in enumerate(saved):
        part = served(n, at, len(saved))
        if each.worker.numel() != n or each.server.numel() != part.stop - part.start:
            raise KernelError(
                f"errors: those of rank {at} have {each.worker.numel()} and {each.server.numel()} elements, wanted {n} "
                f"and {part.stop - part.start}: give those of all {len(saved)} ranks, in order"
            )
    if len(saved) == size:
        return Errors(saved[rank].worker.clone(), saved[rank].server.clone())
    warnings.warn(
        f"errors of {len(saved)} ranks go on with {size}: every rank takes their mean, steps differ slightly",
        stacklevel=2,
    )
    total = torch.zeros(n, dtype=torch.float64, device=saved[0].worker.device)
    for each in saved:
        total += each.worker
    servers = torch.cat([each.server for each in saved])
    return Errors((total / len(saved)).float(), servers[served(n, rank, size)].clone())


def check(buffer: Tensor, errors: Errors, rank: int, size: int) -> None:
    """Refuses in one line what :meth:`GradientCollective.compressed_mean` cannot take."""
    if buffer.dim() != 1:
        raise KernelError(f"compressed_mean: the buffer has shape {list(buffer.shape)}: flatten it")
    if buffer.dtype not in DTYPES:
        raise KernelError(f"compressed_mean: the buffer is {buffer.dtype}: cast it to fp32, bf16 or fp16")
    if buffer.device.type not in ("cpu", "cuda"):
        raise KernelError(f"compressed_mean: the buffer is on {buffer.device}: move it to a CPU or a CUDA GPU")
    part = served(buffer.numel(), rank, size)
    wanted = {"worker": buffer.numel(), "server": part.stop - part.start}
    for name, tensor in {"buffer": buffer, **errors.state_dict()}.items():
        if not tensor.is_contiguous():
            raise KernelError(f"compressed_mean: {name} has strides {tensor.stride()}: call .contiguous() on it")
        if tensor.device != buffer.device:
            raise KernelError(f"compressed_mean: {name} is on {tensor.device}, the buffer on {buffer.device}: move it")
        if name in wanted and tensor.dtype != torch.float32:
            raise KernelError(f"compressed_mean: {name} error is {tensor.dtype}: keep errors in fp32")
        if name in wanted and tensor.shape != (wanted[name],):
            raise KernelError(
                f"compressed_mean: {name} error has shape {list(tensor.shape)}, wanted [{wanted[name]}] on rank {rank} "
                f"of {size}"
            )
