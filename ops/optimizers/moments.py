"""Adam's moments and the direction they give, twice: tensor by tensor (the reference), and many tensors a launch.

Both do the same operations in the same order and never wait for the device: steps are counted on the host, and whatever
depends on norms stays a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ops.optimizers.batch import Batch


class Arithmetic(Protocol):
    """What moment-based optimizers do to the tensors of a batch."""

    def gradients(self, batch: Batch, maximize: bool) -> list[Tensor]:
        """The gradients in the dtype of the moments, negated to ``maximize``. May be ``batch.grads``: read only."""
        ...

    def update_moments(self, batch: Batch, grads: Sequence[Tensor], beta1: float, beta2: float) -> None:
        """``m = beta1 m + (1 - beta1) g`` and ``v = beta2 v + (1 - beta2) g^2``, in place."""
        ...

    def directions(
        self, batch: Batch, corrections: Sequence[tuple[float, float]], eps: float, weight_decay: float
    ) -> list[Tensor]:
        """``(m / c1) / (sqrt(v / c2) + eps) + weight_decay * w`` in new tensors.

        corrections: (c1, c2) of each tensor (:func:`bias_corrections`); empty: the moments are taken as they are.
        """
        ...

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norms [n] of what this process holds."""
        ...

    def add_scaled(self, batch: Batch, directions: Sequence[Tensor], scales: Tensor) -> None:
        """``w += scales[i] * directions[i]`` in place (scales [n] on the device), then rounded into half parameters."""
        ...

    def show(self, batch: Batch, ratios: Tensor) -> None:
        """Copies the trust ratios [n] to where users look."""
        ...


class EachTensor:
    """Tensor by tensor: the reference. Its temporaries are no more than three tensors of the largest parameter."""

    def gradients(self, batch: Batch, maximize: bool) -> list[Tensor]:
        """See :class:`Arithmetic`."""
        grads = [grad.to(moment.dtype) for grad, moment in zip(batch.grads, batch.exp_avgs, strict=True)]
        return [-grad for grad in grads] if maximize else grads

    def update_moments(self, batch: Batch, grads: Sequence[Tensor], beta1: float, beta2: float) -> None:
        """See :class:`Arithmetic`."""
        for grad, exp_avg, exp_avg_sq in zip(grads, batch.exp_avgs, batch.exp_avg_sqs, strict=True):
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)

    def directions(
        self, batch: Batch, corrections: Sequence[tuple[float, float]], eps: float, weight_decay: float
    ) -> list[Tensor]:
        """See :class:`Arithmetic`."""
        found = []
        for index, (weight, exp_avg) in enumerate(zip(batch.weights, batch.exp_avgs, strict=True)):
            denominator = batch.exp_avg_sqs[index].sqrt()
            if corrections:
                factor, added = _folded(*corrections[index], eps)
                denominator.mul_(factor).add_(added)
            else:
                denominator.add_(eps)
            direction = torch.div(exp_avg, denominator, out=denominator)
            if weight_decay:
                direction.add_(weight, alpha=weight_decay)
            found.append(direction)
        return found

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """See :class:`Arithmetic`."""
        return torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])

    def add_scaled(self, batch: Batch, directions: Sequence[Tensor], scales: Tensor) -> None:
        """See :class:`Arithmetic`."""
        for weight, direction, scale in zip(batch.weights, directions, scales.unbind(), strict=True):
            weight.addcmul_(direction, scale)
        for param, weight in zip(batch.params, batch.weights, strict=True):
            if weight is not param:
                param.copy_(weight)

    def show(self, batch: Batch, ratios: Tensor) -> None:
        """See :class:`Arithmetic`."""
        for shown, ratio in zip(batch.trust_ratios, ratios.unbind(), strict=True):
            shown.copy_(ratio)


class MultiTensor:
    """Many tensors a launch (``torch._foreach_*``). Where these have no joint kernel they loop inside of torch."""

    def gradients(self, batch: Batch, maximize: bool) -> list[Tensor]:
        """See :class:`Arithmetic`."""
        grads = batch.grads
        if grads[0].dtype != batch.exp_avgs[0].dtype:
            wide = [torch.empty_like(grad, dtype=batch.exp_avgs[0].dtype) for grad in grads]
            torch._foreach_copy_(wide, grads)
            grads = wide
        return list(torch._foreach_neg(grads)) if maximize else grads

    def update_moments(self, batch: Batch, grads: Sequence[Tensor], beta1: float, beta2: float) -> None:
        """See :class:`Arithmetic`."""
        torch._foreach_lerp_(batch.exp_avgs, list(grads), 1 - beta1)
        torch._foreach_mul_(batch.exp_avg_sqs, beta2)
        torch._foreach_addcmul_(batch.exp_avg_sqs, list(grads), list(grads), 1 - beta2)

    def directions(
        self, batch: Batch, corrections: Sequence[tuple[float, float]], eps: float, weight_decay: float
    ) -> list[Tensor]:
        """See :class:`Arithmetic`."""
        denominators = torch._foreach_sqrt(batch.exp_avg_sqs)
        if corrections:
            factors, added = zip(*(_folded(*correction, eps) for correction in corrections), strict=True)
            torch._foreach_mul_(denominators, factors)
            torch._foreach_add_(denominators, added)
        else:
            torch._foreach_add_(denominators, eps)
        found = torch._foreach_div(batch.exp_avgs, denominators)
        if weight_decay:
            torch._foreach_add_(found, batch.weights, alpha=weight_decay)
        return list(found)

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """See :class:`Arithmetic`."""
        return torch.stack(torch._foreach_norm(list(tensors)))

    def add_scaled(self, batch: Batch, directions: Sequence[Tensor], scales: Tensor) -> None:
        """See :class:`Arithmetic`."""
        torch._foreach_addcmul_(batch.weights, list(directions), list(scales.unbind()))
        if batch.weights[0] is not batch.params[0]:
            torch._foreach_copy_(batch.params, batch.weights)

    def show(self, batch: Batch, ratios: Tensor) -> None:
        """See :class:`Arithmetic`."""
        torch._foreach_copy_(batch.trust_ratios, list(ratios.unbind()))


#: By the option ``foreach``, once it is decided.
ARITHMETIC: dict[bool, Arithmetic] = {False: EachTensor(), True: MultiTensor()}


def bias_corrections(steps: Sequence[float], beta1: float, beta2: float) -> list[tuple[float, float]]:
    """``(1 - beta1^t, 1 - beta2^t)`` for each count of updates t (from 1)."""
    return [(1 - beta1**step, 1 - beta2**step) for step in steps]


def whole_norms(norms: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Norms of whole tensors [...] from those of the parts that the processes of each group hold."""
    if not groups:
        return norms
    squares = norms.square()
    for group in groups:
        dist.all_reduce(squares, group=group)
    return squares.sqrt_()


def _folded(correction1: float, correction2: float, eps: float) -> tuple[float, float]:
    """Factor and addend for sqrt(v), so that m over the result is the corrected direction: one pass fewer over m."""
    return correction1 / math.sqrt(correction2), correction1 * eps
