"""A whole run: from the data to the last checkpoint, resumable at any moment."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from engine.errors import EngineError
from engine.training.data.batches import Batch, Batches
from engine.training.data.samples import Samples
from engine.training.failures import failing_together
from engine.training.loop import NoNumber, StepReport
from engine.training.metrics_log import MetricsLog
from engine.training.trainer import Trainer
from ops.optimizers.pays import Verdict

log = logging.getLogger("slipstream.training")

#: How many samples a message names.
NAMED = 8


@dataclass(frozen=True)
class Summary:
    """What a run came to.

    steps: optimizer steps in all; begun: the step at which this run began. samples, seconds: since then, over all
    processes. loss: of the last step. figures: of the last evaluation. layers, expected: mean number of layers that
    ran, and the formula's, where layers were dropped. exchange: what a compressed optimizer has measured, and decided,
    where it was to. checkpoint: the last one. stopped: by a signal.
    """

    steps: int
    begun: int
    samples: int
    seconds: float
    loss: float | None
    figures: Mapping[str, float] = field(default_factory=dict)
    layers: float | None = None
    expected: float | None = None
    exchange: Verdict | None = None
    checkpoint: Path | None = None
    stopped: bool = False


def fit(
    trainer: Trainer,
    train: Samples,
    evaluated: Samples | None,
    guard: Callable[[], AbstractContextManager[None]] = failing_together,
) -> Summary:
    """Trains to the end that the section "training" gives, evaluates, saves.

    ``guard`` stands around it, so that a failing process takes the others down.
    Raises :class:`EngineError`: where the loss is no number it names the last good checkpoint.
    """
    with guard():
        return _Run(trainer, train, evaluated).run()


class _Run:
    def __init__(self, trainer: Trainer, train: Samples, evaluated: Samples | None) -> None:
        self.trainer, self.settings, self.evaluated = trainer, trainer.settings, evaluated
        sizes, team = trainer.sizes, trainer.ranks
        self.batches = Batches(train, sizes.micro, self.settings.seed, team.rank, team.size, threads=1)
        trainer.batches = self.batches
        self.total = trainer.plan.length = self._length(len(train))
        self.checkpoints = trainer.checkpoints()
        self.saved: Path | None = None
        self.saved_at = self.evaluated_at = -1
        self.figures: Mapping[str, float] = {}
        self.sums = (0.0, 0.0, 0)

    def _length(self, samples: int) -> int:
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        if self.settings.epochs is None:
            raise EngineError("$.training: has no end: give max_steps or epochs")
        return max(round(self.settings.epochs * samples / self.trainer.sizes.train), 1)

    def run(self) -> Summary:
        trainer, loop = self.trainer, self.trainer.loop
        progress, total = loop.progress, self.total
        self._resume()
        begun, start, report = progress.step, time.perf_counter(), None
        tensorboard = trainer.output / "tensorboard" if self.settings.tensorboard else None
        first = trainer.ranks.rank == 0
        path = trainer.output / "metrics.jsonl"
        metrics = MetricsLog(path, tensorboard=tensorboard, resume_step=begun) if first else None
        bar = tqdm(total=total, initial=begun, desc="training", unit="step", disable=None if first else True)
        try:
            with self._signals():
                while progress.step < total and not self._stopped():
                    report = self._step(bar, metrics)
                    self._every(report, metrics)
            if not self._stopped():
                self._evaluate(metrics)
            self._save()
        finally:
            bar.close()
            self.batches.close()
            if metrics is not None:
                metrics.close()
        return self._summary(begun, time.perf_counter() - start, report)

    def _resume(self) -> None:
        if not self.settings.resume or self.trainer.loop.progress.step:
            return
        if self.checkpoints.latest() is None:
            return
        step = self.saved_at = self.checkpoints.restore(self.trainer.objects(self.batches))
        log.info("going on from step %d of %s", step, self.checkpoints.directory)

    def _step(self, bar: Any, metrics: MetricsLog | None) -> StepReport:
        start, sizes = time.perf_counter(), self.trainer.sizes
        batches = [next(self.batches) for _ in range(sizes.accumulation)]
        try:
            report = self.trainer.loop.train_batch([batch.inputs for batch in batches])
        except NoNumber as error:
            raise EngineError(f"{error}{self._samples_of(error, batches)}{self._last_good()}") from error
        if report.skipped:
            return report
        rate = sizes.train / (time.perf_counter() - start)
        line = {"loss": report.loss, "lr": report.learning_rates[0], "samples_per_second": rate}
        line |= {"epoch": self.batches.epoch} | ({} if report.grad_norm is None else {"grad_norm": report.grad_norm})
        if metrics is not None and report.step % self.settings.log_every == 0:
            metrics.write(report.step, {**line, **report.metrics})
        layers = report.metrics.get("layer_drop/layers")
        if layers is not None:
            ran, expected, count = self.sums
            self.sums = (ran + layers, expected + report.metrics["layer_drop/expected"], count + 1)
        shown = {"loss": f"{report.loss:.4g}", "lr": f"{line['lr']:.2g}", "samples/s": f"{rate:.0f}"}
        judged = {name: f"{value:.4g}" for name, value in list(self.figures.items())[:1]}
        bar.set_postfix({**shown, **judged}, refresh=False)
        bar.update()
        return report

    def _every(self, report: StepReport, metrics: MetricsLog | None) -> None:
        """What is due after certain steps. A skipped step is none."""
        if report.skipped:
            return
        settings = self.settings
        if settings.evaluate_every and report.step % settings.evaluate_every == 0:
            self._evaluate(metrics)
        if settings.checkpoint_every and report.step % settings.checkpoint_every == 0:
            self._save()

    def _evaluate(self, metrics: MetricsLog | None) -> None:
        """Unless there is nothing to evaluate, or this step has been."""
        step = self.trainer.loop.progress.step
        if self.evaluated is None or self.evaluated_at == step:
            return
        self.figures, self.evaluated_at = self.trainer.evaluate(self.evaluated), step
        if metrics is not None:
            metrics.write(step, {f"eval/{name}": value for name, value in self.figures.items()})

    def _save(self) -> None:
        """Unless this step has been."""
        step = self.trainer.loop.progress.step
        if self.saved_at != step:
            self.trainer.meet()
            self.saved, self.saved_at = self.checkpoints.save(step, self.trainer.objects(self.batches)), step

    def _samples_of(self, error: NoNumber, batches: Sequence[Batch]) -> str:
        """Which samples the losses that are no numbers are of, in whatever process; all are here at once."""
        own = [int(index) for at in error.micro_batches for index in batches[at].indices]
        found = [index for part in self.trainer.ranks.every(lambda: own) for index in part]
        if not found:
            return ""
        shown = ", ".join(map(str, found[:NAMED])) + (" ..." if len(found) > NAMED else "")
        return f"; the batch is samples {shown} of the data, counted from 0"

    def _last_good(self) -> str:
        steps = self.checkpoints.steps()
        where = self.checkpoints.directory
        return f"; the last good checkpoint is of step {steps[-1]}, in {where}" if steps else "; there is no checkpoint"

    def _stopped(self) -> bool:
        """Whether any process was asked to stop: all stop behind the same step."""
        means = self.trainer.means
        return means.stop or (self.trainer.ranks.alone and means.asked)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run behind the step, with a checkpoint; a second one at once."""
        self.trainer.means.asked = self.trainer.means.stop = False  # an earlier run may have been stopped
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def asked(number: int, frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            log.warning("%s: stopping behind this step, with a checkpoint; again stops at once", name)
            self.trainer.means.asked = True
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, asked)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _summary(self, begun: int, seconds: float, report: StepReport | None) -> Summary:
        layers, expected, count = self.sums
        step = self.trainer.loop.progress.step
        return Summary(
            steps=step,
            begun=begun,
            samples=(step - begun) * self.trainer.sizes.train,
            seconds=seconds,
            loss=None if report is None else report.loss,
            figures=self.figures,
            layers=layers / count if count else None,
            expected=expected / count if count else None,
            exchange=self.trainer.exchange,
            checkpoint=self.saved,
            stopped=self._stopped(),
        )
