"""Progressive layer drop for a Hugging Face ``Trainer``: one callback, and nothing else changes (docs/hf_trainer.md).

The callback drives the training feature :class:`engine.training.layer_drop.LayerDrop` from Trainer's events, which
stand around each micro-batch:

    on_step_begin, forward, backward, on_substep_end, forward, backward, ..., on_pre_optimizer_step, on_step_end

The gates of a micro-batch are drawn when the model's forward begins, counted when it ends, and opened by the event
behind its backward pass, which may have run blocks again (activation checkpointing).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState

from engine.errors import EngineError
from engine.training.feature import Progress
from engine.training.layer_drop import LayerDrop, Schedule
from engine.training.residual import uncompiled

log = logging.getLogger("slipstream.training")


class LayerDropCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """``Trainer(..., callbacks=[LayerDropCallback(theta=0.5)])`` trains with progressive layer drop.

    A step is one of Trainer's ``global_step``, which also counts steps that an overflow in fp16 skipped. Trainer's
    training logs get ``layer_drop/theta``, ``layer_drop/layers`` (mean number of layers that ran for a micro-batch) and
    ``layer_drop/expected`` (what the formula gives), the two means over the steps since the log before.
    """

    def __init__(
        self,
        theta: float = 0.5,
        gamma: float | None = None,
        total_steps: int | None = None,
        paths: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """The arguments of :class:`engine.training.layer_drop.LayerDrop`; with neither ``gamma`` nor ``total_steps``,
        ``total_steps`` is the length of the training. Raises :class:`EngineError` for a value out of range."""
        Schedule(theta, gamma, 1 if gamma is None and total_steps is None else total_steps)
        self.options = {"theta": theta, "gamma": gamma, "total_steps": total_steps, "paths": paths, "seed": seed}
        self.counts: dict[str, int] = {}  # of a checkpoint; Trainer sets it when it makes a callback of a saved state
        self._drop: LayerDrop | None = None
        self._progress: Progress | None = None
        self._hooks: list[RemovableHandle] = []
        self._forward: AbstractContextManager[Any] | None = None
        self._ran = self._in_step = False
        self._reports: list[Mapping[str, float]] = []

    @property
    def layer_drop(self) -> LayerDrop:
        """The feature at work: its stack, its counts of layers that ran. Raises before training has begun."""
        if self._drop is None:
            raise EngineError("LayerDropCallback: there is no layer drop before Trainer.train() begins")
        return self._drop

    def remove(self) -> None:
        """Takes the gates off the model. Trainer's end does it too; call it where training ended with an exception."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._forward, self._ran, self._in_step = [], None, False, False
        if self._drop is not None:
            self._drop.remove()

    # Trainer's events, in their order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the stack and puts the gates on; takes the counts of a checkpoint that Trainer resumes from.

        Raises :class:`EngineError` if the model has no stack of residual blocks, or if Trainer runs it in a way in
        which layers cannot be left out.
        """
        model = kwargs["model"]
        _refuse_unfit(args, model)
        self.remove()
        drop = LayerDrop(**self._resolved(state.max_steps))
        progress = Progress(model, kwargs["optimizer"], state.global_step)
        drop.setup(progress)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        counts = saved["attributes"]["counts"] if isinstance(saved, Mapping) else {}
        if counts:
            drop.load_state_dict(counts)
        self._drop, self._progress, self._reports = drop, progress, []
        self._hooks = [
            model.register_forward_pre_hook(self._forward_begins),
            model.register_forward_hook(self._forward_ends),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's probabilities."""
        progress = self._started()
        progress.step, progress.micro_batch = state.global_step, 0
        self.layer_drop.step_start(progress)
        self._in_step, self._ran = True, False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch's backward pass has ended, and it was not the step's last."""
        self._micro_batch_ends()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last micro-batch's backward pass has ended."""
        self._micro_batch_ends()
        self._in_step = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the step's metrics."""
        self._reports.append(self.layer_drop.step_end(self._started()))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the metrics to what Trainer logs of training, and to ``state.log_history``."""
        if logs is None or "loss" not in logs or not self._reports:
            return
        reports, self._reports = self._reports, []
        metrics = {key: sum(report[key] for report in reports) / len(reports) for key in ("layers", "expected")}
        named = {f"{LayerDrop.name}/{key}": v for key, v in {"theta": reports[-1]["theta"], **metrics}.items()}
        logs.update(named)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the gates off."""
        self.remove()

    def state(self) -> dict[str, Any]:
        """What Trainer writes into ``trainer_state.json``: the arguments, and how many layers ran."""
        counts = self.counts if self._drop is None else self._drop.state_dict()
        return {"args": dict(self.options), "attributes": {"counts": counts}}

    # Within

    def _resolved(self, max_steps: int) -> dict[str, Any]:
        options = dict(self.options)
        if options["gamma"] is None and options["total_steps"] is None:
            options["total_steps"] = max_steps
            log.info("layer_drop: total_steps is %d: the length of the training", max_steps)
        return options

    def _started(self) -> Progress:
        if self._progress is None or not self._hooks:
            raise EngineError("LayerDropCallback has no gates on a model: give it to Trainer before train() begins")
        return self._progress

    @uncompiled
    def _forward_begins(self, model: nn.Module, args: Any) -> None:
        """Before the model's forward. A second one in the same micro-batch runs behind the same gates, uncounted."""
        if self._in_step and model.training and not self._ran:
            self._ran = True
            self._forward = self.layer_drop.forward_context(self._started())
            self._forward.__enter__()

    @uncompiled
    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        entered, self._forward = self._forward, None
        if entered is not None:
            entered.__exit__(None, None, None)

    def _micro_batch_ends(self) -> None:
        progress = self._started()
        if not self._ran:
            raise EngineError(
                f"step {progress.step + 1}: the loss was computed without a call of the model itself in training mode, "
                "so that no layer was dropped: call model(...) in compute_loss, or leave LayerDropCallback out"
            )
        self.layer_drop.backward_end(progress)
        progress.micro_batch += 1
        self._ran = False


