"""What runs in each host of benchmarks.slow_network: times steps, counts their bytes, hands both over.

python -m benchmarks.slow_network --rate 1gbit -- python -m benchmarks.network_steps --elements 1e6 --dtype fp16
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def interface_bytes() -> tuple[int, int]:
    """Sent and received through this host's interface."""
    folder = Path("/sys/class/net") / os.environ["GLOO_SOCKET_IFNAME"] / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def measure(step: Callable[[], object], rounds: int) -> dict[str, list[float]]:
    """Seconds and bytes sent and received of each of ``rounds`` steps, behind a barrier each, after one to warm up.
    They are written for :mod:`benchmarks.slow_network` to read."""
    step()
    found: dict[str, list[float]] = {"seconds": [], "sent": [], "received": []}
    for _ in range(rounds):
        dist.barrier()
        before, start = interface_bytes(), time.perf_counter()
        step()
        found["seconds"].append(time.perf_counter() - start)
        for name, now, then in zip(("sent", "received"), interface_bytes(), before, strict=True):
            found[name].append(now - then)
    if path := os.environ.get("SLOW_NETWORK_RESULT"):
        Path(path).write_text(json.dumps(found))
    return found


def main() -> int:
    """All-reduces of a tensor of zeros over Gloo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=lambda text: int(float(text)), default=110_000_000)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    dist.init_process_group("gloo")
    values = torch.zeros(chosen.elements, dtype=DTYPES[chosen.dtype])
    measure(lambda: dist.all_reduce(values), chosen.rounds)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
