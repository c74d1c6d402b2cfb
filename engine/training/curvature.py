"""The largest eigenvalue of each block's Hessian, by power iteration (as DeepSpeed's ``runtime/eigenvalue.py``).

For the Hessian ``H_i`` of the loss in the weights of block ``i`` alone: ``v`` normal and of length 1; then ``H_i v`` is
the derivative of ``gradient . v``, ``lambda = v . H_i v``, ``v = H_i v / (|H_i v| + stability)``, until ``lambda``
changes by less than ``tol``. What counts is each block's share of the largest, ``|lambda_i| / max_j |lambda_j|``; a
block without one (dropped, or no number) counts as the largest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

log = logging.getLogger("slipstream.training")


class Curvature:
    """Finds the eigenvalues of blocks, the same on all ranks."""

    def __init__(
        self,
        max_iter: int = 100,
        tol: float = 1e-2,
        stability: float = 1e-6,
        seed: int = 0,
        scale: Callable[[], float] = lambda: 1.0,
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        """``scale``: what the loss is multiplied by, so that fp16's gradients do not vanish; divided out again.
        ``mean``: of a tensor over the ranks. The mean of their ``H v`` is that of the whole batch's Hessian."""
        self.max_iter, self.tol, self.stability, self.seed = max_iter, tol, stability, seed
        self._scale, self._mean = scale, mean

    def shares(self, loss: Tensor, blocks: Sequence[Sequence[Tensor]]) -> list[float]:
        """Of each block, in [0, 1]. ``loss``: a scalar whose graph stays; ``blocks``: each block's weights, in fp32."""
        found = [abs(value) for value in self.eigenvalues(loss, blocks)]
        unknown = [index for index, value in enumerate(found) if not value]
        if len(unknown) == len(found):
            log.warning("no block's loss is curved (or none by a number): all keep their bits for as long")
        largest = max(found)
        return [value / largest if value else 1.0 for value in found]

    def eigenvalues(self, loss: Tensor, blocks: Sequence[Sequence[Tensor]]) -> list[float]:
        """The eigenvalues of largest magnitude; 0 where there is none."""
        scale = self._scale()
        weights = [weight for block in blocks for weight in block]
        grads = iter(torch.autograd.grad(loss * scale, weights, create_graph=True, allow_unused=True))
        generator = torch.Generator(weights[0].device).manual_seed(self.seed)
        found = []
        for block in blocks:
            pairs = [(grad, weight) for weight in block if (grad := next(grads)) is not None and grad.requires_grad]
            found.append(self._largest(pairs, scale, generator) if pairs else 0.0)
        return found

    def _largest(self, pairs: Sequence[tuple[Tensor, Tensor]], scale: float, generator: torch.Generator) -> float:
        outputs, inputs = zip(*pairs, strict=True)
        count = sum(weight.numel() for weight in inputs)
        vector = torch.randn(count, generator=generator, device=inputs[0].device)
        vector /= vector.norm()
        value = 0.0
        for _ in range(self.max_iter):
            product = self._product(outputs, inputs, vector) / scale
            before, value = value, float(vector.dot(product))
            if not math.isfinite(value) or value == 0:
                return 0.0
            if abs((value - before) / value) < self.tol:
                break
            vector = product / (product.norm() + self.stability)
        return value

    def _product(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], vector: Tensor) -> Tensor:
        """``H v`` over all ranks, flat."""
        parts = vector.split([weight.numel() for weight in inputs])
        along = [part.view_as(weight) for part, weight in zip(parts, inputs, strict=True)]
        found = torch.autograd.grad(
            outputs, inputs, along, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return self._mean(torch.cat([part.flatten() for part in found]))