def _refuse_unfit(args: Any, model: nn.Module) -> None:
    """Ways to run a model in which its layers cannot be left out, or not be seen to be."""
    if args.deepspeed:
        raise EngineError("LayerDropCallback does not run under DeepSpeed's engine: leave deepspeed= out")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise EngineError('LayerDropCallback needs FSDP2: set {"fsdp_version": 2} in fsdp_config, or leave FSDP out')
    if args.n_gpu > 1:
        raise EngineError(
            f"Trainer would copy the model to {args.n_gpu} GPUs at each step (nn.DataParallel), gates and all: start "
            "one process a GPU with torchrun, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)"
        )
    if args.world_size > 1 and not any(isinstance(module, FSDPModule) for module in model.modules()):
        _refuse_unfit_replicas(args, model)


def _refuse_unfit_replicas(args: Any, model: nn.Module) -> None:
    """Settings with which DistributedDataParallel would wait for, or trip over, the gradients of dropped layers."""
    remedy = "set ddp_find_unused_parameters=True in TrainingArguments"
    asked = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    if args.ddp_find_unused_parameters is False:
        raise EngineError(f"a dropped layer has no gradient, and DistributedDataParallel would wait for it: {remedy}")
    if args.ddp_find_unused_parameters is None and isinstance(model, PreTrainedModel) and asked:
        raise EngineError(
            "a dropped layer has no gradient, and where activations are checkpointed, Trainer tells "
            f"DistributedDataParallel not to look for such layers: {remedy}"
        )
    if getattr(args, "ddp_static_graph", None):
        raise EngineError("layers that are dropped change the graph at each step: leave ddp_static_graph out")
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise EngineError(
                "reentrant checkpointing and find_unused_parameters do not go together in DistributedDataParallel: set "
                'gradient_checkpointing_kwargs={"use_reentrant": False} in TrainingArguments'
            )
