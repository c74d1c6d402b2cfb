"""What each process does in test_compression.py: the same exchanges over a real group, saved for comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ops.compression import Errors, GradientCollective, TorchCollective

#: Elements and dtype of each buffer. Chunks of several ranks are empty for the shortest ones.
BUFFERS = ((1, torch.float32), (50, torch.float32), (1001, torch.float16), (4096, torch.bfloat16), (0, torch.float32))
ROUNDS = 4


def exchanged(collective: GradientCollective, device: str = "cpu") -> list[Any]:
    """Several buffers on their way at a time, round after round; what each came to, the errors, and bytes sent."""
    generator = torch.Generator().manual_seed(collective.rank)
    errors = [Errors.zeros(count, collective.size, device) for count, _ in BUFFERS]
    found: list[Any] = []
    for _ in range(ROUNDS):
        buffers = [torch.randn(count, generator=generator).to(device, dtype) for count, dtype in BUFFERS]
        pending = [collective.compressed_mean(*pair) for pair in zip(buffers, errors, strict=True)]
        plain = [torch.randn(3, 2, generator=generator).to(device), torch.randn(5, generator=generator).to(device)]
        mean = collective.mean(plain)
        for one in (mean, *reversed(pending)):
            one.wait()
            one.wait()
        found.append(([buffer.cpu() for buffer in buffers], [tensor.cpu() for tensor in plain]))
    return [found, [(one.worker.cpu(), one.server.cpu()) for one in errors], collective.sent]


def main(rank: int, size: int, folder: str, backend: str) -> None:
    """One process."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    device = "cpu"
    if backend == "nccl":
        device = f"cuda:{rank}"
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store-{backend}-{size}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size)
    torch.save(exchanged(TorchCollective(), device), Path(folder) / f"{backend}-{size}-{rank}.pt")
    dist.destroy_process_group()
