"""Everything that one profile found: work, time, the device's limits, energy. Plain frozen data, JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from profiler.ceilings import Ceilings
from profiler.counts import Counts
from profiler.times import Timing

Mode = Literal["training", "inference", "call"]
"""``training``: an optimizer step; ``inference``: a call or a generation of a runtime; ``call``: anything else."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """What one profiled step did, as far as it is known."""

    mode: Mode = "call"
    #: Name of the peak that its matrix products are held against: "fp32", "tf32", "bf16", "fp16", "int8", "fp8".
    precision: str = "fp32"
    #: Sequences, images, rows of this process in a step, over all its micro-batches; and tokens, where there are such.
    samples: int | None = None
    tokens: int | None = None
    micro_batches: int = 1
    #: Whose report this is, and of how many processes; degrees of parallelism.
    rank: int = 0
    world_size: int = 1
    data_parallel: int = 1
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one step on this process's device, from NVML's counter of energy; "power" where there is none: its samples."""

    joules: float
    source: Literal["counter", "power"]


@dataclass(frozen=True, slots=True)
class Report:
    """One profile. What was not done is None."""

    #: The model's class, or the name that whoever profiled gave.
    name: str
    workload: Workload
    counts: Counts
    timing: Timing | None = None
    limits: Ceilings | None = None
    energy: Energy | None = None
    #: What profiling itself took.
    counting_seconds: float = 0.0
    timing_seconds: float = 0.0
    #: Versions and names: "torch", "device", "slipstream", "kernels".
    machine: Mapping[str, str] = field(default_factory=dict)
    #: What a reader must know: what could not be counted or timed, and why.
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers, for ``json.dumps``."""
        return {
            **asdict(self),
            "schema": SCHEMA_VERSION,
            "counts": self.counts.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
        }
