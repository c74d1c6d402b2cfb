"""A model in training: everything that the sections of a configuration ask for, put together once."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.checkpoint import checkpoint

from config_schema import Config
from config_schema.optimizer import AdamW
from config_schema.training import Training
from engine.build import Resolver, device_of
from engine.errors import EngineError
from engine.training.batch_size import BatchSizes, resolve_batch_sizes
from engine.training.block_stack import find_stack
from engine.training.calls import Caller, OutputLoss, split
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.data.batches import Batches
from engine.training.data.samples import Samples
from engine.training.datasets import data_task, samples_of
from engine.training.feature import Feature
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop, StepReport
from engine.training.metrics import metric_for
from engine.training.model import load_model, model_task
from engine.training.optimizer import build_optimizer
from engine.training.parallel import join, mean_over_ranks, spread
from engine.training.precision import LossScale, Mode, Precision
from engine.training.random_state import RandomState
from engine.training.ranks import ranks
from engine.training.schedules import build_schedule

log = logging.getLogger("slipstream.training")


class Trainer:
    """Owns the model, its optimizer and the loop. ``resolver`` holds what each ``"auto"`` became."""

    def __init__(
        self,
        config: Config,
        *,
        model: nn.Module | None = None,
        tokenizer: Callable[[], Any] = lambda: None,
        loss_function: OutputLoss | None = None,
    ) -> None:
        """``model`` None loads what the configuration names; ``tokenizer`` is asked for when it is needed;
        ``loss_function(outputs, batch)`` is for models whose outputs hold no loss."""
        assert config.training is not None, "the engine asks only then"
        self.config, self.settings = config, config.training
        self.resolver = Resolver()
        self.device = join(device_of(config, self.resolver))
        self.ranks = ranks()
        self.mode = self._mode()
        self.sizes = self._sizes()
        self._tokenizer = tokenizer
        torch.manual_seed(self.settings.seed)
        given = model is not None
        self.model = (load_model(config, self._tokenizer_or_none()) if model is None else model).to(self.device)
        torch.manual_seed(self.settings.seed + self.ranks.rank)  # each process drops out other elements
        if given and self.mode != "fp32" and any(p.dtype != torch.float32 for p in self.model.parameters()):
            raise EngineError(f'$.precision: "{self.mode}" trains weights that are kept in fp32: give model.float()')
        self.optimizer_choice = config.optimizer or self.resolver.choose(
            "$.optimizer", AdamW(type="AdamW"), "the usual one; its learning rate is a guess: set it"
        )
        self.length: int | None = self.settings.max_steps
        self.updates = 0  # of the weights; autograd does not count what torch's fused optimizers write
        self._samples: dict[str, Samples] = {}
        self._caller = Caller(self.model, self.device, loss_function)
        if self.settings.activation_checkpointing:
            checkpoint_activations(self.model)

    # ---- what was decided ----

    def _mode(self) -> Mode:
        wanted = self.config.precision
        if wanted != "auto":
            return wanted
        if self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0):
            return cast(Mode, self.resolver.choose("$.precision", "bf16", "products in bf16, weights in fp32"))
        return cast(Mode, self.resolver.choose("$.precision", "fp32", "the most exact"))

    def _sizes(self) -> BatchSizes:
        settings = self.settings
        return resolve_batch_sizes(
            settings.train_batch_size, settings.micro_batch_size, settings.accumulation_steps, self.ranks.size
        )

    def describe(self) -> str:
        """The run in one line a fact."""
        sizes, drop = self.sizes, self.config.progressive_layer_drop
        lines = [
            f"{type(self.model).__name__}, {sum(p.numel() for p in self.model.parameters()):,} parameters, "
            f"on {self.device} in {self.mode}",
            f"a step is {sizes.train} samples: {sizes.accumulation} micro-batches of {sizes.micro} in each of "
            f"{sizes.world} processes",
        ]
        if drop is not None and drop.enabled:
            lines.append(f"layers are dropped in {find_stack(self.model, drop.paths)}")
        return "\n".join(lines)

    # ---- parts, made when they are first needed: their lengths may follow from the data ----

    def total_steps(self, path: str) -> int:
        """The length of the training, which an ``"auto"`` at ``path`` follows."""
        if self.length is None:
            raise EngineError(f'{path}: "auto" is the end of the training: set $.training.max_steps, or call fit()')
        return self.length

    @cached_property
    def loop(self) -> Loop:
        """The loop, with the optimizer, the schedule and the features."""
        settings = self.settings
        drop = (self.layer_drop,) if self.layer_drop is not None else ()
        how = settings.data_parallel
        kind: Literal["replicate", "shard"] = "replicate" if how == "auto" else how
        module, exchange = spread(self.model, kind, bool(drop), self.device)
        if kind == "shard" and not exchange:
            raise EngineError('$.training.data_parallel: "shard" needs several processes: start them with torchrun')
        chosen = self.optimizer_choice
        options = chosen.model_dump(exclude={"type", "decay_all"})
        optimizer = build_optimizer(self.model, chosen.type, options, decay_all=chosen.decay_all)
        optimizer.register_step_post_hook(self._count_update)
        called = torch.compile(module) if settings.compile else module
        return Loop(
            self.model,
            optimizer,
            lambda _, batch: self._caller.loss_of(cast(nn.Module, called), batch),
            cast(Sequence[Feature], (*drop, *exchange)),
            schedule=self._schedule(optimizer),
            precision=Precision(self.mode, self.device.type, self._loss_scale(settings)),
            clip_norm=settings.clip_norm,
            accumulation=self.sizes.accumulation,
            reduce=mean_over_ranks,
        )

    def _count_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.updates += 1

    def _loss_scale(self, settings: Training) -> LossScale | None:
        scale = settings.loss_scale
        return None if scale is None else LossScale(scale.initial, scale.growth_interval)

    def _schedule(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        chosen = self.config.schedule
        if chosen is None:
            return None
        total = chosen.total_steps
        if total == "auto":
            total = None if chosen.type == "constant" else self.total_steps("$.schedule.total_steps")  # type: ignore[assignment]
        return build_schedule(chosen.type, optimizer, chosen.warmup_steps, cast("int | None", total))

    @cached_property
    def layer_drop(self) -> LayerDrop | None:
        """The feature, if it is on."""
        chosen = self.config.progressive_layer_drop
        if chosen is None or not chosen.enabled:
            return None
        path = "$.progressive_layer_drop.total_steps"
        total = None
        if chosen.gamma is None:
            total = self.total_steps(path) if chosen.total_steps == "auto" else chosen.total_steps
        return LayerDrop(chosen.theta, chosen.gamma, total, chosen.paths, chosen.seed)

    # ---- a step ----

    def train_batch(self, batch: Any) -> StepReport:
        """One optimizer step on this process's part of a batch (or on a list of micro-batches)."""
        parts = batch if isinstance(batch, list) else split(batch, self.sizes.micro)
        if len(parts) != self.sizes.accumulation:
            sizes = self.sizes
            raise EngineError(
                f"a step is {sizes.accumulation} micro-batches of {sizes.micro} rows in each process "
                f"($.training: {sizes.train} in all), got {len(parts)}"
            )
        return self.loop.train_batch(parts)

    def forward(self, batch: Any) -> Any:
        """A micro-batch's outputs, with a ``loss`` to give to :meth:`backward`."""
        self.loop.forward(batch)
        return self._caller.outputs

    def infer(self, batch: Any) -> Any:
        """The model's own outputs in evaluation mode, without gradients."""
        self.model.eval()
        with torch.no_grad(), self.loop.precision.forward():
            return self._caller.outputs_of(self.model, batch)

    # ---- data and evaluation ----

    def _tokenizer_or_none(self) -> Any:
        return self._tokenizer() if self.config.data is not None else None

    def samples(self, part: Literal["train", "eval"]) -> Samples:
        """The samples of the section "data", tokenized once."""
        if part not in self._samples:
            data = self.config.data
            if data is None:
                raise EngineError(f'there is nothing to {part}: give fit() a dataset, or the config a section "data"')
            facts = getattr(self.model, "config", None)
            task = model_task(self.config, [type(self.model).__name__], "the model")
            outputs = int(getattr(facts, "num_labels", 2))
            kind = data_task(data, task, outputs)
            limit = getattr(facts, "max_position_embeddings", None) or getattr(facts, "n_positions", None) or 2**31
            self._samples[part] = samples_of(data, part, self._tokenizer(), kind, data.labels or outputs, limit)
        return self._samples[part]

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """The figures of the samples' task, over all processes. Draws no random number."""
        if not hasattr(samples, "task"):
            return self._mean_loss(samples)
        metric = metric_for(samples)
        size, rank = self.sizes.micro, self.ranks.rank
        batches = Batches(samples, size, rank=rank, world=self.ranks.size, passes=1, shuffle=False)
        for batch in batches:
            outputs = self.infer(batch.inputs)
            if not batch.real:
                continue
            real, labels = slice(batch.real), batch.inputs.get("labels")
            if labels is None:
                spans = outputs.start_logits[real], outputs.end_logits[real]
                metric.update(spans, None, batch.indices[real])
            else:
                metric.update(outputs.logits[real].cpu(), labels[real], batch.indices[real])
        self.model.train()
        metric.merge(self.ranks.every(metric.state))
        return metric.compute()

    def _mean_loss(self, samples: Samples) -> dict[str, float]:
        """Of a user's own samples: the mean of the batches' losses, by their rows."""
        total, rows = 0.0, 0
        size, rank = self.sizes.micro, self.ranks.rank
        for batch in Batches(samples, size, rank=rank, world=self.ranks.size, passes=1, shuffle=False):
            self.model.eval()
            with torch.no_grad(), self.loop.precision.forward():
                loss = float(self._caller.loss_of(self.model, batch.inputs))
            total, rows = total + loss * batch.real, rows + batch.real
        self.model.train()
        parts = self.ranks.every(lambda: (total, rows))
        return {"loss": sum(part[0] for part in parts) / max(sum(part[1] for part in parts), 1)}

    # ---- saving ----

    def objects(self, data: Batches | None = None) -> Mapping[str, Stateful]:
        """All that a checkpoint holds."""
        found: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.loop.progress.optimizer,
            "loop": self.loop,
            "random": RandomState(),
        }
        return found if data is None else {**found, "data": data}

    def checkpoints(self, directory: str | os.PathLike[str] | None = None) -> Checkpoints:
        """Those in ``directory``, or of the run's output."""
        if directory is None:
            directory = self.output / "checkpoints"
        return Checkpoints(Path(directory), self.settings.keep_checkpoints)

    @property
    def output(self) -> Path:
        """The run's directory."""
        if self.settings.output is None:
            raise EngineError("$.training.output: missing: name a directory for metrics and checkpoints")
        return Path(self.settings.output)

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any) -> None:
        """Model (fp32 safetensors), its configs and the tokenizer, as ``from_pretrained`` opens them. Written aside."""
        if not hasattr(self.model, "save_pretrained"):
            raise EngineError(
                f"save_pretrained writes Hugging Face models, this is a {type(self.model).__name__}: save_checkpoint() "
                "keeps it"
            )
        if self.settings.data_parallel == "shard" and not self.ranks.alone:
            raise EngineError("save_pretrained writes whole weights: go on from a checkpoint with one process")
        self.ranks.first(lambda: self._write(Path(directory), tokenizer))

    def _write(self, target: Path, tokenizer: Any) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            cast(Any, self.model).save_pretrained(str(aside), safe_serialization=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(aside))
            target.mkdir(exist_ok=True)
            for file in sorted(aside.iterdir()):
                os.replace(file, target / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def checkpoint_activations(model: nn.Module) -> None:
    """Each block's activations are computed again in the backward pass: by Hugging Face's own switch, else around the
    blocks of the model's stack."""
    if getattr(model, "supports_gradient_checkpointing", False):
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for block in find_stack(model).blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
