"""The section "flops_profiler": steps of a run are counted and timed once, and the profile is printed or written.

The step behind ``profile_step`` others is counted; after that one passes by, one is a rehearsal, and steps that are
measured as a whole and steps that are timed in detail take turns. All are steps of the run: what they compute is the
same bit for bit, and before and after them nothing is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import torch

from config_schema.flops_profiler import FlopsProfiler
from engine.profiling import judged_by, write
from engine.training.calls import size_of
from engine.training.feature import Feature, Progress
from engine.training.ranks import Ranks
from profiler.profile import Profiler
from profiler.report import Report, Workload

log = logging.getLogger("slipstream.profiler")

#: Steps that are timed in detail, and those that pass by before.
REPEATS, WARM_UP = 3, 1
#: All steps of a profile: one is counted, one rehearses, and each timed one has one beside it that is timed as a whole.
WANTED = 2 + WARM_UP + 2 * REPEATS


class ProfileStep(Feature):
    """The training feature. ``report`` is the profile once it has been made."""

    name: ClassVar[str] = "flops_profiler"
    saved: ClassVar[bool] = False

    def __init__(
        self,
        settings: FlopsProfiler,
        device: torch.device,
        precision: str,
        ranks: Callable[[], Ranks],
        length: Callable[[], int | None],
        notes: tuple[str, ...] = (),
    ) -> None:
        """``precision``: of the products, as ``Workload`` names it. ``length``: steps of the run, None where nobody
        knows. ``notes``: what a reader of the profile must know of this run."""
        self.settings, self.device, self.precision, self.notes = settings, device, precision, notes
        self.report: Report | None = None
        #: Keep what a timeline needs.
        self.events = "chrome_trace" in settings.formats
        self._ranks, self._length = ranks, length
        self._profiler: Profiler | None = None
        self._open: ExitStack | None = None
        self._rows = self._tokens = 0

    def step_start(self, progress: Progress) -> None:
        """Opens the profiler where one of its steps begins."""
        if self._profiler is None:
            if self.report is not None or progress.step != self.settings.profile_step:
                return
            self._profiler = self._begun(progress)
        self._open = ExitStack()
        if self._profiler.counting:  # torch.compile would compile anew for a hook in the others
            hook = progress.model.register_forward_pre_hook(self._see, with_kwargs=True)
            self._open.callback(hook.remove)
        self._open.enter_context(self._profiler.step())

    def _begun(self, progress: Progress) -> Profiler:
        """As many steps as the run has left, up to all that are wanted: one is counted, one rehearses, and every
        repeat takes two."""
        length = self._length()
        left = WANTED if length is None else length - progress.step
        repeats = max(min((left - 2 - WARM_UP) // 2, REPEATS), 0)
        log.info("profiling: step %d is counted, %d more are timed", progress.step + 1, repeats)
        return Profiler(progress.model, device=self.device, warm_up=WARM_UP, repeats=repeats, events=self.events)

    def _see(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Notes a micro-batch's rows, and its tokens where there are such."""
        rows, tokens = size_of(kwargs or args)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens

    def optimizer_step_start(self, progress: Progress) -> None:
        """Unscaling is over; clipping and the step follow."""
        if self._open is not None and self._profiler is not None:
            self._open.enter_context(self._profiler.optimizer_step())

    def step_end(self, progress: Progress) -> Mapping[str, float]:
        """Closes the profiler, and tells what it found behind its last step."""
        if self._open is not None and self._profiler is not None:
            opened, self._open = self._open, None
            opened.close()
            if self._profiler.done:
                self._finish(self._profiler, progress)
        return {}

    def step_skipped(self, progress: Progress) -> None:
        """The next step takes the place of this one, which had no optimizer step."""
        self._abandon("the step was skipped")

    def step_failed(self, progress: Progress) -> None:
        """Nothing stays behind."""
        self._abandon("the step has raised")

    def _abandon(self, why: str) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            if self._profiler is not None and self._profiler.counting:
                self._rows = self._tokens = 0
            error = RuntimeError(why)
            opened.__exit__(type(error), error, None)  # the profiler keeps no step that raises

    def _finish(self, profiler: Profiler, progress: Progress) -> None:
        team, self._profiler = self._ranks(), None
        precision, limits, notes = team.first(lambda: judged_by(self.device, self.precision))
        workload = Workload(
            mode="training",
            precision=precision,
            samples=self._rows or None,
            tokens=self._tokens or None,
            micro_batches=progress.micro_batches,
            rank=team.rank,
            world_size=team.size,
            data_parallel=team.size,
        )
        report = profiler.report(workload, limits=limits, notes=(*self.notes, *notes))
        report = replace(report, notes=(*report.notes, *_of_all(report, team)))
        self.report = report
        team.each(lambda: write(report, self.settings))


def _of_all(report: Report, team: Ranks) -> tuple[str, ...]:
    """How long the processes' steps took, where there are several."""
    timing = report.timing
    if timing is None or team.size == 1:
        return ()
    times = team.every(lambda: timing.step_seconds)
    fast, mean, slow = min(times), sum(times) / len(times), max(times)
    return (
        f"of {team.size} processes, a timed step took {1000 * mean:.3g} ms on average: {1000 * fast:.3g} ms in the "
        f"fastest (rank {times.index(fast)}), {1000 * slow:.3g} ms in the slowest (rank {times.index(slow)})",
    )
