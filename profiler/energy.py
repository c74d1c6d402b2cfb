"""Joules of a step on a GPU, from NVML: its counter of energy or, where there is none, samples of its power."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from profiler import nvml
from profiler.report import Energy

#: The counter moves every 20 to 100 ms: over so long a run that is a few percent.
SECONDS = 2.0
#: Between samples of power.
_PERIOD = 0.02


def energy(step: Callable[[], object], device: torch.device | str, seconds: float = SECONDS) -> Energy | None:
    """What one step takes, of all that the GPU takes meanwhile: its memory's share, and that of other processes, too.

    Args:
        step: run again and again; warm it up before. What it changes it changes each time.
        device: any; only of a GPU that NVML knows the energy is known.
        seconds: how long to go on. A step that takes longer runs once.

    Returns:
        None on a CPU, without nvidia-ml-py or a driver that answers, and of a part of a GPU (MIG).
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with nvml.opened(device) as found:
        if found is None:
            return None
        return _by_counter(step, device, seconds, *found) or _by_power(step, device, seconds, *found)


def _by_counter(
    step: Callable[[], object], device: torch.device, seconds: float, library: Any, handle: Any
) -> Energy | None:
    """From the millijoules since the driver was loaded, which GPUs have since Volta."""
    before = nvml.asked(library, lambda: library.nvmlDeviceGetTotalEnergyConsumption(handle))
    if before is None:
        return None
    steps, _ = _repeat(step, device, seconds)
    return Energy((library.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / steps, "counter")


def _by_power(
    step: Callable[[], object], device: torch.device, seconds: float, library: Any, handle: Any
) -> Energy | None:
    """From the mean of the milliwatts that a thread reads meanwhile; each of them is a mean itself, over some time."""
    if nvml.asked(library, lambda: library.nvmlDeviceGetPowerUsage(handle)) is None:
        return None
    samples: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not samples or not over.wait(_PERIOD):
            samples.append(library.nvmlDeviceGetPowerUsage(handle))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        steps, taken = _repeat(step, device, seconds)
    finally:
        over.set()
        thread.join()
    return Energy(statistics.mean(samples) / 1e3 * taken / steps, "power")


def _repeat(step: Callable[[], object], device: torch.device, seconds: float) -> tuple[int, float]:
    """Steps, as many as take that long, and the seconds they took."""
    torch.cuda.synchronize(device)
    start, steps = time.perf_counter(), 0
    while True:
        step()
        steps += 1
        if time.perf_counter() - start >= seconds:  # the host may be ahead of the GPU by then
            torch.cuda.synchronize(device)
            return steps, time.perf_counter() - start
