"""``tune``: times configs for one shape and keeps the fastest in the user's table."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ops.errors import KernelError
from ops.gemm.config import GemmConfig, candidates, key
from ops.gemm.skinny import skinny_gemm
from ops.gemm.tuning import device_name, remember
from ops.triton_support import dependent_launch

_LOG = logging.getLogger("slipstream.ops.gemm")
#: Bytes of weights that a measurement rotates over: several times the 50 to 60 MB of L2 in which a small weight would
#: stay.
ROTATED_BYTES = 400_000_000
_COPIES = (2, 96)


def copies(weight: Tensor) -> list[Tensor]:
    """The weight and clones of it, together beyond L2."""
    least, most = _COPIES
    size = max(1, weight.numel() * weight.itemsize)
    count = min(most, max(least, ROTATED_BYTES // size)) if weight.is_cuda else 1
    return [weight, *(weight.clone() for _ in range(count - 1))]


def microseconds(run: Callable[[], object], calls: int, device: torch.device, replays: int = 5) -> float:
    """Time of one of the ``calls`` launches that ``run`` enqueues, median of ``replays`` replays of one CUDA graph.

    On a CPU (the interpreter) the wall time of ``run``.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e6 / calls
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays + 1)
        ]
        for before, after in events:
            before.record()
            graph.replay()
            after.record()
        torch.cuda.synchronize(device)
    times: list[float] = [before.elapsed_time(after) for before, after in events[1:]]
    return statistics.median(times) * 1e3 / calls


def tune(
    x: Tensor,
    weights: Tensor | Sequence[Tensor],
    *,
    configs: Iterable[GemmConfig] | None = None,
    save: bool = True,
    **options: Any,
) -> tuple[GemmConfig, dict[GemmConfig, float]]:
    """Times configs for one shape on x's GPU, dependently launched where it can, and keeps the fastest.

    Args:
        x: [M, K] as for ``skinny_gemm``.
        weights: the weight, of which clones are then made, or copies of it, together several times the L2.
        configs: what to try; :func:`ops.gemm.config.candidates` if None.
        save: whether the fastest goes into the user's table.
        options: what ``skinny_gemm`` takes beside them (bias, norm, gated, ...).

    Returns:
        The fastest config, and microseconds a call for each that could run.

    Raises:
        KernelError: ``skinny_gemm`` refuses the arguments, or no config could run.
    """
    rotated = copies(weights) if isinstance(weights, Tensor) else list(weights)
    gated, pdl = bool(options.get("gated")), dependent_launch(x.device)
    options = {**options, "out": torch.empty(_shape(x, rotated[0], gated), dtype=x.dtype, device=x.device)}
    skinny_gemm(x, rotated[0], **{**options, "config": GemmConfig("fma", 1, 512)})  # refuses what no config will help
    times: dict[GemmConfig, float] = {}
    for config in _configs(configs, x, options["out"].shape[1], gated):

        def run(config: GemmConfig = config) -> None:
            for weight in rotated:
                skinny_gemm(x, weight, config=config, pdl=pdl, **options)

        try:
            skinny_gemm(x, rotated[0], config=config, pdl=pdl, **options)  # compiles, which a capture may not
            times[config] = microseconds(run, len(rotated), x.device)
        except KernelError as error:  # too much shared memory for this GPU, say: the next may fit
            _LOG.info("%s", error)
    if not times:
        raise KernelError(f"tune: no config could run for x {list(x.shape)}, weight {list(rotated[0].shape)}")
    best = min(times, key=lambda config: times[config])
    if save:
        normed = options.get("norm") is not None
        name = key(x.dtype, x.shape[0], options["out"].shape[1], x.shape[1], gated, normed)
        remember(device_name(x.device), {name: best})
    return best, times


def _configs(given: Iterable[GemmConfig] | None, x: Tensor, columns: int, gated: bool) -> Iterable[GemmConfig]:
    return given if given is not None else candidates(x.dtype, x.shape[0], columns, x.shape[1], gated)


def _shape(x: Tensor, weight: Tensor, gated: bool) -> tuple[int, int]:
    return x.shape[0], weight.shape[0] // (2 if gated else 1)
