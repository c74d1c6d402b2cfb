"""Runs workers: each in a process group of its own that ends with the run, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.bench.job import Job

MODULE = "engine.bench.peer_worker"
#: Where the packages lie that the worker needs.
ROOT = Path(__file__).resolve().parents[2]
#: Seconds for a process whose stdout has ended to end as well.
GRACE = 5.0
#: Seconds between two updates of the progress display.
TICK = 1.0
OUT_OF_TIME = "not measured: out of time"


@dataclass(frozen=True)
class Result:
    """What became of one case: samples in ms and how they were taken, or the error in one line.

    gpu_ms, launches: sum of the kernels' times and their number for one token or pass, where a GPU was asked for them.
    """

    ms: tuple[float, ...] = ()
    note: str = ""
    gpu_ms: float | None = None
    launches: float | None = None
    error: str = ""


@dataclass
class Outcome:
    """What a run came to. ``name`` is the kernel set that "auto" became, or the peer; one result a case."""

    job: Job
    name: str
    versions: str = ""
    results: dict[int, Result] = field(default_factory=dict)

    def fail(self, error: str, cases: Sequence[int] | None = None) -> None:
        """Gives the error to those of the cases (None: all) that have no result yet."""
        for index in range(len(self.job.cases)) if cases is None else cases:
            self.results.setdefault(index, Result(error=error))

    @property
    def left(self) -> list[int]:
        """Cases without a result."""
        return [index for index in range(len(self.job.cases)) if index not in self.results]


class Watch:
    """Is told what happens, for a progress display; this one shows nothing."""

    def preparing(self, names: Sequence[str]) -> None:
        """These runs have started and are getting ready."""

    def tick(self) -> None:
        """A second has passed."""

    def measuring(self, name: str, cases: int) -> None:
        """This run is measured now."""

    def measured(self, text: str) -> None:
        """One more case of it is done."""

    def finished(self) -> None:
        """It is over."""


def command(python: str | None = None) -> list[str]:
    """How a worker is started: with this interpreter, or with that of another environment, whose packages go first."""
    if python is None:
        return [sys.executable, "-P", "-m", MODULE]
    start = f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module({MODULE!r}, run_name='__main__')"
    return [python, "-P", "-c", start]


class Worker:
    """One worker process."""

    def __init__(self, line: Mapping[str, Any], arguments: Sequence[str]) -> None:
        environment = dict(os.environ)
        if arguments[0] == sys.executable:
            paths = [str(ROOT), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            encoding="utf-8",
            env=environment,
            start_new_session=True,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.say(json.dumps(line))

    def say(self, line: str) -> None:
        """Writes a line to the worker; one that is dead already shows at the next :meth:`event`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next thing that happens, None where the process has ended. Raises TimeoutError."""
        try:
            return self._events.get(timeout=max(seconds, 0))
        except queue.Empty:
            raise TimeoutError from None

    def why(self) -> str:
        """Why it ended without being done, in one line."""
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "it closed its output without a result"
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        how = f"exit code {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"crashed ({how}){': ' + lines[-1][:200] if lines else ''}"

    def close(self) -> None:
        """Ends the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(GRACE)
        if self._reader.is_alive():
            return  # someone outside of the group holds our pipe: closing it would wait for them
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while we were reading
            for line in self._process.stdout:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                self._events.put(found)
        self._events.put(None)


