"""1-bit LAMB: LAMB whose processes exchange one bit an element once the variance stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ops.compression import GradientCollective
from ops.optimizers.batch import Batch, local_part, pieces
from ops.optimizers.buckets import Bucket, sizes_of
from ops.optimizers.compressed import CompressedOptimizer, FreezeStep
from ops.optimizers.moments import Arithmetic
from ops.optimizers.pays import Compression
from ops.optimizers.trust_ratio import trust_ratios


class OneBitLamb(CompressedOptimizer):
    """1-bit LAMB (Li et al., arXiv 2104.06069).

    Up to step ``freeze_step`` it is :class:`LAMB` on the processes' mean gradient, and keeps for each parameter a
    moving
    average of its trust ratio. Then v stands, momenta are exchanged as in 1-bit Adam, and the ratio is the kept one
    times
    ``max((sqrt(v) + eps) / (sqrt(v_fresh) + eps))``, where v_fresh goes on with the gradient that the momenta give
    away,
    ``(m - beta1 m_before) / (1 - beta1)``; within ``factor_min`` and ``factor_max``, and within ``factor_threshold`` of
    what it was before. Since all momenta are exchanged with one size for their signs, each is multiplied by
    ``mean(rms) / rms`` before and divided by it behind, with the root mean squares of the step at which v was frozen.

    params, collective, lr, betas, eps, weight_decay, bias_correction, freeze_step, compression, max_grad_norm: as for
        :class:`OneBitAdam`.
    max_coeff, min_coeff: bounds of the trust ratio in the warm-up.
    coeff_beta: of the moving average of ratios. factor_max, factor_min, factor_threshold: as above.

    Names and defaults are DeepSpeed's.
    """

    shaped_state: ClassVar[tuple[str, ...]] = (*CompressedOptimizer.shaped_state, "fresh_exp_avg_sq")
    scale_each: ClassVar[bool] = False

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
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        foreach: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "freeze_step": freeze_step, "compression": compression, "bias_correction": bias_correction,
            "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
            "max_coeff": max_coeff, "min_coeff": min_coeff, "coeff_beta": coeff_beta, "factor_max": factor_max,
            "factor_min": factor_min, "factor_threshold": factor_threshold, "maximize": False, "foreach": foreach,
        }  # fmt: skip
        super().__init__(params, collective, defaults)

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Checks what all share, and LAMB's own."""
        super().check_options(options, where)
        for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
            self.check_number(low, options[low], where)
            self.check_number(high, options[high], where)
            if options[low] > options[high]:
                raise self.error(f"{low}{where} is {options[low]}, above {high} {options[high]}")
        for name in ("coeff_beta", "factor_threshold"):
            self.check_number(name, options[name], where, below=1.0)

    def warm_up(self, arithmetic: Arithmetic, batch: Batch, group: Mapping[str, Any]) -> None:
        """A step of LAMB."""
        arithmetic.update_moments(batch, arithmetic.gradients(batch, False), *group["betas"])
        directions = arithmetic.directions(batch, self.corrections(batch, group), group["eps"], group["weight_decay"])
        weights, updates = arithmetic.norms(batch.weights), arithmetic.norms(directions)
        ratios = trust_ratios(weights, updates, group["min_coeff"], group["max_coeff"])
        kept = torch.stack([state["kept_ratio"] for state in self._states(batch)])
        # A ratio that could not be taken leaves no trace.
        moved = torch.where((weights > 0) & (updates > 0), torch.lerp(kept, ratios, 1 - group["coeff_beta"]), kept)
        torch._foreach_copy_([state["kept_ratio"] for state in self._states(batch)], list(moved.unbind()))
        arithmetic.show(batch, ratios)
        arithmetic.add_scaled(batch, directions, ratios * -float(group["lr"]))

    def begin_compression(self) -> None:
        """All parameters' states are prepared."""
        self.prepare([state for state in self.state.values() if "exp_avg" in state and state["exp_avg"].numel()])

    def prepare(self, states: Sequence[dict[str, Any]]) -> None:
        """Momenta's sizes, and where the fresh variance begins."""
        sizes = [local_part(state["exp_avg"]).square().mean().sqrt().double().cpu() for state in states]
        mean = torch.stack(sizes).mean() if sizes else torch.zeros(())
        for state, size in zip(states, sizes, strict=True):
            scale = mean / size if size > 0 else torch.ones(())
            state["momentum_scale"] = scale.to(state["exp_avg"])
            state["fresh_exp_avg_sq"] = state["exp_avg_sq"].clone()
            state["last_factor"] = torch.ones_like(state["momentum_scale"])

    def momentum(self, batch: Batch, grads: Sequence[Tensor], beta1: float, out: Tensor) -> None:
        """Brought to the size that all have."""
        super().momentum(batch, grads, beta1, out)
        torch._foreach_mul_(out.split(sizes_of(batch)), self._momentum_scales(batch))

    def finish(self, bucket: Bucket, group: Mapping[str, Any]) -> None:
        """A step along the momentum that has come, as far as the frozen ratio and the fresh variance say."""
        arithmetic, batch = bucket.arithmetic, bucket.batch
        states, corrections = self._states(batch), self.corrections(batch, group)
        fresh = [state["fresh_exp_avg_sq"] for state in states]
        # The largest change of a root of the variance; squared norms of directions, without and with weight decay.
        change, plain, whole = torch.zeros(3, len(states), dtype=batch.exp_avgs[0].dtype, device=batch.device)
        for piece, parts in bucket.arrived():
            part, at = piece.batch, piece.where
            own = piece.of(fresh)
            self._follow(part, parts, own, group)
            change[at] = torch.maximum(change[at], self._changes(part, own, corrections[at], group["eps"]))
            if group["weight_decay"]:
                for squares, decay in ((plain, 0.0), (whole, group["weight_decay"])):
                    directions = arithmetic.directions(part, corrections[at], group["eps"], decay)
                    squares[at] += arithmetic.norms(directions).square()
        factors = self._factors(change, plain.sqrt(), whole.sqrt(), states, group)
        ratios = torch.stack([state["kept_ratio"] for state in states]) * factors
        arithmetic.show(batch, ratios)
        for piece in pieces(batch):
            directions = arithmetic.directions(
                piece.batch, corrections[piece.where], group["eps"], group["weight_decay"]
            )
            arithmetic.add_scaled(piece.batch, directions, ratios[piece.where] * -float(group["lr"]))

    def _follow(self, part: Batch, parts: list[Tensor], fresh: list[Tensor], group: Mapping[str, Any]) -> None:
        """The momentum that has come becomes everybody's, and the fresh variance goes on with the gradient that gives
        it away."""
        beta1, beta2 = group["betas"]
        gradients = torch._foreach_mul(part.exp_avgs, -beta1)
        torch._foreach_copy_(part.exp_avgs, parts)
        torch._foreach_div_(part.exp_avgs, self._momentum_scales(part))
        torch._foreach_add_(gradients, part.exp_avgs)
        torch._foreach_div_(gradients, 1 - beta1)
        torch._foreach_mul_(fresh, beta2)
        torch._foreach_addcmul_(fresh, gradients, gradients, 1 - beta2)

    @staticmethod
    def _changes(part: Batch, fresh: list[Tensor], corrections: Sequence[tuple[float, float]], eps: float) -> Tensor:
        """``max((sqrt(v) + eps) / (sqrt(v_fresh) + eps))`` of each parameter [n]."""
        seconds = [c2 for _, c2 in corrections] or [1.0] * len(fresh)
        old, new = torch._foreach_div(part.exp_avg_sqs, seconds), torch._foreach_div(fresh, seconds)
        for each in (old, new):
            torch._foreach_sqrt_(each)
            torch._foreach_add_(each, eps)
        torch._foreach_div_(old, new)
        return torch.stack(torch._foreach_max(old))

    @staticmethod
    def _factors(
        change: Tensor, plain: Tensor, whole: Tensor, states: Sequence[dict[str, Any]], group: Mapping[str, Any]
    ) -> Tensor:
        """What each ratio has changed by [n]: of the direction without weight decay the part that it is."""
        factors = change
        if group["weight_decay"]:
            share = torch.where(whole > 0, plain / whole, 1.0).clamp(max=1.0)
            factors = factors * share + (1 - share)
        last = torch.stack([state["last_factor"] for state in states])
        near = group["factor_threshold"]
        factors = factors.clamp(group["factor_min"], group["factor_max"]).clamp(last * (1 - near), last * (1 + near))
        torch._foreach_copy_([state["last_factor"] for state in states], list(factors.unbind()))
        return factors

    def _momentum_scales(self, batch: Batch) -> list[Tensor]:
        """What brings each momentum to the size that all have, 0-dim."""
        return [self.state[parameter]["momentum_scale"] for parameter in batch.parameters]

    def _states(self, batch: Batch) -> list[dict[str, Any]]:
        """Of a batch's parameters, with the ratio that is kept."""
        found = []
        for parameter in batch.parameters:
            state = self.state[parameter]
            if "kept_ratio" not in state:
                state["kept_ratio"] = torch.zeros_like(state["trust_ratio"])
            found.append(state)
        return found
