"""What training, inference and the command line have in common of a profile: whose peaks, and where it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from config_schema.flops_profiler import FlopsProfiler
from engine.build import DTYPES, Plan
from engine.outputs import check_writable
from profiler.ceilings import Ceilings, ceilings
from profiler.page import check_installed
from profiler.profile import held_against, profile
from profiler.report import Report

log = logging.getLogger("slipstream.profiler")

_BUCKET = "sequences lie end to end in a bucket of rows; rows that fill it up are computed, and counted"
#: What a reader must know where these operators are in a profile.
_NOTES = {
    "persistent_decode": "a decode step is one launch of the persistent kernel: one row, with the work of all layers",
    "persistent_encoder": "all layers are one launch of the persistent kernel: one row, with the work of all of them",
    "locate": _BUCKET,
    "embed_sequences": _BUCKET,
}


@dataclass(frozen=True)
class Repeats:
    """How a profile times: steps that pass by before, steps that are timed, whether it keeps a timeline."""

    warm_up: int = 1
    repeats: int = 3
    events: bool = False


def judged_by(device: torch.device, precision: str) -> tuple[str, Ceilings | None, tuple[str, ...]]:
    """As ``profiler.profile.held_against``, with the device's limits. They may have to be measured first, which takes
    seconds once."""
    return held_against(ceilings(device), precision)


def check(settings: FlopsProfiler) -> None:
    """Raises before the work where :func:`write` could not do its own: a file that cannot be written, a library that
    the page needs."""
    if settings.output_file is not None:
        check_writable(settings.output_file, "$.flops_profiler.output_file: ", makes_directories=True)
    if "html" in settings.formats:
        check_installed()


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
    files = report.write(
        settings.formats,
        None if settings.output_file is None else path_of(settings.output_file, report),
        settings.module_depth,
        settings.top_modules,
        settings.detailed,
    )
    for file in files:
        log.info("wrote %s", file)
    return files


def profile_inference(plan: Plan, step: Callable[[], object], how: Repeats, samples: int, tokens: int) -> Report:
    """A profile of ``step``, which runs ``plan``'s model over so many sequences and tokens.

    Raises:
        ProfilerError: as for ``profiler.profile.profile``.
    """
    dtype = next(name for name, dtype in DTYPES.items() if dtype == plan.dtype)
    precision, limits, notes = judged_by(plan.device, dtype)
    report = profile(
        step,
        mode="inference",
        precision=precision,
        samples=samples,
        tokens=tokens,
        device=plan.device,
        warm_up=how.warm_up,
        repeats=how.repeats,
        events=how.events,
        limits=limits,
    )
    found = report.counts.root.operators()
    said = dict.fromkeys(note for name, note in _NOTES.items() if name in found)
    return replace(
        report,
        name=plan.spec.family,
        machine={**report.machine, "kernels": plan.kernels},
        notes=(*report.notes, *notes, *said),
    )
