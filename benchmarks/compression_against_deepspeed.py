"""The compressed all-reduce beside DeepSpeed's on the same buffer: both ranks' part of both phases, exchanges included.

    python -m benchmarks.compression_against_deepspeed                              # CPU, Gloo
    python -m benchmarks.compression_against_deepspeed --device cuda --ranks 2      # NCCL, CuPy

110 million elements of fp32 (BERT-base), which is what DeepSpeed takes. With one rank nothing is sent: what is timed is
the arithmetic. Errors are carried on from round to round. benchmarks/deepspeed_onebit.py says what runs DeepSpeed on a
CPU; there each of its passes goes over all the data, and the packing is numpy's, on one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks import deepspeed_onebit
from benchmarks.measure import interleaved, machine, parser, report, seconds, spread
from ops.compression import Errors, TorchCollective


def rank_main(rank: int, size: int, device_type: str, n: int, rounds: int, threads: int, folder: str) -> None:
    """Times both in turn, all ranks together; rank 0 writes the seconds."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(threads)
    cuda = device_type == "cuda"
    device = torch.device(device_type, rank if cuda else None)
    if cuda:
        torch.cuda.set_device(device)
    given: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(minutes=5)}
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{folder}/store", **given)
    theirs, ours = deepspeed_onebit.backend(device_type), TorchCollective()
    x = torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(device)
    mine, buffer = Errors.zeros(n, rank, size, device), torch.empty_like(x)
    worker, server = torch.zeros(n, device=device), torch.zeros(n // size, device=device)

    def timed(step: Callable[[], object]) -> float:
        buffer.copy_(x)
        if cuda:
            torch.cuda.synchronize()
        dist.barrier()
        return seconds(step)

    def our_step() -> None:
        ours.compressed_mean(buffer, mine).wait()
        if cuda:
            torch.cuda.synchronize()

    def their_step() -> None:
        theirs.compressed_allreduce(buffer, worker, server, rank)
        if cuda:
            torch.cuda.synchronize()

    # The first results, before errors have gone different ways by a rounding.
    results = []
    for step in (our_step, their_step):
        timed(step)
        results.append(buffer.clone())
    same = float((results[0].sign() == results[1].sign()).float().mean())
    times = interleaved({"slipstream": lambda: timed(our_step), "DeepSpeed": lambda: timed(their_step)}, rounds)
    if rank == 0:
        Path(folder, "found").write_text(json.dumps({"same": same, "times": times, "machine": machine()}))
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """The command."""
    options = parser(__doc__ or "")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--ranks", type=int, default=1)
    options.add_argument("--elements", type=lambda text: int(float(text)), default=110_000_000)
    given = options.parse_args()
    if lacking := deepspeed_onebit.missing(given.device):
        options.exit(2, f"error: {lacking}\n")
    n, size = given.elements, given.ranks
    if n % (8 * size * size):
        options.exit(
            2, f"error: --elements is {n}: use a multiple of {8 * size * size}, which DeepSpeed does not pad\n"
        )
    threads = given.threads or max(1, (os.cpu_count() or 1) // size)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (size, given.device, n, given.rounds, threads, folder), nprocs=size)
        found = json.loads(Path(folder, "found").read_text())
    times = found["times"]
    middle = statistics.median(times["slipstream"])
    rows = [
        {"what": name, "seconds": spread(each), "x": statistics.median(each) / middle} for name, each in times.items()
    ]
    print(f"{found['machine']} (each of {size} ranks)\nequal signs in the first results: {found['same']:.7f}")
    report(f"compressed all-reduce of {n} elements, {given.device}, {size} ranks", rows, given.json, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
