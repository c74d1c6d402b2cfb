"""The half of :class:`engine.Engine` that trains: a facade of :mod:`engine.training.trainer`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from config_schema import Config, SlipstreamError
from engine import build
from engine.checkpoint.directory import model_directory
from engine.errors import EngineError
from engine.inference.text import Text

if TYPE_CHECKING:
    from engine.profiling import Repeats
    from engine.training.fit import Summary
    from engine.training.loop import StepReport
    from engine.training.team import Team
    from engine.training.trainer import Trainer
    from profiler.report import Report

log = logging.getLogger("slipstream.training")

#: What is in a batch that is asked for its loss.
TARGETS = frozenset({"labels", "start_positions", "end_positions"})


class TrainingEngine:
    """Training, checkpoints, and inference on the weights as they are. Needs the configuration's section "training"."""

    _config: Config
    _live: Any
    text: Text
    _decided: build.Plan | None = None
    _trains: Trainer | None = None
    _team: Team
    _in_training = False
    _without_runtime: str | None = None

    def _begin_training(self, model: Any, tokenizer: Any, loss_function: Callable[[Any, Any], Tensor] | None) -> None:
        from engine.training.build import TrainingPlan  # these take a second to import
        from engine.training.team import assert_mirrored, team_of
        from engine.training.trainer import Trainer

        plan = TrainingPlan(self._config)
        assert_mirrored(plan, model=model, tokenizer=tokenizer, loss_function=loss_function)
        config = self._config.model
        directory = None if model is not None else model_directory(config.path, config.revision)
        self.text = Text(directory, None, tokenizer)
        self._trains = Trainer(plan, model=model, tokenizer=lambda: self.text.tokenizer, loss_function=loss_function)
        self._team = team_of(self._trains)
        self._live, self._in_training = self._trains.model, True

    @property
    def _trainer(self) -> Trainer:
        if self._trains is None:
            raise EngineError('this engine only infers: add a section "training" to its configuration')
        return self._trains

    @property
    def model(self) -> Any:
        """The live model: of a training engine, the one in training. None for one that infers from a checkpoint."""
        return self._live

    @property
    def global_step(self) -> int:
        """Optimizer steps done."""
        return self._trainer.step

    # ---- modes ----

    def train(self) -> None:
        """From now on ``engine(batch)`` is a micro-batch of training. A training engine begins so."""
        self._trainer.model.train()
        self._in_training = True

    def eval(self) -> None:
        """From now on ``engine(batch)`` is inference."""
        self._trainer.model.eval()
        self._in_training = False

    def _calls_model(self, batch: Any) -> bool:
        """Whether ``engine(batch)`` runs the model's own forward: while training, for a batch with labels, and for a
        model that the inference runtime does not know."""
        if self._trains is None:
            return False
        return self._in_training or (isinstance(batch, Mapping) and bool(TARGETS & batch.keys())) or not self._known()

    def _call_model(self, batch: Any) -> Any:
        if self._in_training:
            self._team.assert_here("engine(batch) while training", "; engine.eval() makes it inference")
            return self._trainer.forward(batch)
        if self._trainer.sharded:
            self._team.assert_here("the model's own forward over shards")
        return self._trainer.infer(batch)

    def _known(self) -> bool:
        """Whether the inference runtime runs this model; said once where it does not."""
        if self._without_runtime is None:
            try:
                self._plan  # noqa: B018 - decides, or says why it cannot
                self._without_runtime = ""
            except SlipstreamError as error:
                self._without_runtime = str(error)
                log.warning("inference runs the model's own forward: %s", error)
        return not self._without_runtime

    def _updates(self) -> int:
        """Optimizer steps so far: the weights' source does not see those of torch's fused optimizers."""
        return 0 if self._trains is None else self._trains.updates

    @property
    def _plan(self) -> build.Plan:
        """How it infers; of a model in training decided when it first does."""
        if self._decided is None:
            if self._trains is not None and self._trains.sharded:
                raise EngineError("inference needs whole weights, these are sharded: go on from a checkpoint alone")
            self._decided = build.plan(self._config, model=self._live)
        return self._decided

    # ---- steps ----

    def train_batch(self, batch: Any) -> StepReport:
        """One optimizer step. ``float(report)`` and ``report.loss`` are the mean loss over all processes.

        ``batch``: this process's part of a batch, a mapping (or tuple) of tensors [B, ...] with B = micro_batch_size x
        accumulation_steps, or a list of micro-batches, or an iterator of which the next ones are taken. Where the
        engine has started the other processes itself (``training.processes``) it is the batch of all of them,
        train_batch_size rows, and each gets its part.
        """
        self._trainer  # noqa: B018 - says where there is none
        return self._team.train_batch(batch)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``engine(batch).loss``."""
        trainer = self._trainer
        self._team.assert_here("backward()")
        trainer.loop.backward(loss)

    def step(self) -> StepReport | None:
        """The optimizer step, once accumulation_steps micro-batches have come; else None."""
        trainer = self._trainer
        self._team.assert_here("step()")
        return trainer.loop.step()

    def _profile_training(self, batch: Any, how: Repeats) -> Report:
        """A profile of a step's forward and backward passes."""
        from engine.training.profile_batch import profile_batch

        trainer = self._trainer
        self._team.assert_here("profile(batch)", '; or let the run profile itself: the section "flops_profiler"')
        return profile_batch(trainer, batch, how)

    # ---- a whole run ----

    def fit(self, dataset: Any = None, eval_dataset: Any = None) -> Summary:
        """Trains to the end that the configuration gives, with metrics and checkpoints in ``training.output``.

        ``dataset``, ``eval_dataset``: a list of mappings of tensors, a torch ``Dataset`` of such, or samples of
        :mod:`engine.training.data`; None takes the files of the section "data". Goes on from the last checkpoint there
        (``training.resume``). The main thread's SIGINT and SIGTERM end it with a checkpoint.
        """
        from engine.training.datasets import as_samples
        from engine.training.fit import fit

        trainer, data = self._trainer, self._config.data
        if dataset is not None or eval_dataset is not None:
            self._team.assert_here("fit() with a dataset", '; or name files in the section "data"')

        def run() -> Summary:
            train = as_samples(dataset) if dataset is not None else trainer.samples("train")
            evaluated = None if eval_dataset is None else as_samples(eval_dataset)
            if evaluated is None and data is not None and data.eval is not None:
                evaluated = trainer.samples("eval")
            return fit(trainer, train, evaluated, self._team.guard)

        return self._team.call("fit", run)

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """The figures of the data's task (the mean loss of a user's own samples)."""
        from engine.training.datasets import as_samples

        trainer = self._trainer
        if dataset is not None:
            self._team.assert_here("evaluate() of a dataset", '; or name files in the section "data"')
        return self._team.call(
            "evaluate",
            lambda: trainer.evaluate(as_samples(dataset) if dataset is not None else trainer.samples("eval")),
        )

    # ---- saving ----

    def save_checkpoint(self, directory: str | os.PathLike[str] | None = None) -> str:
        """All that is needed to go on, into ``directory`` or ``training.output``/checkpoints. Returns where.

        After :meth:`fit` that includes the place in the data, so that a later ``fit`` goes on from it.
        """
        trainer = self._trainer

        def run() -> str:
            trainer.meet()
            objects = trainer.objects(trainer.batches)
            return str(trainer.checkpoints(directory).save(trainer.step, objects))

        return self._team.call("save_checkpoint", run, directory=_text(directory))

    def load_checkpoint(self, directory: str | os.PathLike[str] | None = None, step: int | None = None) -> int:
        """Goes back to the last checkpoint, or that of ``step``; the step."""
        trainer = self._trainer
        return self._team.call(
            "load_checkpoint",
            lambda: trainer.checkpoints(directory).restore(trainer.objects(), step),
            directory=_text(directory),
            step=step,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """A Hugging Face directory, tokenizer included, that ``from_pretrained`` and ``Engine`` open."""
        trainer = self._trainer

        def run() -> None:
            try:
                tokenizer = self.text.tokenizer
            except SlipstreamError as error:
                log.warning("no tokenizer is saved: %s", error)
                tokenizer = None
            trainer.save_pretrained(directory, tokenizer)

        self._team.call("save_pretrained", run, directory=_text(directory))

    def describe_training(self) -> str:
        """What is trained, where, and by how many samples a step."""
        trainer = self._trainer
        return trainer.plan.describe(trainer.model)

    def explain(self) -> str:
        """The resolved configuration as JSON, what is trained, and the reason of each choice; those of inference if the
        engine has inferred."""
        if self._trains is None:
            return build.explain(self._plan)
        inference = "" if self._decided is None else f"\n\nInference\n{build.reasons(self._decided.choices)}"
        return self._trains.plan.explain(self._trains.model) + inference


def _text(directory: str | os.PathLike[str] | None) -> str | None:
    return None if directory is None else os.fspath(directory)
