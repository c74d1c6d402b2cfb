"""The error-compensated compressed all-reduce of 1-bit Adam and 1-bit LAMB (arXiv 2102.02888, 2104.06069)."""

from __future__ import annotations

from ops.compression.collective import GradientCollective, Pending, Sent, SingleProcess
from ops.compression.distributed import TorchCollective
from ops.compression.errors import Errors, for_other_size
from ops.compression.simulated import SimulatedCollective, VirtualRank

__all__ = [
    "Errors",
    "GradientCollective",
    "Pending",
    "Sent",
    "SimulatedCollective",
    "SingleProcess",
    "TorchCollective",
    "VirtualRank",
    "for_other_size",
]
