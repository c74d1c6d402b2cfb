"""The section "optimizer": one class a kind, told apart by "type"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Section
from config_schema.training import Positive

Decay = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Adaptive(Section):
    """What the optimizers that keep two moments of each gradient have in common."""

    type: str
    """The kind of optimizer."""

    lr: Positive = 1e-3
    """Learning rate, the highest of the schedule."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""

    eps: Positive = 1e-8
    """Added to the denominator; LAMB's paper has 1e-6."""

    weight_decay: NotNegative = 0.01
    """Decoupled from the gradient; biases and norms' weights are left out."""

    decay_all: bool = False
    """Decay biases and norms' weights too."""


class AdamW(Adaptive):
    """Adam with decoupled weight decay, torch's fused one where there is one."""

    type: Literal["AdamW"]
    """The kind of optimizer."""


class Lamb(Adaptive):
    """LAMB: Adam's direction, and each tensor moves in proportion to its own size (arXiv 1904.00962)."""

    type: Literal["LAMB"]
    """The kind of optimizer."""

    weight_decay: NotNegative = 0.0
    """Decoupled from the gradient; it counts in the trust ratio; biases and norms' weights are left out."""

    bias_correction: bool = True
    """Divide the moments by 1 - beta^t."""

    max_coeff: Positive | None = 10.0
    """Upper bound of the trust ratio; null is none."""

    min_coeff: NotNegative | None = 0.01
    """Lower bound of the trust ratio; null is none."""


Optimizer = AdamW | Lamb
