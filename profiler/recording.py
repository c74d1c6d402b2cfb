"""What torch's profiler (kineto) recorded, as plain records, with no more switched on than attributing time needs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._C._autograd import DeviceType, _profiler_enabled
from torch.autograd.profiler import profile

from profiler.errors import ProfilerError

Kind = Literal["host", "collective", "launch", "kernel", "copy"]
"""``host``: an operator, a node of autograd or a range, in some thread; ``collective``: one between CPUs, from its call
to its end, in the background; ``launch``: a call of the CUDA runtime; ``kernel`` and ``copy`` (memory moved or set):
what the GPU did."""

_RUNTIME = re.compile(r"cu(da)?[A-Z]")
_COLLECTIVE = re.compile(r"(gloo|mpi|ucc):")
_COPY = re.compile(r"Mem(cpy|set)\b")
#: Numbers of threads that torch gives out are small; what has none carries 0 or the largest number of 64 bits.
_NO_THREAD = 1 << 32
#: ``RecordScope::BACKWARD_FUNCTION``.
_BACKWARD = 1
#: Above every level that kineto logs at: it would report each begin and end on stderr.
_QUIET = "6"


@dataclass(frozen=True, slots=True)
class Record:
    """One stretch of time. Times are nanoseconds on one clock, which the host and the GPU share."""

    name: str
    kind: Kind
    start: int
    end: int
    #: The system's thread, or the GPU's stream.
    row: int
    #: ``host``: its own number, to which ``linked`` of others refers. Else the number that a launch has in common with
    #: all it launched.
    correlation: int = 0
    #: Of a launch, kernel or copy: the innermost ``host`` record around the launch; 0 if there was none.
    linked: int = 0
    #: Number of the next autograd node as the operator began (of a node: its own), -1 where none is made; and the
    #: threads, in autograd's numbering, that it ran in and that the node was made in.
    sequence: int = -1
    thread: int = 0
    forward_thread: int = 0
    #: Whether it is a node of a backward pass.
    backward: bool = False


@contextmanager
def recording(device: torch.device, host: bool = True) -> Iterator[list[Record]]:
    """Record what runs inside, in all threads that work for this one; the list is filled on leaving, by begin.

    Args:
        device: of a GPU, kernels and copies are recorded too; the caller waits for them before it leaves.
        host: record operators, nodes and ranges. They are nearly all that recording costs.

    Raises (on entering):
        ProfilerError: torch's profiler is running already: there is one in a process.
    """
    if _profiler_enabled():
        raise ProfilerError("torch's profiler is running: leave it before something is timed")
    records: list[Record] = []
    # Shapes, stacks and memory stay off: each costs more than all the rest.
    on = "cuda" if device.type == "cuda" else None
    with _quiet(), profile(use_kineto=True, use_device=on, use_cpu=host) as found:
        yield records
    records += records_of(found, device)


def records_of(found: profile, device: torch.device) -> list[Record]:
    """What a profiler that has been left recorded of the host and of one device, by begin, outer before inner."""
    assert found.kineto_results is not None, "it has not been left"
    records = [record for event in found.kineto_results.events() if (record := _record(event, device))]
    return sorted(records, key=lambda record: (record.start, -record.end))


@contextmanager
def _quiet() -> Iterator[None]:
    """kineto reads its level of logging as it is first used, and for good."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = _QUIET
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]


def _record(event: Any, device: torch.device) -> Record | None:
    """None for what is neither work nor a place in the code."""
    name, start, end, row = event.name(), event.start_ns(), event.end_ns(), event.device_resource_id()
    correlation, linked = event.correlation_id(), event.linked_correlation_id()
    if event.device_type() == DeviceType.CUDA:
        if event.is_user_annotation() or event.device_index() != device.index:
            return None
        return Record(name, "copy" if _COPY.match(name) else "kernel", start, end, row, correlation, linked)
    thread = event.start_thread_id()
    if 0 < thread < _NO_THREAD:
        if event.is_async():  # does not lie within what surrounds it
            return Record(name, "collective", start, end, row) if _COLLECTIVE.match(name) else None
        sequence, forward = event.sequence_nr(), event.fwd_thread_id()
        backward = event.scope() == _BACKWARD
        return Record(name, "host", start, end, row, correlation, 0, sequence, thread, forward, backward)
    return Record(name, "launch", start, end, row, correlation, linked) if _RUNTIME.match(name) else None
