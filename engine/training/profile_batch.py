"""A profile of forward and backward passes on a batch, outside of any run: the model is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from engine.profiling import Repeats, judged_by
from engine.training.calls import size_of
from engine.training.random_state import RandomState
from engine.training.trainer import Trainer
from profiler.profile import Profiler
from profiler.report import Report, Workload

NOTE = "forward and backward passes on one batch; a run that profiles itself (flops_profiler) has the optimizer's too"


def profile_batch(trainer: Trainer, batch: Any, how: Repeats) -> Report:
    """A profile of the micro-batches of a step on ``batch``, as ``Trainer.train_batch`` takes it, in training mode.

    Weights, gradients, buffers, modes, random numbers and the optimizer's state are afterwards what they were. Layers
    are not dropped, gradients not exchanged.

    Raises:
        ProfilerError: as for ``profiler.profile.Profiler``.
        EngineError: the batch does not make a step, or gives no loss.
    """
    parts, model, ranks = trainer.micro_batches(batch), trainer.model, trainer.ranks
    precision, limits, notes = judged_by(trainer.device, trainer.plan.mode)
    profiler = Profiler(model, device=trainer.device, warm_up=how.warm_up, repeats=how.repeats, events=how.events)
    with _left_as_found(model):
        model.train()
        while not profiler.done:
            for parameter in model.parameters():
                parameter.grad = None
            with profiler.step():
                for part in parts:
                    trainer.loss_of(part).div(len(parts)).backward()
    rows, tokens = (sum(sizes) for sizes in zip(*map(size_of, parts), strict=True))
    workload = Workload(
        mode="training",
        precision=precision,
        samples=rows or None,
        tokens=tokens or None,
        micro_batches=len(parts),
        rank=ranks.rank,
        world_size=ranks.size,
        data_parallel=ranks.size,
    )
    report = profiler.report(workload, limits=limits, notes=(*notes, NOTE))
    return replace(report, name=report.name.removeprefix("FSDP"))


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Puts back what forward and backward passes change, however they end."""
    random = RandomState()
    drawn = random.state_dict()
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        random.load_state_dict(drawn)
