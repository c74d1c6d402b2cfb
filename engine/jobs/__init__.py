"""What ``slipstream run`` does: the job of a configuration, run with an engine and shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from config_schema import Config
from config_schema.job import Job
from engine.errors import EngineError
from engine.jobs import encode, generate, heads, train
from engine.jobs.console import Console
from engine.jobs.files import check_output, read_lines
from ops.spec import Task

if TYPE_CHECKING:
    from engine.build import Plan
    from engine.engine import Engine

__all__ = ["JOBS", "JobKind", "check", "prepare", "run"]


@dataclass(frozen=True)
class JobKind:
    """A kind of job: the task it needs (None: any), and what runs it (engine, job, console)."""

    task: Task | None
    run: Callable[[Any, Any, Console], None]


JOBS: Mapping[str, JobKind] = {
    "generate": JobKind("causal_lm", generate.run),
    "encode": JobKind("embedding", encode.run),
    "classify": JobKind("sequence_classification", heads.classify),
    "classify_tokens": JobKind("token_classification", heads.classify_tokens),
    "answer": JobKind("question_answering", heads.answer),
    "fill_mask": JobKind("masked_lm", heads.fill_mask),
    "train": JobKind(None, train.run),
}

FILES = {"prompts_file": "prompts", "texts_file": "texts"}


def prepare(config: Config) -> Job:
    """The configuration's job with its texts read from their file. Raises where there is none or a file is unusable."""
    job = config.job
    if job is None:
        kinds = ", ".join(f'"{name}"' for name in JOBS)
        raise EngineError(f'$.job: missing, so there is nothing to run: add {{"type": ...}} with one of {kinds}')
    if job.type == "train":
        return job
    check_output(job.output)
    for given, read in FILES.items():
        path = getattr(job, given, None)
        if path is not None:
            job = job.model_copy(update={given: None, read: read_lines(path, f"$.job.{given}")})
    return job


def check(job: Job, plan: Plan) -> None:
    """Raises if the planned model cannot do the job: told before a weight is read."""
    own = plan.spec.head.task if plan.spec.head is not None else "embedding"
    wanted = JOBS[job.type].task
    if own == wanted:
        new = plan.config.generation.max_new_tokens or 0
        if job.type == "generate" and new >= plan.max_tokens:
            raise EngineError(
                f"$.generation.max_new_tokens: {new} new tokens and a prompt do not fit $.inference.max_tokens, which "
                f"is {plan.max_tokens} (this model ends at {plan.spec.max_positions}): lower it"
            )
        return
    what = f'$.job.type: "{job.type}" needs $.model.task "{wanted}", but this {plan.family.name} checkpoint is "{own}"'
    if wanted in plan.family.tasks:
        raise EngineError(f'{what}: set $.model.task to "{wanted}" if it has such a head, or change the job')
    kinds = ", ".join(f'"{name}"' for name, kind in JOBS.items() if kind.task in plan.family.tasks)
    raise EngineError(f"{what}: a {plan.family.name} model can do {kinds}")


def run(engine: Engine, job: Job, out: TextIO | None = None, err: TextIO | None = None) -> None:
    """Runs a prepared job: results to ``out`` (stdout), progress and a summary to ``err`` (stderr)."""
    console = Console(out or sys.stdout, err or sys.stderr)
    try:
        JOBS[job.type].run(engine, job, console)
    finally:
        console.close()
