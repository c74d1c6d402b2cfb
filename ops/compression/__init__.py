"""Means over processes at one bit an element, with the error of each exchange carried into the next."""

from __future__ import annotations

from ops.compression.collective import CompressionError, Errors, GradientCollective, Pending, SingleProcess, chunk_of
from ops.compression.distributed import TorchCollective
from ops.compression.simulated import SimulatedProcesses

__all__ = [
    "CompressionError",
    "Errors",
    "GradientCollective",
    "Pending",
    "SimulatedProcesses",
    "SingleProcess",
    "TorchCollective",
    "chunk_of",
]
