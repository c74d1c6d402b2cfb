"""One process that measures: a JSON job in on stdin, a line of JSON on stdout for each thing that happens.

``python -m engine.bench.peer_worker`` reads one line, ``{"survey": [...]}`` or ``{"job": {...}}``. For a job it answers

    {"event": "case", "case": 0}                              it begins to prepare that case
    {"event": "failed", "error": ..., "case": 0}              that cannot be done; without a case: none can
    {"event": "ready", "name": ..., "versions": ...}          what could be prepared is; it waits for another line
    {"event": "measured", "case": 0, "ms": [...], "note": ""} wall times of the samples
    {"event": "gpu", "case": 0, "ms": ..., "launches": ...}   the kernels' times; after all wall times, which they slow
    {"event": "done"}

and ends. Many processes can so get ready side by side, and be measured one at a time. It ends itself, and what it has
started, when its parent is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Protocol

from engine.bench.job import Case, Job

#: Seconds between two looks at whether the parent is still there.
WATCH = 1.0
#: Longest message of an error; the whole of it is on stderr.
LONGEST = 200

Emit = Callable[..., None]

#: Runners by name: module and class, imported when asked for.
RUNNERS: Mapping[str, tuple[str, str]] = {
    "slipstream": ("engine.bench.own", "Slipstream"),
    "hf": ("engine.bench.peers", "HuggingFace"),
    "inductor": ("engine.bench.peers", "Inductor"),
    "autotune": ("engine.bench.peers", "Autotune"),
    "deepspeed": ("engine.bench.peers", "DeepSpeed"),
}


class Runner(Protocol):
    """What measures: loaded for a job, then asked to prepare one case after the other."""

    name: str

    def order(self, cases: tuple[Case, ...]) -> list[Case]:
        """The cases in the order that suits it."""
        ...

    def prepare(self, case: Case) -> Any:
        """An :class:`engine.bench.timing.Prepared`."""
        ...


def main() -> int:
    """Answers what stdin asks."""
    emit = _own_stdout()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    asked = json.loads(sys.stdin.readline())
    if "survey" in asked:
        from engine.bench import survey

        emit(event="survey", **survey.survey(asked["survey"]), versions=versions())
    else:
        work(Job.from_json(asked["job"]), emit, sys.stdin.readline)
    emit(event="done")
    return 0


def work(job: Job, emit: Emit, wait: Callable[[], object]) -> None:
    """Prepares every case of the job, waits, and measures those that are ready."""
    module, cls = RUNNERS[job.runner]
    try:
        runner: Runner = getattr(importlib.import_module(module), cls)(job)
    except Exception as error:
        emit(event="failed", error=in_words(error, job.runner))
        return
    ready = {}
    for case in runner.order(job.cases):
        index = job.cases.index(case)
        emit(event="case", case=index)
        try:
            ready[index] = runner.prepare(case)
        except Exception as error:
            if not _failed(emit, index, error, job.runner):
                return
    emit(event="ready", name=runner.name, versions=versions())
    wait()
    for index in list(ready):
        emit(event="case", case=index)
        try:
            emit(event="measured", case=index, ms=ready[index].measure(), note=ready[index].note)
        except Exception as error:
            del ready[index]
            if not _failed(emit, index, error, job.runner):
                return
    if not (job.gpu_time and job.subject.device.startswith("cuda")):
        return
    for index, prepared in ready.items():
        seconds, launches = prepared.gpu()
        emit(event="gpu", case=index, ms=seconds * 1e3, launches=launches)


def _failed(emit: Emit, index: int, error: Exception, runner: str) -> bool:
    """Tells of a case that failed; whether others can still be measured here."""
    emit(event="failed", error=in_words(error, runner), case=index)
    import torch

    if type(error).__name__ == "OutOfMemoryError":
        torch.cuda.empty_cache()
        return True
    return "CUDA error" not in str(error)  # after such a one every further call of this process fails


def in_words(error: Exception, runner: str) -> str:
    """An error in one line; the traceback goes to stderr."""
    import traceback

    traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, ModuleNotFoundError) and error.name in (runner, "transformers", "torch"):
        return "not installed" if error.name == runner else f"{error.name} is not installed"
    text = " ".join(str(error).split("\n\n")[0].split())
    if type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory ({text.partition('. ')[0]})"
    elif not any(cls.__name__ == "SlipstreamError" for cls in type(error).__mro__):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def versions() -> str:
    """What this process runs on, in one line."""
    found = [f"Python {platform.python_version()}"]
    for name in ("slipstream-runtime", "torch", "transformers", "triton", "deepspeed"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _own_stdout() -> Emit:
    """Keeps stdout for our lines: what libraries print goes to stderr."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(**event: Any) -> None:
        print(json.dumps(event), file=ours, flush=True)

    return emit


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    if os.getpgrp() == os.getpid():  # a group of our own: compilers that we have started belong to it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
