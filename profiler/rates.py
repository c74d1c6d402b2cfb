"""How fast this device is, measured: bytes a second that it reads, operations a second of large matrix products.

A ceiling is what the device can do at most, so of several runs the fastest stands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from profiler.errors import ProfilerError

#: What is read to measure bandwidth: well beyond any cache, and at most this share of the free memory.
READ_BYTES = {"cuda": 4 << 30, "cpu": 1 << 30}
READ_SHARE = 0.25
#: Side of the square matrices whose product is timed.
MATRIX = {"cuda": 8192, "cpu": 1024}
REPEATS = 10
#: Repeating ends sooner once it has taken so long: some precisions crawl on a CPU.
SECONDS = 1.0

#: Names of the precisions of matrix products; "tf32" is float32 of which the products take fewer bits.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def measurable(device: torch.device) -> tuple[str, ...]:
    """The names in ``DTYPES`` whose products torch has on this device."""
    if device.type == "cpu":
        return ("fp32", "bf16", "fp16", "int8")
    capability = torch.cuda.get_device_capability(device)
    since = {"fp32": (0, 0), "tf32": (8, 0), "bf16": (0, 0), "fp16": (0, 0), "int8": (7, 5), "fp8": (8, 9)}
    return tuple(name for name, least in since.items() if capability >= least)


def read_rate(device: torch.device) -> float:
    """Bytes a second of the fastest of several reductions (int32, maximum) over a buffer larger than the caches."""
    size = min(READ_BYTES[device.type], int(_free(device) * READ_SHARE)) // 4
    data = torch.ones(size, dtype=torch.int32, device=device)
    return size * 4 / _fastest(partial(torch.max, data), device)


def product_rate(device: torch.device, dtype: str) -> float:
    """Operations a second, 2 N^3 each, of the fastest of several products of square matrices.

    Args:
        dtype: a name in ``DTYPES``. "fp32" is measured without TF32, whatever the process has set.

    Raises:
        ProfilerError: the device has no such product.
    """
    if dtype not in measurable(device):
        raise ProfilerError(
            f"{device}: products in {dtype} cannot be measured; there are {', '.join(measurable(device))}"
        )
    side = MATRIX[device.type]
    with _float32_as("tf32" if dtype == "tf32" else "ieee", device), torch.no_grad():
        return 2 * side**3 / min(_fastest(run, device) for run in _products(side, dtype, device))


def _products(side: int, dtype: str, device: torch.device) -> list[Callable[[], Any]]:
    if dtype == "int8":
        whole = torch.randint(-64, 64, (side, side), dtype=torch.int8, device=device)
        return [lambda: torch._int_mm(whole, whole.t())]
    a = torch.randn(side, side, device=device).to(DTYPES[dtype])
    if dtype == "fp8":
        one = torch.ones((), device=device)
        return [lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)]
    return [lambda: a @ a, lambda: F.linear(a, a)]  # CPUs differ widely here


@contextmanager
def _float32_as(precision: str, device: torch.device) -> Iterator[None]:
    """Products of float32 in "ieee" or "tf32", and then again as the process had set them."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backend.matmul.fp32_precision = before


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run, the first ones being a warm-up as well."""
    best, left = _seconds(run, device), SECONDS
    for _ in range(REPEATS):
        taken = _seconds(run, device)
        best, left = min(best, taken), left - taken
        if left <= 0:
            break
    return best


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
