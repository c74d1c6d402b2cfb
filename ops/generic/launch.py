"""How the launches of the ``generic`` set are sized, placed and guarded."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ops.errors import KernelError
from ops.triton_support import DTYPES, interpreted

#: The widest row that a program keeps in registers; wider ones are read piece by piece.
WIDEST_ROW = 16384
_HERE: AbstractContextManager[None] = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` current for a launch: Triton launches on the current device, wherever the tensors are."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _HERE
    return torch.cuda.device(device)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (at least 1): the length of a block that holds ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def warps(elements: int) -> int:
    """Warps of a program that works on so many elements: eight a thread, which is 16 bytes of fp16 or bf16."""
    return min(max(elements // 256, 1), 16)


def piece(rows: int, n: int) -> int:
    """Elements of a row of ``n`` a program takes where rows may be cut: small pieces where there are few rows, so that
    many multiprocessors share them."""
    return min(power_of_two(n), 256 if rows <= 32 else 1024)


def assert_runs_here(op: str, x: Tensor) -> None:
    """Refuses tensors of a dtype or on a device that no kernel of this set takes."""
    if x.dtype not in DTYPES:
        raise KernelError(f"{op}: x is {x.dtype}: cast it to fp32, bf16 or fp16")
    if x.device.type != "cuda" and not interpreted():
        raise KernelError(f"{op}: x is on {x.device}: move it to a CUDA GPU")


def assert_shape(op: str, name: str, tensor: Tensor | None, *shape: int) -> None:
    """Refuses a tensor of another shape: a kernel would read past its end."""
    if tensor is not None and tensor.shape != shape:
        raise KernelError(f"{op}: {name} has shape {list(tensor.shape)}, wanted {list(shape)}")


def assert_indices(op: str, name: str, tensor: Tensor | None, x: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Refuses indices that are not a contiguous ``dtype`` tensor of that shape beside ``x``."""
    if tensor is None:
        return
    assert_shape(op, name, tensor, *shape)
    if tensor.dtype != dtype or tensor.device != x.device or not tensor.is_contiguous():
        found = f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        raise KernelError(f"{op}: {name} is {found}, wanted contiguous {dtype} on {x.device}")
