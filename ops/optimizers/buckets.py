"""What is exchanged together: the momenta of some parameters, on their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ops.optimizers.batch import Batch, Piece, end_to_end, pieces
from ops.optimizers.moments import Arithmetic


@dataclass
class Bucket:
    """Parameters of a batch on their way: ``momentum`` is flat, of all of them end to end."""

    arithmetic: Arithmetic
    batch: Batch
    momentum: Tensor
    wait: Callable[[], object]

    def arrived(self) -> Iterator[tuple[Piece, list[Tensor]]]:
        """Piece by piece, with what has come of each parameter. It is zero where the variance is: there nothing ever
        had a gradient, and signs would move it."""
        for piece in pieces(self.batch):
            flat, variance = self.momentum[piece.at], end_to_end(piece.batch.exp_avg_sqs)
            # On a CPU looking is cheaper than writing: almost everything has had a gradient.
            if flat.device.type != "cpu" or not variance.amin() > 0:
                flat.mul_(variance > 0)
            moments = piece.batch.exp_avgs
            parts = flat.split(sizes_of(piece.batch))
            yield piece, [part.view(moment.shape) for part, moment in zip(parts, moments, strict=True)]


def sizes_of(batch: Batch) -> list[int]:
    """Elements of its parameters."""
    return [moment.numel() for moment in batch.exp_avgs]
