"""What this device can do at most: peak rates of matrix products and of its memory, and the roofline over both.

A GPU in the table (``device_table.py``) has its datasheet's numbers, put right by what NVML tells; any other device is
measured once (``rates.py``), and what was found is kept in ``$SLIPSTREAM_CACHE``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ops.cache import cache_directory, write_aside
from ops.machine import cpu_model
from profiler import device_table, nvml, rates
from profiler.errors import ProfilerError

_LOG = logging.getLogger("slipstream.profiler.ceilings")

Source = Literal["table", "nvml", "measured"]
Bound = Literal["memory", "compute"]

BANDWIDTH = "bandwidth"
_NAMES = {dtype: name for name, dtype in rates.DTYPES.items() if name != "tf32"} | {torch.float8_e5m2: "fp8"}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """One device's peaks. Equal ones are of the same device, found in the same way."""

    #: As torch or, for a CPU, the operating system has it.
    device: str
    #: Dense operations a second, two a multiply-accumulate, by name of the precision ("fp32", "tf32", "bf16", "fp16",
    #: "int8", "fp8"); those that the device lacks are not there. Half precisions sum in fp32.
    flops: Mapping[str, float]
    #: Bytes a second of the memory.
    bandwidth: float
    #: Where each number is from: by precision, and "bandwidth".
    sources: Mapping[str, Source]
    #: MHz that NVML says the GPU is held to, where this took something off the table's ``flops``; else None.
    clock: int | None = None
    #: The datasheet of the numbers from the table; else None.
    document: str | None = None

    def peak(self, dtype: torch.dtype | str) -> float:
        """Operations a second in a precision, by its name or torch's dtype; ``torch.float32`` is "fp32" without TF32.

        Raises:
            ProfilerError: there is no ceiling for it.
        """
        name = dtype if isinstance(dtype, str) else _NAMES.get(dtype, str(dtype))
        if name not in self.flops:
            raise ProfilerError(
                f"{self.device} has no ceiling for {name}; there are {', '.join(self.flops)}. "
                "ceilings(device, measure=True) measures what the table lacks and the device has"
            )
        return self.flops[name]

    def ridge(self, dtype: torch.dtype | str) -> float:
        """Operations a byte above which work in this precision is bound by compute."""
        return self.peak(dtype) / self.bandwidth

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, strings and numbers, for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ceilings:
        """The opposite of ``to_dict``, also after a way through JSON.

        Raises:
            ProfilerError: it is not what ``to_dict`` gives, or a rate is not a positive number.
        """
        try:
            found = cls(**{**data, "flops": dict(data["flops"]), "sources": dict(data["sources"])})
            numbers = {**found.flops, BANDWIDTH: found.bandwidth}
            if not found.flops or not all(0 < number < math.inf for number in numbers.values()):
                raise ValueError("a rate is missing or not a positive number")
            if found.sources.keys() != numbers.keys() or not set(found.sources.values()) <= set(get_args(Source)):
                raise ValueError("a rate has no source")
        except (KeyError, TypeError, ValueError) as error:
            raise ProfilerError(f"not the ceilings of a device: {error!r}") from error
        return found


def ceilings(device: torch.device | str, measure: bool = False) -> Ceilings:
    """What ``device``, a CPU or a GPU of torch's "cuda", can do at most.

    NVIDIA GPUs that the table knows have their published peaks. Where NVML answers, the bandwidth is its memory clock
    times the bus, and peaks are taken down to the clock the GPU is held to. Everything else is measured with the
    threads that the process has, which takes some seconds, and kept by name, version of torch and threads.

    Args:
        measure: measure in any case, and keep it in place of what was kept.

    Raises:
        ProfilerError: neither a CPU nor a GPU of "cuda".
    """
    device = torch.device(device)
    if device.type not in rates.MATRIX:
        raise ProfilerError(f"{device}: ceilings are known of cpu and cuda devices")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    published = device_table.published(name) if device.type == "cuda" else None
    if published is not None and not measure:
        return _published(name, published, nvml.told(device))
    path = _path(device, name)
    kept = None if measure else _read(path, name)
    if kept is None:
        _LOG.info("measuring what %s can do, which takes some seconds and is kept", name)
    return kept or _measured(device, name, path)


def roofline(limits: Ceilings, flops: float, bytes: float, dtype: torch.dtype | str) -> tuple[float, Bound]:
    """Seconds that the work takes at least, and what bounds it: max(flops / peak, bytes / bandwidth).

    Source: Williams, Waterman and Patterson 2009, "Roofline". On the ridge itself it is "memory".

    Args:
        flops: operations, two a multiply-accumulate.
        bytes: what is read and written.
    """
    computing, moving = flops / limits.peak(dtype), bytes / limits.bandwidth
    return (computing, "compute") if computing > moving else (moving, "memory")


def intensity(flops: float, bytes: float) -> float:
    """Operations a byte; infinite where nothing is moved, 0 where nothing is done at all."""
    if bytes:
        return flops / bytes
    return math.inf if flops else 0.0


def _published(name: str, entry: device_table.Published, told: nvml.Told) -> Ceilings:
    clocks = {dtype: entry.fp32_clock if dtype == "fp32" else entry.tensor_clock for dtype in entry.tera}
    held = {dtype: min(1.0, told.clock / clock) if told.clock else 1.0 for dtype, clock in clocks.items()}
    sources: dict[str, Source] = dict.fromkeys(entry.tera, "table")
    sources[BANDWIDTH] = "nvml" if told.bandwidth else "table"
    return Ceilings(
        device=name,
        flops={dtype: tera * 1e12 * held[dtype] for dtype, tera in entry.tera.items()},
        bandwidth=told.bandwidth or entry.bandwidth * 1e9,
        sources=sources,
        clock=told.clock if min(held.values()) < 1 else None,
        document=entry.source,
    )


def _measured(device: torch.device, name: str, path: Path) -> Ceilings:
    flops = {dtype: rates.product_rate(device, dtype) for dtype in rates.measurable(device)}
    sources: dict[str, Source] = dict.fromkeys([*flops, BANDWIDTH], "measured")
    found = Ceilings(name, flops, rates.read_rate(device), sources)
    try:
        write_aside(path, json.dumps(found.to_dict(), indent=2).encode())
    except OSError as error:
        _LOG.warning("%s: the measured ceilings cannot be kept and are measured again next time: %s", path, error)
    return found


def _read(path: Path, name: str) -> Ceilings | None:
    """What was kept; None if nothing was, or, with a warning, if it is damaged."""
    try:
        found = Ceilings.from_dict(json.loads(path.read_text("utf-8")))
        if found.device != name:
            raise ProfilerError(f"these are the ceilings of {found.device}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ProfilerError) as error:
        _LOG.warning("%s: damaged (%s). The ceilings are measured again", path, error)
        return None
    return found


def _path(device: torch.device, name: str) -> Path:
    threads = f"-{torch.get_num_threads()}-threads" if device.type == "cpu" else ""
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    # Names that differ in signs alone must not share a file.
    mark = hashlib.sha256(name.encode()).hexdigest()[:8]
    return cache_directory() / "ceilings" / f"{plain}-{mark}-torch-{torch.__version__}{threads}.json"
