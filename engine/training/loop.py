"""One optimizer step after another, walking the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import EngineError
from engine.training.feature import Feature, Progress

#: Computes a micro-batch's mean loss, a scalar.
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepReport:
    """step: optimizer steps done; loss: mean over the step's micro-batches; metrics: what features report, by name."""

    step: int
    loss: float
    metrics: Mapping[str, float]


class Loop:
    """Trains ``model`` with ``optimizer``; every feature's hooks are called in the order of ``features``."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, loss: LossFunction, features: Sequence[Feature] = ()
    ) -> None:
        names = [feature.name for feature in features]
        if len(set(names)) != len(names):
            raise EngineError(f"training features are named {', '.join(names)}: each may stand once")
        self.progress = Progress(model, optimizer)
        self.features = tuple(features)
        self._loss = loss
        for feature in self.features:
            feature.setup(self.progress)

    def train_batch(self, micro_batches: Sequence[Any]) -> StepReport:
        """One optimizer step on the mean gradient of ``micro_batches`` (at least one), which weigh the same."""
        if not micro_batches:
            raise EngineError("a step needs at least one micro-batch")
        progress = self.progress
        progress.model.train()
        progress.optimizer.zero_grad(set_to_none=True)
        self._walk("step_start")
        losses = [self._micro_batch(index, batch, len(micro_batches)) for index, batch in enumerate(micro_batches)]
        self._walk("optimizer_step_start")
        progress.optimizer.step()
        self._walk("optimizer_step_end")
        progress.step += 1
        metrics = {
            f"{feature.name}/{key}": v for feature in self.features for key, v in feature.step_end(progress).items()
        }
        return StepReport(progress.step, sum(losses) / len(losses), metrics)

    def _micro_batch(self, index: int, batch: Any, count: int) -> float:
        self.progress.micro_batch = index
        with ExitStack() as stack:
            for feature in self.features:
                stack.enter_context(feature.forward_context(self.progress))
            loss = self._loss(self.progress.model, batch)
        value = float(loss.detach())
        for feature in self.features:
            loss = feature.loss(self.progress, loss)
        (loss / count).backward()
        self._walk("backward_end")
        return value

    def _walk(self, hook: str) -> None:
        for feature in self.features:
            getattr(feature, hook)(self.progress)

    def state_dict(self) -> dict[str, Any]:
        """Step count and every feature's state (the model's and the optimizer's are theirs to give)."""
        return {"step": self.progress.step, "features": {f.name: f.state_dict() for f in self.features}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back. Raises where the features are not the same ones."""
        saved, own = set(state["features"]), {feature.name for feature in self.features}
        if saved != own:
            raise EngineError(f"the checkpoint has the state of features {sorted(saved)}, this run has {sorted(own)}")
        self.progress.step = state["step"]
        for feature in self.features:
            feature.load_state_dict(state["features"][feature.name])
