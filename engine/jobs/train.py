"""The job "train": a run, and what came of it in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from config_schema.job import TrainJob
from engine.jobs.console import Console
from engine.jobs.tables import table
from engine.training.ranks import ranks

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.training.fit import Summary
    from ops.optimizers.pays import Verdict


def run(engine: Engine, job: TrainJob, console: Console) -> None:
    """Trains to the end, or goes on from the last checkpoint."""
    found = engine.fit()
    if ranks().rank:
        return  # the first process speaks for all
    output = engine.config.training.output if engine.config.training is not None else None
    console.line(table(("training", ""), _facts(found), [0, 1]))
    if found.stopped:
        console.note("stopped; the same command goes on from here")
    console.note(f"metrics and checkpoints are in {output}")


def _facts(found: Summary) -> list[tuple[str, str]]:
    rate = f", {found.samples / found.seconds:.1f} samples/s" if found.samples else ""
    rows = [("steps", f"{found.steps}" + (f" ({found.begun} of them earlier)" if found.begun else ""))]
    rows.append(("time", f"{found.seconds:.1f} s{rate}"))
    if found.loss is not None:
        rows.append(("loss of the last step", f"{found.loss:.4g}"))
    rows += [(f"eval {name}", f"{value:.4g}") for name, value in found.figures.items()]
    if found.layers is not None and found.expected is not None:
        rows.append(("layers run, mean", f"{found.layers:.2f} (by the formula {found.expected:.2f})"))
    if found.exchange is not None:
        rows.append(("exchange", _told(found.exchange)))
    if found.checkpoint is not None:
        rows.append(("checkpoint", str(found.checkpoint)))
    return rows


def _told(verdict: Verdict) -> str:
    if verdict.size == 1:
        return "one process: nothing to compress"
    chosen = "as signs" if verdict.pays else "in full"
    return f"{chosen} ({verdict.full:.3g} s in full, {verdict.compressed:.3g} s as signs)"
