"""How a worker takes times: synchronized wall time, and the sum of the kernels' times. Needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.bench.job import Case

#: A GPU that has waited for its turn gets so many seconds to come up to speed before samples count.
WARM_SECONDS = 0.2
#: Tokens over which GPU time is taken: the profiler keeps every launch of them in memory.
PROFILED_TOKENS = 32
#: A pass is measured so many times as often as a generation, which is itself a mean over its tokens.
PASSES_A_ROUND = 4


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to be measured: compiled, captured and run once.

    sample:  seconds of one token or one pass.
    samples: how many to take.
    gpu:     seconds of kernels and number of launches of one token or one pass.
    note:    how it was measured, where that is not what the table's heading says.
    """

    sample: Callable[[], float]
    samples: int
    gpu: Callable[[], tuple[float, float]]
    note: str = ""

    def measure(self) -> list[float]:
        """Milliseconds of each sample, after a warm-up."""
        deadline = time.perf_counter() + (WARM_SECONDS if torch.cuda.is_available() else 0)
        self.sample()
        while time.perf_counter() < deadline:
            self.sample()
        return [self.sample() * 1e3 for _ in range(self.samples)]


def wait(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run`` from an idle device to an idle device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def kernel_time(run: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of all kernels and copies of ``run``, and how many there were, whatever lay between them.

    Kernels that overlap (dependent launch) count each for itself, so the sum may exceed the wall time.
    """
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        wait(device)
    events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    return sum(event.self_device_time_total for event in events) / 1e6, sum(event.count for event in events)


def generation(generate: Callable[[int], object], case: Case, rounds: int, device: torch.device) -> Prepared:
    """Time a token: (t(new + 1) - t(1)) / new, where ``generate(n)`` generates n tokens behind the same prompts."""

    def sample() -> float:
        first = seconds(lambda: generate(1), device)
        return (seconds(lambda: generate(case.new + 1), device) - first) / case.new

    def gpu() -> tuple[float, float]:
        new = min(case.new, PROFILED_TOKENS)
        first, launches = kernel_time(lambda: generate(1), device)
        whole, more = kernel_time(lambda: generate(new + 1), device)
        return (whole - first) / new, (more - launches) / new

    return Prepared(sample, rounds, gpu)


def passes(
    run: Callable[[], object],
    rounds: int,
    device: torch.device,
    before: Callable[[], object] = lambda: None,
    note: str = "",
) -> Prepared:
    """Time of one ``run``; ``before`` puts things back in place ahead of each and is not timed."""

    def sample() -> float:
        before()
        return seconds(run, device)

    def gpu() -> tuple[float, float]:
        before()
        return kernel_time(run, device)

    return Prepared(sample, rounds * PASSES_A_ROUND, gpu, note)


def random_ids(case: Case, vocab: int) -> torch.Tensor:
    """The same random prompts for everyone: int64 [batch, tokens] on the CPU."""
    return torch.randint(vocab, (case.batch, case.tokens), generator=torch.Generator().manual_seed(0))
