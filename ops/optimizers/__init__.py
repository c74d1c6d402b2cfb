"""Optimizers that torch does not have: ordinary ``torch.optim.Optimizer`` classes for anyone's training loop."""

from __future__ import annotations

from ops.optimizers.base import OptimizerError
from ops.optimizers.lamb import LAMB
from ops.optimizers.onebit_adam import OneBitAdam
from ops.optimizers.onebit_lamb import OneBitLamb
from ops.optimizers.zero_one_adam import ZeroOneAdam

__all__ = ["LAMB", "OneBitAdam", "OneBitLamb", "OptimizerError", "ZeroOneAdam"]
