"""Optimizers that torch does not have: ordinary ``torch.optim.Optimizer`` classes for anyone's training loop."""

from __future__ import annotations

from ops.optimizers.base import OptimizerError
from ops.optimizers.lamb import LAMB

__all__ = ["LAMB", "OptimizerError"]
