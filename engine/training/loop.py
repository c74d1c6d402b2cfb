"""One optimizer step after another, walking the features."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.errors import EngineError
from engine.training.feature import Feature, Progress
from engine.training.precision import Precision
from ops.optimizers.compressed import CompressedOptimizer

log = logging.getLogger("slipstream.training")

#: Computes a micro-batch's mean loss, a scalar.
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class StepReport:
    """What an optimizer step did.

    step:           optimizer steps done. loss: mean over the step's micro-batches, before features change it.
    metrics:        what features report, by name.
    skipped:        a gradient overflowed in fp16: nothing changed but the loss scale, and ``step`` did not count up.
    learning_rates: of each parameter group, as the step used them.
    grad_norm:      L2 norm of all gradients before clipping; None where nothing is clipped. A compressed optimizer that
                    is past its warm-up knows the root mean square of the processes' norms instead.
    """

    step: int
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: bool = False
    learning_rates: tuple[float, ...] = ()
    grad_norm: float | None = None

    def __float__(self) -> float:
        return self.loss


class NoNumber(EngineError):
    """A loss or the gradients' norm is infinite or NaN; the weights are as they were before the step.

    micro_batches: those of this process whose own loss is no number.
    """

    def __init__(self, message: str, micro_batches: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.micro_batches = tuple(micro_batches)


class Loop:
    """Trains ``model`` with ``optimizer``; every feature's hooks are called in the order of ``features``.

    A step is :meth:`train_batch`; or, micro-batch by micro-batch, :meth:`forward`, :meth:`backward` and :meth:`step`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: LossFunction,
        features: Sequence[Feature] = (),
        *,
        schedule: LRScheduler | None = None,
        precision: Precision | None = None,
        clip_norm: float | None = None,
        accumulation: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda losses: losses,
    ) -> None:
        """``clip_norm`` is the largest L2 norm of all gradients together; ``accumulation`` the micro-batches that make
        a step in the three calls; ``reduce`` the mean of losses over all processes, which all call it."""
        names = [feature.name for feature in features]
        if len(set(names)) != len(names):
            raise EngineError(f"training features are named {', '.join(names)}: each may stand once")
        if clip_norm is not None and clip_norm <= 0:
            raise EngineError(f"clip_norm is {clip_norm}: it must be above 0, or left out")
        if clip_norm is not None and isinstance(optimizer, CompressedOptimizer):
            raise EngineError(
                f"clip_norm would clip each process's own gradients: give {type(optimizer).__name__} a max_grad_norm"
            )
        if accumulation < 1:
            raise EngineError(f"accumulation is {accumulation}: a step needs at least one micro-batch")
        self.progress = Progress(model, optimizer)
        self.features = tuple(features)
        self.schedule, self.precision = schedule, precision or Precision()
        self.clip_norm, self.accumulation = clip_norm, accumulation
        self._loss, self._reduce = loss, reduce
        self._parameters = list(model.parameters())  # to look for them walks all modules
        self._losses: list[Tensor] = []
        self._overflowed = False
        self.precision.assert_trains(model)
        for feature in self.features:
            feature.setup(self.progress)

    def train_batch(self, micro_batches: Sequence[Any]) -> StepReport:
        """One optimizer step on the mean gradient of ``micro_batches`` (at least one), which weigh the same."""
        if not micro_batches:
            raise EngineError("a step needs at least one micro-batch")
        if self._losses:
            raise EngineError(f"{len(self._losses)} micro-batches wait for their step: call step() first")
        with self._told():
            for batch in micro_batches:
                self._backward(self._forward(batch, len(micro_batches)), len(micro_batches))
            return self._finish()

    # The three calls

    def forward(self, batch: Any) -> Tensor:
        """The micro-batch's mean loss, a scalar with its graph. The first of a step clears the gradients."""
        with self._told():
            return self._forward(batch, self.accumulation)

    def _forward(self, batch: Any, count: int) -> Tensor:
        progress = self.progress
        progress.micro_batches = count
        if not self._losses:
            if not progress.model.training:  # train() walks all modules, and parts may be kept in evaluation mode
                progress.model.train()
            progress.optimizer.zero_grad(set_to_none=True)
            self._walk("step_start")
        progress.micro_batch = len(self._losses)
        with ExitStack() as stack:
            for feature in self.features:
                stack.enter_context(feature.forward_context(progress))
            stack.enter_context(self.precision.forward())
            return self._loss(progress.model, batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss that :meth:`forward` gave (or of a multiple of it)."""
        if len(self._losses) == self.accumulation:
            raise EngineError(f"a step is {self.accumulation} micro-batches, and all have come: call step()")
        with self._told():
            self._backward(loss, self.accumulation)

    def step(self) -> StepReport | None:
        """The optimizer step once ``accumulation`` micro-batches have come, else None."""
        if not self._losses:
            raise EngineError("no micro-batch has come: call forward() and backward() before step()")
        with self._told():
            return self._finish() if len(self._losses) == self.accumulation else None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Features learn of what is raised inside."""
        try:
            yield
        except BaseException:
            self._walk("step_failed")
            raise

    def _backward(self, loss: Tensor, count: int) -> None:
        self._losses.append(loss.detach())
        for feature in self.features:
            loss = feature.loss(self.progress, loss)
        self.precision.scaled(loss / count).backward()
        self._walk("backward_end")

    def _finish(self) -> StepReport:
        """From complete gradients to the next step. One trip to the device, for the loss and the gradients' norm:
        before the weights change, so that a loss that is no number leaves them as they were."""
        progress, optimizer = self.progress, self.progress.optimizer
        self.precision.unscale(optimizer)
        self._walk("optimizer_step_start")
        norm = self._clip()
        loss, grad_norm = self._read(norm)
        self._losses = []
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        if not self.precision.step(optimizer):
            self._tell_overflow()
            self._walk("step_skipped")
            return StepReport(progress.step, loss, {}, True, rates, grad_norm)
        if isinstance(optimizer, CompressedOptimizer):
            grad_norm = self._norm_of_all(optimizer)
        self._walk("optimizer_step_end")
        if self.schedule is not None:
            self.schedule.step()
        progress.step += 1
        metrics = {
            f"{feature.name}/{key}": v for feature in self.features for key, v in feature.step_end(progress).items()
        }
        return StepReport(progress.step, loss, metrics, False, rates, grad_norm)

    def _clip(self) -> Tensor | None:
        if self.clip_norm is None:
            return None
        norm = nn.utils.clip_grad_norm_(self._parameters, self.clip_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _read(self, norm: Tensor | None) -> tuple[float, float | None]:
        """The step's mean loss and the norm, on the host. Raises :class:`NoNumber` if one of them is none and the loss
        scale is not to blame."""
        losses_of_all = self._reduce(torch.stack(self._losses).double())
        values = torch.cat([losses_of_all, *([] if norm is None else [norm.double().reshape(1)])]).tolist()
        losses = values[: len(self._losses)]
        loss, found = sum(losses) / len(losses), None if norm is None else values[-1]
        wrong = next((i for i, value in enumerate(losses) if not math.isfinite(value)), None)
        step = self.progress.step + 1
        if wrong is not None:
            own = [i for i, value in enumerate(torch.stack(self._losses).tolist()) if not math.isfinite(value)]
            self._losses = []
            raise NoNumber(
                f"step {step}: the loss of micro-batch {wrong} is {losses[wrong]}. The weights are as before the step: "
                "look at that batch, lower the learning rate, or clip gradients (clip_norm)",
                own,
            )
        if found is not None and not math.isfinite(found) and self.precision.mode != "fp16":
            self._losses = []
            raise NoNumber(
                f"step {step}: the norm of the gradients is {found}. The weights are as before the step: lower the "
                "learning rate, or look at the batch"
            )
        return loss, found

    def _norm_of_all(self, optimizer: CompressedOptimizer) -> float | None:
        """The norm that the optimizer has clipped by, in all processes alike."""
        if optimizer.skipped:
            raise NoNumber(
                f"step {self.progress.step + 1}: the norm of the gradients is no number, in one process at least. The "
                "weights are as before the step: lower the learning rate, or look at the batch"
            )
        return optimizer.grad_norm

    def _tell_overflow(self) -> None:
        if not self._overflowed:
            log.warning(
                "a gradient overflowed in fp16: the step is skipped, the loss scale is %g now "
                "(later ones are not told)",
                self.precision.scale,
            )
        self._overflowed = True

    def _walk(self, hook: str) -> None:
        for feature in self.features:
            getattr(feature, hook)(self.progress)

    def state_dict(self) -> dict[str, Any]:
        """Step count, schedule, loss scale and every feature's state (the model's and the optimizer's are theirs to
        give). Between two steps only."""
        if self._losses:
            raise EngineError("a step has begun: save between steps")
        return {
            "step": self.progress.step,
            "features": {f.name: f.state_dict() for f in self.features if f.saved},
            "schedule": {} if self.schedule is None else self.schedule.state_dict(),
            "precision": self.precision.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back. Raises where features, schedule or precision are others."""
        mine = [feature for feature in self.features if feature.saved]
        saved, own = set(state["features"]), {feature.name for feature in mine}
        if saved != own:
            raise EngineError(f"the checkpoint has the state of features {sorted(saved)}, this run has {sorted(own)}")
        if bool(state["schedule"]) != (self.schedule is not None):
            raise EngineError(f"the checkpoint {'has' if state['schedule'] else 'lacks'} a schedule, unlike this run")
        self.precision.load_state_dict(state["precision"])
        if self.schedule is not None:
            self.schedule.load_state_dict(dict(state["schedule"]))
        self.progress.step = state["step"]
        for feature in mine:
            feature.load_state_dict(state["features"][feature.name])
