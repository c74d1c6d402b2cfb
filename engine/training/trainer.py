"""A model in training: everything that the sections of a configuration ask for, put together once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from engine.errors import EngineError
from engine.training.block_stack import find_stack
from engine.training.build import TrainingPlan
from engine.training.calls import Caller, OutputLoss, split
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.data.batches import Batches
from engine.training.data.samples import Samples
from engine.training.datasets import samples_of
from engine.training.evaluation import figures_of
from engine.training.loop import Loop, StepReport
from engine.training.model import load_model, outputs_of, positions
from engine.training.parallel import Means, share
from engine.training.random_state import RandomState
from engine.training.ranks import Ranks
from ops.optimizers.compressed import CompressedOptimizer
from ops.optimizers.pays import Verdict


class Trainer:
    """Owns the model, its optimizer and the loop. ``plan`` holds what was decided."""

    def __init__(
        self,
        plan: TrainingPlan,
        *,
        model: nn.Module | None = None,
        tokenizer: Callable[[], Any] = lambda: None,
        loss_function: OutputLoss | None = None,
    ) -> None:
        """``model`` None loads what the configuration names; ``tokenizer`` is asked for when it is needed;
        ``loss_function(outputs, batch)`` is for models whose outputs hold no loss."""
        config = plan.config
        self.config, self.plan = config, plan
        self.settings, self.device, self.sizes = plan.settings, plan.device, plan.sizes
        self._tokenizer = tokenizer
        torch.manual_seed(self.settings.seed)
        given, mode = model is not None, self.plan.mode
        self.model = (load_model(config, self._tokenizer_or_none()) if model is None else model).to(self.device)
        torch.manual_seed(self.settings.seed + self.ranks.rank)  # each process drops out other elements
        if given and mode != "fp32" and any(p.dtype != torch.float32 for p in self.model.parameters()):
            raise EngineError(f'$.precision: "{mode}" trains weights that are kept in fp32: give model.float()')
        self.updates = 0  # of the weights; autograd does not count what torch's fused optimizers write
        self.means = Means()
        self.batches: Batches | None = None  # of the last fit
        self._samples: dict[str, Samples] = {}
        self._caller = Caller(self.model, self.device, loss_function)
        if self.settings.activation_checkpointing:
            checkpoint_activations(self.model)

    @cached_property
    def loop(self) -> Loop:
        """The loop, made when it is first needed: its length may follow from the data."""
        return self.plan.loop(self.model, self._caller.loss_of, self.means, self._count_update)

    @property
    def ranks(self) -> Ranks:
        """The processes that train together, of which this is one; this one alone until the others are there."""
        return self.plan.ranks

    @property
    def step(self) -> int:
        """Optimizer steps done. Makes no loop: all processes have to do that together."""
        return self.loop.progress.step if "loop" in vars(self) else 0

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of each weight; so from the first step on."""
        return isinstance(self.model, FSDPModule)

    def _count_update(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.updates += 1

    # ---- weights of several processes ----

    @property
    def _compressed(self) -> CompressedOptimizer | None:
        """The optimizer, if it is one that exchanges by itself and has begun."""
        optimizer = self.loop.progress.optimizer if "loop" in vars(self) else None
        return optimizer if isinstance(optimizer, CompressedOptimizer) else None

    @property
    def exchange(self) -> Verdict | None:
        """What the optimizer has measured of its exchanges, and decided, if it has."""
        return None if self._compressed is None else self._compressed.verdict

    def meet(self) -> None:
        """All processes get the same weights, where 0/1 Adam lets them differ between two exchanges. Called by all of
        them, before weights are saved or evaluated."""
        if self._compressed is not None:
            self._compressed.meet()
            self.updates += 1

    def share(self) -> None:
        """All processes get the weights of the first."""
        share(self.model)
        if self._compressed is not None:
            self._compressed.start_together()

    # ---- a step ----

    def train_batch(self, batch: Any) -> StepReport:
        """One optimizer step on this process's part of a batch, a list of micro-batches, or an iterator's next ones."""
        return self.loop.train_batch(self.micro_batches(batch))

    def micro_batches(self, batch: Any, processes: int = 1) -> list[Any]:
        """The micro-batches of a step that ``batch`` makes, for as many processes; an iterator's next ones."""
        sizes, count = self.sizes, self.sizes.accumulation * processes
        if isinstance(batch, Iterator):
            parts = list(islice(batch, count))
        else:
            parts = batch if isinstance(batch, list) else split(batch, sizes.micro)
        if len(parts) != count:
            whose = "in each process" if processes == 1 else f"in each of {processes} processes"
            raise EngineError(
                f"a step is {sizes.accumulation} micro-batches of {sizes.micro} rows {whose} "
                f"($.training: {sizes.train} in all), got {len(parts)}"
            )
        return parts

    def forward(self, batch: Any) -> Any:
        """A micro-batch's outputs, with a ``loss`` to give to :meth:`backward`."""
        self.loop.forward(batch)
        return self._caller.outputs

    def loss_of(self, batch: Any) -> Tensor:
        """A micro-batch's loss by the model's own forward, in whatever mode it is, with its graph."""
        with self.plan.precision.forward():
            return self._caller.loss_of(self.model, batch)

    def infer(self, batch: Any) -> Any:
        """The model's own outputs in evaluation mode, without gradients."""
        self.model.eval()
        with torch.no_grad(), self.plan.served(), self.plan.precision.forward():
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
            limit, outputs = positions(getattr(self.model, "config", None)), outputs_of(self.model)
            kind = self.plan.data_task(self.model)
            self._samples[part] = samples_of(data, part, self._tokenizer(), kind, outputs, limit)
        return self._samples[part]

    def evaluate(self, samples: Samples) -> dict[str, float]:
        """The figures of the samples' task over all processes, the one that judges first. Each module's mode stays."""
        self.meet()
        data, modes = self.config.data, [(module, module.training) for module in self.model.modules()]
        wanted = None if data is None else data.metric
        try:
            return figures_of(samples, self.infer, self._loss_of, self.sizes.micro, self.ranks, wanted)
        finally:
            for module, mode in modes:
                module.training = mode

    def _loss_of(self, batch: Any) -> Tensor:
        """In evaluation mode, without gradients."""
        self.model.eval()
        with torch.no_grad(), self.plan.served(), self.plan.precision.forward():
            return self._caller.loss_of(self.model, batch)

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
        self.meet()
        whole = None
        if not self.ranks.alone:
            how = StateDictOptions(full_state_dict=True, cpu_offload=True)
            whole = get_model_state_dict(self.model, options=how)  # all processes give what they hold to the first
        self.ranks.first(lambda: self._write(Path(directory), tokenizer, whole))

    def _write(self, target: Path, tokenizer: Any, whole: Mapping[str, Any] | None) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            cast(Any, self.model).save_pretrained(str(aside), state_dict=whole, safe_serialization=True)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(aside))
            _name_class(aside / "config.json", type(self.model).__name__)
            target.mkdir(exist_ok=True)
            for file in sorted(aside.iterdir()):
                os.replace(file, target / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _name_class(path: Path, name: str) -> None:
    """``fully_shard`` has changed the model's class, which older transformers then write into the config."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["architectures"] = [name.removeprefix("FSDP")]
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def checkpoint_activations(model: nn.Module) -> None:
    """Each block's activations are computed again in the backward pass: by Hugging Face's own switch, else around the
    blocks of the model's stack."""
    if getattr(model, "supports_gradient_checkpointing", False):
        cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return
    for block in find_stack(model).blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
