"""What a training feature is: one file, one class, named hooks that do nothing until they are overridden.

The loop has no feature branches: it walks a tuple of features and calls each hook in order. A feature whose
configuration is on and that ends up applied to nothing raises in ``setup``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class Progress:
    """Where training stands: shared by the loop and its features, saved with a checkpoint.

    step:        optimizer steps done.
    micro_batch: index of the micro-batch in the current step, of ``micro_batches``.
    model, optimizer: what is being trained; a feature may read both and replace the model's submodules in ``setup``.
    """

    model: nn.Module
    optimizer: Optimizer
    step: int = 0
    micro_batch: int = 0
    micro_batches: int = 1


class Feature:
    """A training feature. Hooks are called in the order in which they stand here."""

    #: Key of the feature's state in a checkpoint, and its name in messages.
    name: ClassVar[str]
    #: Whether checkpoints hold it. How processes work together is not part of a run: the next may have others.
    saved: ClassVar[bool] = True

    def setup(self, progress: Progress) -> None:
        """Once, before the first step. Raises :class:`engine.errors.EngineError` if the feature applies to nothing."""

    def step_start(self, progress: Progress) -> None:
        """Before the first micro-batch of an optimizer step."""

    def forward_context(self, progress: Progress) -> AbstractContextManager[Any]:
        """Around each micro-batch's forward pass."""
        return nullcontext()

    def loss(self, progress: Progress, loss: Tensor) -> Tensor:
        """The micro-batch's scalar loss, possibly with a term of the feature's own."""
        return loss

    def backward_end(self, progress: Progress) -> None:
        """After each micro-batch's backward pass; gradients are summed so far."""

    def optimizer_step_start(self, progress: Progress) -> None:
        """After the last micro-batch: gradients are complete, weights not yet changed."""

    def optimizer_step_end(self, progress: Progress) -> None:
        """Weights have changed; gradients are still there."""

    def step_end(self, progress: Progress) -> Mapping[str, float]:
        """The step is counted. Returns what the feature wants to see in the metrics."""
        return {}

    def step_skipped(self, progress: Progress) -> None:
        """Instead of the two before: a gradient overflowed in fp16, the weights are as they were, and the step does not
        count."""

    def step_failed(self, progress: Progress) -> None:
        """Instead of what is left of a step: it has raised. What the feature has put around it goes."""

    def state_dict(self) -> dict[str, Any]:
        """What the feature needs to go on exactly where it stopped."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back."""
