"""What training, inference and the command line have in common of a profile: whose peaks, and where it goes."""

from __future__ import annotations

from pathlib import Path

import torch

from config_schema.flops_profiler import FlopsProfiler
from profiler.ceilings import Ceilings, ceilings
from profiler.report import Report


def judged_by(device: torch.device, precision: str) -> tuple[str, Ceilings | None, tuple[str, ...]]:
    """The name of the peak that products in ``precision`` are held against, the device's limits, and notes; no limits
    where the device has none for it. They may have to be measured first, which takes seconds once."""
    limits = ceilings(device)
    if precision == "fp32" and "tf32" in limits.flops and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    if precision in limits.flops:
        return precision, limits, ()
    return precision, None, (f"not judged: there is no ceiling for {precision} of {limits.device}",)


def path_of(file: str, report: Report) -> Path:
    """Where a process writes: for ``profile.json`` the second of several writes ``profile.rank1.json``."""
    path, workload = Path(file), report.workload
    return path if workload.world_size == 1 else path.with_name(f"{path.stem}.rank{workload.rank}{path.suffix}")


def write(report: Report, settings: FlopsProfiler) -> tuple[Path, ...]:
    """As the section "flops_profiler" says; the files. Of several processes the first prints.

    Raises:
        ProfilerError: as for ``Report.write``.
    """
    if settings.output_file is None and report.workload.rank:
        return ()
    return report.write(
        settings.formats,
        None if settings.output_file is None else path_of(settings.output_file, report),
        settings.module_depth,
        settings.top_modules,
        settings.detailed,
    )
