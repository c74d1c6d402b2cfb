"""What every Triton kernel of ours needs to know about where it runs, and the checks that public ops share."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from ops.errors import KernelError

#: The oldest Triton whose language has dependent launch as we use it.
TRITON = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``): on CPU tensors, for tests."""
    return bool(triton.knobs.runtime.interpret)


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it drains: Hopper and newer, never in the interpreter."""
    return device.type == "cuda" and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(pdl: bool) -> dict[str, bool]:
    """Launch keywords that the interpreter would not know unless they are needed."""
    return {"launch_pdl": True} if pdl else {}


def assert_runs(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises :class:`KernelError` in one line, with what to set instead, where Triton kernels cannot run."""
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < TRITON:
        wanted = ".".join(map(str, TRITON))
        raise KernelError(
            f'kernels "{name}" need Triton {wanted}, this is {triton.__version__}: set "kernels" to "eager"'
        )
    if device.type != "cuda" and not interpreted():
        raise KernelError(f'kernels "{name}" need a CUDA GPU, the device is {device.type}: set "kernels" to "eager"')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise KernelError(f'kernels "{name}" need an Ampere GPU or newer: set "kernels" to "eager"')
    if dtype not in DTYPES:
        raise KernelError(
            f'kernels "{name}" compute in fp32, bf16 or fp16, not {dtype}: set "precision" to one of these'
        )


def check(op: str, like: Tensor, **tensors: Tensor | None) -> None:
    """Refuses tensors that a kernel would misread: not on ``like``'s device, not of its dtype, or not contiguous."""
    for name, tensor in {"x": like, **tensors}.items():
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise KernelError(f"{op}: {name} is on {tensor.device}, the first tensor on {like.device}: move it")
        if tensor.dtype != like.dtype:
            raise KernelError(f"{op}: {name} is {tensor.dtype}, the first tensor {like.dtype}: cast it")
        if not tensor.is_contiguous():
            raise KernelError(f"{op}: {name} has strides {tensor.stride()}: call .contiguous() on it")