@dataclass
class Pool:
    """Starts workers and collects what they measure.

    timeout:  seconds without a sign of life after which a run is stopped.
    deadline: when everything must be over (``time.monotonic()``), or None.
    pythons:  interpreters of peers that live in an environment of their own.
    watch:    is told what happens.
    spare:    seconds before the deadline at which whatever is not ready is given up, so that the rest is measured.
    """

    timeout: float = 600.0
    deadline: float | None = None
    pythons: Mapping[str, str] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    spare: float = 0.0
    start: Callable[[str | None], list[str]] = command

    def survey(self, requests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Asks a worker for :func:`engine.bench.survey.survey`. Raises RuntimeError where it breaks."""
        worker = Worker({"survey": list(requests)}, self.start(None))
        try:
            found, why = self.wait(worker)
            if found is None:
                raise RuntimeError(f"survey of the model: {why}")
            return found
        finally:
            worker.close()

    def measure(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Gets all jobs ready side by side, then measures them one at a time, in their order.

        A case whose process dies gets the reason for its result, and the cases behind it a new process.
        """
        outcomes = [Outcome(job, job.label) for job in jobs]
        runs: list[_Run] = []
        try:
            for outcome in outcomes:
                runs.append(self._run(outcome))
            self.watch.preparing([outcome.name for outcome in outcomes])
            for run in runs:
                run.until_ready()
            for run in runs:
                self._finish(run, runs)
        finally:
            for run in runs:
                run.worker.close()
            self.watch.finished()
        return outcomes

    def _finish(self, run: _Run, runs: list[_Run]) -> None:
        """Measures a run that is ready, and what it left undone with new ones; ``runs`` is where these are closed."""
        outcome = run.outcome
        self.watch.measuring(outcome.name, len(outcome.job.cases))
        run.measure()
        run.worker.close()
        left = len(run.indices)
        while 0 < len(outcome.left) < left:  # each new process must get at least one case further
            left = len(outcome.left)
            run = self._run(outcome)
            runs.append(run)
            run.until_ready()
            run.measure()
            run.worker.close()
        outcome.fail("it ended without a result")
        self.watch.finished()

    def _run(self, outcome: Outcome) -> _Run:
        job = outcome.job
        left = outcome.left
        part = replace(job, cases=tuple(job.cases[index] for index in left))
        arguments = self.start(self.pythons.get(job.runner))
        return _Run(Worker({"job": part.to_json()}, arguments), outcome, left, self)

    def wait(self, worker: Worker, spare: float = 0.0) -> tuple[dict[str, Any] | None, str]:
        """The worker's next event, or None and why there is none; it has until ``spare`` before the deadline."""
        last = math.inf if self.deadline is None else self.deadline - spare
        end = min(time.monotonic() + self.timeout, last)
        while True:
            try:
                event = worker.event(min(TICK, end - time.monotonic()))
                return event, "" if event is not None else worker.why()
            except TimeoutError:
                self.watch.tick()
            if time.monotonic() >= end:
                return None, OUT_OF_TIME if end == last else f"no sign of life for {self.timeout:g} s, stopped"


@dataclass
class _Run:
    """One process that works on the cases ``indices`` of an outcome."""

    worker: Worker
    outcome: Outcome
    indices: list[int]
    pool: Pool
    at: int | None = None
    over: bool = False

    def until_ready(self) -> None:
        """Follows it until every case that can be is ready to be measured."""
        self._follow("ready", self.pool.spare)

    def measure(self) -> None:
        """Lets it measure, and follows it to its end."""
        if not self.over:
            self.worker.say("go")
            self._follow("done")

    def _follow(self, until: str, spare: float = 0.0) -> None:
        while not self.over:
            event, why = self.pool.wait(self.worker, spare)
            if event is None:
                self._broken(why)
                return
            self._take(event)
            if event["event"] == until:
                return

    def _take(self, event: Mapping[str, Any]) -> None:
        kind, case = event["event"], event.get("case")
        index = None if case is None else self.indices[case]
        results = self.outcome.results
        if kind == "case":
            self.at = index
        elif kind == "failed":
            self.outcome.fail(event["error"], None if index is None else [index])
        elif kind == "ready":
            self.outcome.name, self.outcome.versions = event["name"], event["versions"]
        elif kind == "measured" and index is not None:
            results[index] = Result(tuple(event["ms"]), event["note"])
            self.pool.watch.measured(f"{sorted(event['ms'])[len(event['ms']) // 2]:.3g} ms")
        elif kind == "gpu" and index is not None:
            results[index] = replace(results[index], gpu_ms=event["ms"], launches=event["launches"])
        elif kind == "done":
            self.over = True

    def _broken(self, why: str) -> None:
        """Ended by itself or by us: its case has failed; without one, or where it hung, the others have as well."""
        self.over = True
        outcome, at = self.outcome, self.at
        if at is not None and why.startswith("crashed"):
            outcome.fail(why, [at])
            return
        if at is not None and at in outcome.left and why != OUT_OF_TIME:
            outcome.fail(why, [at])
            outcome.fail(f"not measured: at {outcome.job.cases[at]} there was {why}")
        outcome.fail(why)
