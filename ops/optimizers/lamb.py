"""LAMB: Adam's direction, each tensor of weights moved in proportion to its own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from ops.optimizers.base import MomentOptimizer
from ops.optimizers.batch import Batch
from ops.optimizers.moments import Arithmetic, bias_corrections, whole_norms
from ops.optimizers.trust_ratio import trust_ratios


class LAMB(MomentOptimizer):
    """LAMB (You et al., arXiv 1904.00962, algorithm 2): large batches at large learning rates.

    For each parameter w with gradient g, at its update t::

        m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr * ratio * u,   ratio = ||w|| / ||u|| within min_coeff and max_coeff, 1 if either norm is 0

    params: parameters, named parameters, or groups (dicts) with options of their own, as for any torch optimizer.
    lr: learning rate; a one-element tensor is read on the device at each step.
    betas, eps, weight_decay: as above; the decay is decoupled from the moments and counts in the ratio (the paper has
        no other form). eps is DeepSpeed's and torch's 1e-8; the paper's experiments use 1e-6.
    bias_correction: False drops both ``1 - beta^t``. With True, DeepSpeed's kernel applies them to lr after the ratio
        is taken; here, as in the paper, the ratio is that of the corrected update.
    max_coeff, min_coeff: bounds of the ratio, DeepSpeed's names and defaults; None is no bound.
    adapt: False takes 1 for the ratio, meant for groups of biases and norm weights; the update is then AdamW's.
    maximize: follow the gradient upwards.
    foreach: many tensors a launch (True), tensor by tensor (False), or by the device (None: many on a GPU).

    Parameters in bf16 and fp16 keep an fp32 master copy in the state, and all arithmetic is fp32: a relative step of lr
    is below half a spacing of bf16 and would be rounded away. What someone else writes to a parameter is seen and kept.
    Sharded parameters (DTensor) are measured whole, by one small all-reduce a batch.

    ``state[parameter]["trust_ratio"]`` is the last ratio on the device. A step never waits for the device, runs eagerly
    inside of ``torch.compile``, and cannot be captured in a CUDA graph. Complex parameters and sparse gradients raise
    :class:`OptimizerError`, a ``ValueError``, as options out of their range do.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        max_coeff: float | None = 10.0,
        min_coeff: float | None = 0.01,
        adapt: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "adapt": adapt,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Checks the options of every moment-based optimizer, and LAMB's own."""
        super().check_options(options, where)
        low, high = options["min_coeff"], options["max_coeff"]
        for name, bound in (("min_coeff", low), ("max_coeff", high)):
            if bound is not None:
                self.check_number(name, bound, where)
        if low is not None and high is not None and low > high:
            raise self.error(f"min_coeff{where} is {low}, above max_coeff {high}")
        self.check_choice("adapt", options["adapt"], where, (True, False))
        self.check_choice("bias_correction", options["bias_correction"], where, (True, False))

    @_disable_dynamo
    @torch.no_grad()
    def update(self) -> None:
        """One step."""
        self.check_step()
        for group in self.param_groups:
            for arithmetic, batch in self.batches(group):
                self._update(arithmetic, batch, group)

    def _update(self, arithmetic: Arithmetic, batch: Batch, group: Mapping[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        arithmetic.update_moments(batch, arithmetic.gradients(batch, group["maximize"]), beta1, beta2)
        corrections = bias_corrections(batch.steps, beta1, beta2) if group["bias_correction"] else ()
        directions = arithmetic.directions(batch, corrections, group["eps"], group["weight_decay"])
        ratios = self._ratios(arithmetic, batch, directions, group)
        arithmetic.show(batch, ratios)
        rate = group["lr"]
        if isinstance(rate, Tensor):
            # A CPU scalar travels with the kernel's arguments.
            rate = (
                rate.reshape(()) if rate.device.type == "cpu" else rate.reshape(()).to(batch.device, non_blocking=True)
            )
        arithmetic.add_scaled(batch, directions, ratios * -rate)

    def _ratios(
        self, arithmetic: Arithmetic, batch: Batch, directions: list[Tensor], group: Mapping[str, Any]
    ) -> Tensor:
        """Trust ratios [n] of a batch, on the device."""
        if not group["adapt"]:
            return torch.ones(len(batch.params), dtype=batch.exp_avgs[0].dtype, device=batch.device)
        norms = torch.stack([arithmetic.norms(batch.weights), arithmetic.norms(directions)])
        weight_norms, update_norms = whole_norms(norms, batch.groups)
        return trust_ratios(weight_norms, update_norms, group["min_coeff"], group["max_coeff"])

    def trust_ratios(self) -> dict[str, float]:
        """The last trust ratio of each parameter that was updated, by its name (given with ``named_parameters()``) or
        ``group.position``.

        Waits for the device, once for each; a step does not.
        """
        names, shown = [], []
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if "trust_ratio" in self.state.get(parameter, {}):
                    names.append(self.name_of(index, position))
                    shown.append(self.state[parameter]["trust_ratio"])
        devices = {ratio.device for ratio in shown}
        values: dict[int, float] = {}
        for device in devices:
            indices = [index for index, ratio in enumerate(shown) if ratio.device == device]
            together = torch.stack([shown[index].double() for index in indices]).tolist()
            values.update(zip(indices, together, strict=True))
        return {name: values[index] for index, name in enumerate(names)}
