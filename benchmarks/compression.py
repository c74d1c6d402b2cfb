"""Compression of one rank's buffer to signs: the two passes (measure; signs and error) and the way back, in GB/s of the
bytes that must move, beside the device's copy and the same in plain passes over the data with ``numpy.packbits``.

    python -m benchmarks.compression --dtype fp16

340 million elements (BERT-Large) on a GPU, 20 million on a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import interleaved, parser, report
from benchmarks.steps import device_in_words, device_of, wait
from ops.compression.phases import kernels_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ELEMENTS = {"cuda": 340_000_000, "cpu": 20_000_000}


def plain(x: Tensor, error: Tensor) -> Tensor:
    """Each step over all the data, as one writes it first (on a CPU)."""
    error.add_(x)
    scale = error.norm() / error.numel() ** 0.5
    packed = torch.from_numpy(np.packbits((error >= 0).numpy()))
    error.sub_(scale * error.sign().add_(1).bool().float().add_(-0.5).mul_(2.0))
    return packed


def ways(n: int, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Callable[[], object], float]]:
    """What is measured, with its bytes."""
    x, error = torch.randn(n, device=device).to(dtype), torch.zeros(n, device=device)
    out, packed = torch.empty_like(x), torch.empty(-(-n // 8), dtype=torch.uint8, device=device)
    sound, kernels, size = torch.tensor(True, device=device), kernels_for(device), x.element_size()
    parts = (n,)
    scale = kernels.measure(x, error, parts)

    def compress() -> None:
        kernels.pack(x, error, parts, kernels.measure(x, error, parts), sound, packed)

    both = 2.0 * size + 12 + 1 / 8
    found: dict[str, tuple[Callable[[], object], float]] = {
        "copy": (lambda: out.copy_(x), 2.0 * size),
        "measure": (lambda: kernels.measure(x, error, parts), size + 4.0),
        "signs and error": (lambda: kernels.pack(x, error, parts, scale, sound, packed), size + 8 + 1 / 8),
        "both": (compress, both),
        "unpack": (lambda: kernels.unpack(packed[None], scale[None], (parts,), out), size + 1 / 8),
    }
    if device.type == "cpu":
        found["both, plain passes"] = (lambda: plain(x, error), both)
    return found


def main() -> None:
    """The command."""
    options = parser(__doc__ or "")
    options.add_argument("--device", default="auto", help="auto is the GPU where there is one")
    options.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the buffer; errors are fp32")
    options.add_argument("--elements", type=int, default=0, help="0: 340 million on a GPU, 20 million on a CPU")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = device_of(given.device)
    n = given.elements or ELEMENTS[device.type]
    found = ways(n, DTYPES[given.dtype], device)

    def timed(run: Callable[[], object]) -> float:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        return time.perf_counter() - start

    times = interleaved({name: lambda run=run: timed(run) for name, (run, _) in found.items()}, given.rounds)  # type: ignore[misc]
    rows = []
    for name, (_, size) in found.items():
        middle = statistics.median(times[name])
        rows.append({"what": name, "ms": 1000 * middle, "bytes/element": size, "GB/s": size * n / middle / 1e9})
    report(
        f"signs of {n} elements, {given.dtype}",
        rows,
        given.json,
        device=device_in_words(device),
        dtype=given.dtype,
        n=n,
    )


if __name__ == "__main__":
    main()
