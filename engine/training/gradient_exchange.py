"""Gradients that ``DistributedDataParallel`` averages in another way than in full: its communication hooks."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from config_schema.training import PowerSGD
from engine.training.feature import Feature, Progress

log = logging.getLogger("slipstream.training")

#: "PowerSGD" is given as what it is to do.
Exchange = Literal["full", "bf16"] | PowerSGD


class LowRank(Feature):
    """Watches over PowerSGD's state, which no checkpoint holds: it belongs to buckets that each run cuts anew."""

    name: ClassVar[str] = "gradient_exchange"
    saved: ClassVar[bool] = False

    def __init__(self, state: PowerSGDState) -> None:
        self._state, self._told = state, False

    def step_start(self, progress: Progress) -> None:
        """Says once where a run goes on without it."""
        if progress.step and not self._state.iter and not self._told:
            log.warning(
                "PowerSGD begins anew at step %d: gradients travel in full for %d steps, and what low rank has missed "
                "so far is not made up for",
                progress.step, self._state.start_powerSGD_iter,
            )  # fmt: skip
        self._told = True


def exchange_by(wrapped: DistributedDataParallel, how: Exchange) -> tuple[Feature, ...]:
    """Lets ``wrapped`` average gradients so; the features that go with it. To be called once, before the first step."""
    if how == "full":
        return ()
    if how == "bf16":
        wrapped.register_comm_hook(None, _in_bf16)
        return ()
    state = PowerSGDState(None, matrix_approximation_rank=how.rank, start_powerSGD_iter=how.start_step)
    wrapped.register_comm_hook(state, powerSGD_hook)
    return (LowRank(state),)


def _in_bf16(state: Any, bucket: Any) -> torch.futures.Future[Tensor]:
    """torch's own, which DDP takes by that name on NCCL alone, although Gloo has sums of bf16 too."""
    return bf16_compress_hook(state, bucket)


# DDP compares annotations with classes; ours are texts.
_in_bf16.__annotations__ = dict(bf16_compress_hook.__annotations__)
