"""What NVML tells of a GPU that bears on its ceilings: its memory's bandwidth, and a clock that it is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Told:
    """Each None where NVML does not tell."""

    #: Bytes a second: highest memory clock x width of the bus x 2, as two words pass in each cycle of that clock.
    bandwidth: float | None = None
    #: MHz that the multiprocessors cannot pass now.
    clock: int | None = None


def told(device: torch.device) -> Told:
    """What NVML tells of ``device``; nothing without nvidia-ml-py or without a driver that answers."""
    with opened(device) as found:
        return Told() if found is None else Told(_bandwidth(*found), _clock(*found))


@contextmanager
def opened(device: torch.device) -> Iterator[tuple[Any, Any] | None]:
    """The library and its handle of ``device``; None without nvidia-ml-py, without a driver that answers, or where NVML
    does not know the device."""
    try:
        import pynvml as nvml
    except ImportError:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        # By its UUID: CUDA_VISIBLE_DEVICES renumbers torch's GPUs, not NVML's.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = asked(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(uuid))
        yield None if handle is None else (nvml, handle)
    finally:
        nvml.nvmlShutdown()


def _bandwidth(nvml: Any, handle: Any) -> float | None:
    megahertz = asked(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    bits = asked(nvml, lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle))
    return megahertz * 1e6 * 2 * bits / 8 if megahertz and bits else None


def _clock(nvml: Any, handle: Any) -> int | None:
    """The highest clock, or the present one if a setting holds the GPU there: a clock that was locked, or a limit of
    power below the default. What heat and the default limit of power do from moment to moment is no ceiling."""
    highest = asked(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    reasons = asked(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
    if reasons & nvml.nvmlClocksEventReasonGpuIdle:  # then the present clock says nothing
        return highest or None
    held = bool(reasons & nvml.nvmlClocksEventReasonApplicationsClocksSetting)
    if reasons & nvml.nvmlClocksEventReasonSwPowerCap:
        limit = asked(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        default = asked(nvml, lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))
        held = held or bool(limit and default and limit < default)
    now = asked(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)) if held else None
    return now or highest or None


def asked(nvml: Any, ask: Callable[[], R]) -> R | None:
    """The answer, None where this GPU or driver has none."""
    try:
        return ask()
    except nvml.NVMLError:
        return None
