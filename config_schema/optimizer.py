"""The section "optimizer": one class a kind, told apart by "type"."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, Section
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


class Compressed(Adaptive):
    """What the optimizers have in common whose processes exchange signs in place of gradients. Names and defaults are
    DeepSpeed's, but for the bias correction, which it has not."""

    weight_decay: NotNegative = 0.0
    """Decoupled from the gradient; biases and norms' weights are left out."""

    compression: Literal["always", "auto"] = "always"
    """Exchange signs once the warm-up is over; "auto" measures then whether that is faster than gradients in full, and
    goes on with the warm-up for good where it is not."""

    max_grad_norm: NotNegative = 0.0
    """Another name of training.clip_norm, for all processes together; 0 is none."""


class Warming(Compressed):
    """Those whose warm-up ends once."""

    freeze_step: Count | Literal["auto"] = 100000
    """Steps of the warm-up, in which gradients travel in full; "auto" ends it where the variance stands."""

    bias_correction: bool = True
    """Divide the moments by 1 - beta^t; false is what DeepSpeed does."""


class OneBitAdam(Warming):
    """1-bit Adam: AdamW in the warm-up, then processes exchange one bit an element (arXiv 2102.02888)."""

    type: Literal["OneBitAdam"]
    """The kind of optimizer."""


class OneBitLamb(Warming):
    """1-bit LAMB: LAMB in the warm-up, then processes exchange one bit an element (arXiv 2104.06069)."""

    type: Literal["OneBitLamb"]
    """The kind of optimizer."""

    max_coeff: Positive = 10.0
    """Upper bound of the trust ratio in the warm-up."""

    min_coeff: NotNegative = 0.01
    """Lower bound of the trust ratio in the warm-up."""

    coeff_beta: Decay = 0.9
    """Decay of the moving average of trust ratios, which stands behind the warm-up."""

    factor_max: Positive = 4.0
    """Upper bound of what that average is multiplied by behind the warm-up."""

    factor_min: NotNegative = 0.5
    """Lower bound of what that average is multiplied by behind the warm-up."""

    factor_threshold: Decay = 0.1
    """How far that factor may move in a step, as a share of itself."""


class ZeroOneAdam(Compressed):
    """0/1 Adam: one bit an element from early on, and behind the warm-up not at every step (arXiv 2202.06009)."""

    type: Literal["ZeroOneAdam"]
    """The kind of optimizer."""

    var_freeze_step: Count = 100000
    """Steps of the warm-up, in which the variance moves with the gradients that travel in full."""

    var_update_scaler: Count = 16
    """So many of these in the warm-up, then the steps from one to the next are doubled."""

    local_step_scaler: Count = 32678
    """So many steps behind the warm-up, then the steps from one exchange to the next are doubled."""

    local_step_clipper: Count = 16
    """The most steps from one exchange to the next."""

    bias_correction: bool = False
    """Divide the moments by 1 - beta^t; false is what DeepSpeed does."""


Optimizer = AdamW | Lamb | OneBitAdam | OneBitLamb | ZeroOneAdam
