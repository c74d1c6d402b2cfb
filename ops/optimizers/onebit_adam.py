"""1-bit Adam: AdamW whose processes exchange one bit an element once the variance stands."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ops.compression import GradientCollective
from ops.optimizers.compressed import CompressedOptimizer, FreezeStep
from ops.optimizers.pays import Compression


class OneBitAdam(CompressedOptimizer):
    """1-bit Adam (Tang et al., arXiv 2102.02888).

    Up to step ``freeze_step`` it is AdamW on the processes' mean gradient. Then v stands, and at each step::

        m_own = beta1 m + (1 - beta1) g_own        m = the processes' mean of m_own, as error-compensated signs
        w = w - lr ((m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^freeze)) + eps) + weight_decay w)

    params:     parameters, named parameters, or groups with options of their own.
    collective: what exchanges between processes (:mod:`ops.compression`); None for one process.
    lr, betas, eps, weight_decay, bias_correction: as for torch's AdamW. DeepSpeed has no bias correction, whatever its
        parameter of that name says: False does the same.
    freeze_step: steps of the warm-up, or "auto": until the variance is stable. DeepSpeed's default.
    compression: "always", or "auto": when the warm-up is over, a step by a full mean of gradients and one by a
        compressed exchange are timed, and where the latter is not faster the warm-up goes on for good.
    max_grad_norm: the largest norm of all gradients, 0 for none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        collective: GradientCollective | None = None,
        freeze_step: FreezeStep = 100000,
        compression: Compression = "always",
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "freeze_step": freeze_step, "compression": compression, "bias_correction": bias_correction,
            "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
            "maximize": False, "foreach": foreach,
        }  # fmt: skip
        super().__init__(params, collective, defaults)
