"""The connector of training: turns sections of a configuration into objects, resolves every ``"auto"``, says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from config_schema import Config
from config_schema.optimizer import AdamW, Compressed
from config_schema.training import PowerSGD
from engine.build import Resolver, device_of, reasons, resolved
from engine.errors import EngineError
from engine.profiling import check
from engine.training.batch_size import resolve_batch_sizes
from engine.training.block_stack import find_stack
from engine.training.curvature import Curvature
from engine.training.datasets import data_task
from engine.training.feature import Feature
from engine.training.gradient_exchange import Exchange
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop, LossFunction
from engine.training.model import model_task, outputs_of
from engine.training.moq import MoQ
from engine.training.optimizer import build_optimizer
from engine.training.parallel import join, keep_apart, launched, mean_of, spread
from engine.training.precision import LossScale, Mode, Precision
from engine.training.profile_step import ProfileStep
from engine.training.ranks import Ranks, ranks
from engine.training.schedules import build_schedule
from ops.compression import SingleProcess, TorchCollective

#: Bytes of a parameter in training: weight, gradient and AdamW's two moments, in fp32.
BYTES = 16
#: The share of a GPU's memory beyond which they are shared out; the rest is for activations.
SHARE = 0.6


class TrainingPlan:
    """What the sections come to, on this device and among these processes, which it joins if they are there.

    world: how many there are to be. starts: whether the engine is to start the others itself.
    length: optimizer steps of the training; None until the data say how many an epoch has.
    """

    def __init__(self, config: Config) -> None:
        assert config.training is not None, "the engine asks only then"
        self.config, self.settings = config, config.training
        self.resolver, settings = Resolver(), self.settings
        device = device_of(config, self.resolver)
        started = launched()
        self.world = self._processes(device, started)
        self.starts = started is None and self.world > 1
        self.device = (
            torch.device("cuda", 0)
            if self.starts and device.type == "cuda"
            else join(device, settings.exchange_timeout)
        )
        self.mode = self._mode()
        self.sizes = resolve_batch_sizes(
            settings.train_batch_size, settings.micro_batch_size, settings.accumulation_steps, self.world
        )
        self.length: int | None = settings.max_steps
        self._chosen: dict[str, Any] = {}

    @property
    def ranks(self) -> Ranks:
        """The processes, once they are there."""
        return ranks()

    def _processes(self, device: torch.device, started: int | None) -> int:
        """How many train together; ``started``: those that somebody has started."""
        wanted, path, choose = self.settings.processes, "$.training.processes", self.resolver.choose
        if started is not None:
            if wanted == "auto":
                return cast(int, choose(path, started, "as many were started"))
            if wanted is not None and wanted != started:
                raise EngineError(f"{path}: {wanted}, but {started} were started (by torchrun): make the two equal")
            return started
        count, one = torch.cuda.device_count(), self.config.device.startswith("cuda:")
        if wanted == "auto":
            if device.type != "cuda":
                return cast(int, choose(path, 1, "on a CPU"))
            if one:
                return cast(int, choose(path, 1, f'$.device names one GPU, "{device}"'))
            return cast(int, choose(path, count, f"{count} GPUs are visible"))
        if wanted is None or wanted == 1:
            return 1
        if one:
            raise EngineError(f'{path}: {wanted} processes need a GPU each, but $.device is "{device}": make it "cuda"')
        if device.type == "cuda" and wanted > count:
            raise EngineError(f"{path}: {wanted} processes need a GPU each, and {count} are visible: lower it")
        return wanted

    def _mode(self) -> Mode:
        wanted = self.config.precision
        assert wanted not in ("int8", "int4"), "config_schema.rules refuses these beside a training section"
        if wanted != "auto":
            return cast(Mode, wanted)
        choose = self.resolver.choose
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0):
            return cast(Mode, choose("$.precision", "bf16", "products in bf16, weights in fp32"))
        reason = "the most exact" if self.device.type == "cpu" else "this GPU has no bf16 arithmetic"
        return cast(Mode, choose("$.precision", "fp32", reason))

    def total_steps(self, path: str) -> int:
        """The length of the training, which the ``"auto"`` at ``path`` follows."""
        if self.length is None:
            raise EngineError(f'{path}: "auto" is the end of the training: set $.training.max_steps, or call fit()')
        return int(self._once(path, self.length, "the end of the training"))

    def _once(self, path: str, value: Any, reason: str) -> Any:
        """Notes a choice, however often it is asked for."""
        if path not in self._chosen:
            self._chosen[path] = self.resolver.choose(path, value, reason)
        return self._chosen[path]

    def data_task(self, model: nn.Module) -> str:
        """What ``model`` learns of the data: as said, or what it is made for."""
        data, config = self.config.data, self.config
        assert data is not None, "asked where there are data"
        name = type(model).__name__.removeprefix("FSDP" if isinstance(model, FSDPModule) else "")
        task = model_task(config, [name], "the model")
        if config.model.task == "auto":
            reason = f"the data are for {data.task}" if data.task != "auto" else f"{name} says so"
            self._once("$.model.task", task, reason)
        found = data_task(data, task, outputs_of(model))
        if data.task == "auto":
            self._once("$.data.task", found, f"what a {name} learns")
        return found

    # ---- parts ----

    @property
    def _exchange(self) -> Exchange:
        """How copies' gradients travel."""
        how = self.settings.gradient_exchange
        return (self.settings.power_sgd or PowerSGD()) if how == "PowerSGD" else how

    def data_parallel(self, model: nn.Module) -> Literal["replicate", "shard"]:
        """A copy of the model in each process, or a part of each weight."""
        wanted = self.settings.data_parallel
        if wanted == "shard" and self.world == 1 and self.ranks.alone:
            raise EngineError(
                '$.training.data_parallel: "shard" needs several processes: set $.training.processes, or use torchrun'
            )
        if self.settings.gradient_exchange != "full" and self.world == 1 and self.ranks.alone:
            raise EngineError(
                "$.training.gradient_exchange: one process exchanges nothing: leave it out, set $.training.processes, "
                "or use torchrun"
            )
        if self.settings.gradient_exchange == "PowerSGD" and self.mode == "fp16":
            raise EngineError(
                '$.precision: "auto" is fp16 here, whose overflows PowerSGD would carry on: make it "fp32"'
            )
        if wanted != "auto":
            return wanted
        path, reason = "$.training.data_parallel", "there is one process"
        if self.world > 1 or not self.ranks.alone:
            whole = None
            if isinstance(self.optimizer, Compressed):
                whole = f"{self.optimizer.type} exchanges whole weights' momenta"
            elif self.settings.gradient_exchange != "full":
                whole = "gradient_exchange is for copies"
            elif self.quantize_training is not None:
                whole = "quantize_training rounds whole weights"
            if whole is not None:
                return cast(Literal["replicate"], self._once(path, "replicate", whole))
            need = BYTES * sum(parameter.numel() for parameter in model.parameters())
            have = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None
            reason = f"weights, gradients and moments take {need / 1e9:.3g} GB a process"
            if have is not None and need > SHARE * have:
                reason += f", of the {have / 1e9:.3g} GB that the GPU has"
                return cast(Literal["shard"], self._once(path, "shard", reason))
        return cast(Literal["replicate"], self._once(path, "replicate", reason))

    @cached_property
    def precision(self) -> Precision:
        """What products are computed in, and the loss scale."""
        scale = self.settings.loss_scale
        chosen = None if scale is None else LossScale(scale.initial, scale.growth_interval)
        return Precision(self.mode, self.device.type, chosen)

    @cached_property
    def optimizer(self) -> Any:
        """The section "optimizer"."""
        if self.config.optimizer is not None:
            return self.config.optimizer
        chosen = AdamW(type="AdamW")
        reason = "the usual one; its learning rate is a guess: set it"
        self.resolver.choose("$.optimizer", chosen.model_dump(mode="json"), reason)
        return chosen

    def _schedule(self, optimizer: Optimizer) -> LRScheduler | None:
        chosen = self.config.schedule
        if chosen is None:
            return None
        total = None if chosen.total_steps == "auto" else chosen.total_steps
        if total is None and chosen.type != "constant":
            total = self.total_steps("$.schedule.total_steps")
        return build_schedule(chosen.type, optimizer, chosen.warmup_steps, total)

    @cached_property
    def layer_drop(self) -> LayerDrop | None:
        """The feature, if it is on."""
        chosen = self.config.progressive_layer_drop
        if chosen is None or not chosen.enabled:
            return None
        total = None if chosen.total_steps == "auto" else chosen.total_steps
        if chosen.gamma is None and total is None:
            total = self.total_steps("$.progressive_layer_drop.total_steps")
        return LayerDrop(chosen.theta, chosen.gamma, total, chosen.paths, chosen.seed)

    @cached_property
    def quantize_training(self) -> MoQ | None:
        """The feature, if it is on."""
        chosen = self.config.quantize_training
        if chosen is None or not chosen.enabled:
            return None
        second, curvature = chosen.eigenvalue, None
        if second is not None and second.enabled:
            curvature = Curvature(
                second.max_iter, second.tol, second.stability, chosen.seed, lambda: self.precision.scale, mean_of
            )
        return MoQ(chosen, lambda: self.length, curvature)

    def served(self) -> AbstractContextManager[None]:
        """Around an evaluation: the model computes with the weights that would be served."""
        return nullcontext() if self.quantize_training is None else self.quantize_training.served()

    @cached_property
    def profile_step(self) -> ProfileStep | None:
        """The feature, if it is on."""
        chosen = self.config.flops_profiler
        if chosen is None or not chosen.enabled:
            return None
        check(chosen)
        notes = []
        if self.layer_drop is not None:
            notes.append("layers were dropped at random: counts and times are of those that ran in their steps")
        if self.settings.compile:
            notes.append("counted as the model is written, timed as torch.compile has compiled it")
        return ProfileStep(chosen, self.device, self.mode, lambda: self.ranks, lambda: self.length, tuple(notes))

    def loop(
        self,
        model: nn.Module,
        loss: LossFunction,
        reduce: Callable[[Tensor], Tensor],
        updated: Callable[..., None],
    ) -> Loop:
        """The loop that trains ``model``: ``loss`` is given what to call for a forward pass, ``reduce`` averages losses
        over the processes, ``updated`` is called behind each change of the weights."""
        settings, drop, chosen = self.settings, self.layer_drop, self.optimizer
        options, clip_norm = chosen.model_dump(exclude={"type", "decay_all"}), settings.clip_norm
        how, module = self.data_parallel(model), model
        if isinstance(chosen, Compressed):
            exchange = keep_apart(model, self.mode == "fp16")
            options["collective"] = TorchCollective() if self.ranks.size > 1 else SingleProcess()
            options["max_grad_norm"], clip_norm = clip_norm or chosen.max_grad_norm, None
        else:
            module, exchange = spread(model, how, drop is not None, self.device, self._exchange)
        optimizer = build_optimizer(model, chosen.type, options, decay_all=chosen.decay_all)
        optimizer.register_step_post_hook(updated)
        called = cast(nn.Module, torch.compile(module)) if settings.compile else module
        own: tuple[Feature | None, ...] = (self.profile_step, drop, self.quantize_training)
        features = (*(feature for feature in own if feature is not None), *exchange)
        return Loop(
            model,
            optimizer,
            lambda _, batch: loss(called, batch),
            features,
            schedule=self._schedule(optimizer),
            precision=self.precision,
            clip_norm=clip_norm,
            accumulation=self.sizes.accumulation,
            reduce=reduce,
        )

    # ---- telling ----

    def describe(self, model: nn.Module) -> str:
        """The run in one line a fact. Raises where layers are to be dropped and there are none."""
        sizes, drop = self.sizes, self.config.progressive_layer_drop
        name = type(model).__name__.removeprefix("FSDP" if isinstance(model, FSDPModule) else "")
        lines = [
            f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters, on {self.device} in {self.mode}",
            f"a step is {sizes.train} samples: {sizes.accumulation} micro-batches of {sizes.micro} in each of "
            f"{sizes.world} processes",
        ]
        if drop is not None and drop.enabled:
            lines.append(f"layers are dropped in {find_stack(model, drop.paths)}")
        bits = self.config.quantize_training
        if bits is not None and bits.enabled:
            lines.append(f"weights are rounded from {bits.start_bits} to {bits.target_bits} bits")
        return "\n".join(lines)

    def explain(self, model: nn.Module) -> str:
        """The configuration as JSON with every ``"auto"`` that can be resolved, what is trained, and the reasons."""
        self.data_parallel(model)
        if self.config.data is not None:
            self.data_task(model)
        if self.optimizer is not None and self.length is not None:
            self._schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))]))
            self.layer_drop  # noqa: B018 - notes what its length is
        document = json.dumps(resolved(self.config, self.resolver.choices), indent=2, ensure_ascii=False)
        said = reasons(self.resolver.choices)
        return f"{document}\n\n{self.describe(model)}" + (f"\n\n{said}" if said else "")
