"""What was measured, as rows: flat records for a JSON file, a table of 80 columns, and Markdown."""

from __future__ import annotations

import json
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.bench.job import Case
from engine.bench.pool import Outcome, Result

WIDTH = 80
#: An error no longer than this may stand in a cell of the Markdown table.
SHORT = len("not installed")
#: What a time is of, by the kind of a row.
TIMES: Mapping[str, str] = {"decode": "ms/token", "prefill": "ms/first", "encode": "ms/pass"}


@dataclass(frozen=True)
class Row:
    """One case of one run; the JSON file is a list of these. What was not measured is null.

    model:        its name.
    kind:         ``decode`` (times are for one token of all sequences), ``prefill`` (for the first token of all) or
                  ``encode`` (for one pass).
    run:          kernel set of slipstream, or the peer.
    batch:        sequences at a time.
    tokens:       length of each prompt or sequence.
    new:          generated tokens that were timed; 0 for a pass, 1 for the first token.
    precision:    fp32, bf16 or fp16.
    ms:           median wall time in milliseconds, with the smallest and the largest of ``samples``.
    gpu_ms:       sum of the times of all kernels (which may overlap), launches: their number.
    floor_ms:     the larger of bytes / read bandwidth and flops / matrix rate, both measured on the device.
    percent:      100 * floor_ms / ms.
    bytes, flops: what one token step or pass must read and compute (engine/bench/floors.py).
    read, rate:   measured bytes a second, and FLOPs a second.
    note:         how it was measured, where that is special; error: why there is no figure, in one line.
    date:         UTC; device, versions, command: on what, with what, and by what it was measured.
    """

    model: str
    kind: str
    run: str
    batch: int
    tokens: int
    new: int
    precision: str
    ms: float | None
    ms_min: float | None
    ms_max: float | None
    samples: int
    gpu_ms: float | None
    launches: float | None
    floor_ms: float
    percent: float | None
    bytes: float
    flops: float
    read: float
    rate: float
    note: str
    error: str
    date: str
    device: str
    versions: str
    command: str


@dataclass(frozen=True)
class Context:
    """What all rows of one run of the command share."""

    date: str
    device: str
    versions: str
    command: str


def rows(
    outcome: Outcome, works: Sequence[Mapping[str, float]], rates: Mapping[str, float], context: Context
) -> list[Row]:
    """The rows of one run; ``works`` and ``rates`` are the survey's."""
    cases = outcome.job.cases
    return [
        _row(outcome, case, outcome.results[index], work, rates, context)
        for index, (case, work) in enumerate(zip(cases, works, strict=True))
    ]


def _row(
    outcome: Outcome,
    case: Case,
    result: Result,
    work: Mapping[str, float],
    rates: Mapping[str, float],
    context: Context,
) -> Row:
    floor = max(work["bytes"] / rates["read"], work["flops"] / rates["flops"]) * 1e3
    median = statistics.median(result.ms) if result.ms else None
    return Row(
        model=outcome.job.subject.name,
        kind=case.kind,
        run=outcome.name,
        batch=case.batch,
        tokens=case.tokens,
        new=case.new,
        precision=outcome.job.subject.precision,
        ms=median,
        ms_min=min(result.ms, default=None),
        ms_max=max(result.ms, default=None),
        samples=len(result.ms),
        gpu_ms=result.gpu_ms,
        launches=result.launches,
        floor_ms=floor,
        percent=None if median is None or median <= 0 else 100 * floor / median,
        bytes=work["bytes"],
        flops=work["flops"],
        read=rates["read"],
        rate=rates["flops"],
        note=result.note,
        error=result.error,
        date=context.date,
        device=context.device,
        versions=outcome.versions or context.versions,
        command=context.command,
    )


def table(found: Sequence[Row]) -> str:
    """The rows of one model in at most 80 columns; what has no figure, and notes, stand below, a line each."""
    from engine.jobs.tables import table as draw

    measured = [row for row in found if row.ms is not None]
    lines = []
    if measured:
        encode, gpu = measured[0].kind == "encode", any(row.gpu_ms is not None for row in measured)
        headers = ["batch", "run", TIMES[measured[0].kind], "range"]
        headers += [*(["GPU ms"] if gpu else []), "floor", "of floor"]
        ordered = sorted(measured, key=lambda row: (row.tokens, row.batch))
        cells = [_cells(row, encode, gpu) for row in ordered]
        lines = draw(headers, cells, texts=[headers.index("run")]).splitlines()
    for text, about in _remarks(found).items():
        lines += textwrap.wrap(f"{about}: {text}", WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _cells(row: Row, encode: bool, gpu: bool) -> list[str]:
    assert row.ms is not None
    assert row.ms_min is not None
    assert row.ms_max is not None
    cells = [f"{row.batch} x {row.tokens}" if encode else str(row.batch), row.run, number(row.ms)]
    cells.append(f"{number(row.ms_min)}..{number(row.ms_max)}")
    if gpu:
        cells.append("-" if row.gpu_ms is None else number(row.gpu_ms))
    return [*cells, number(row.floor_ms), "-" if row.percent is None else percentage(row.percent)]


def _remarks(found: Iterable[Row]) -> dict[str, str]:
    """Errors and notes, each with the runs and batches that it is about."""
    about: dict[str, dict[str, list[int]]] = {}
    for row in found:
        text = row.error or row.note
        if text:
            batches = about.setdefault(text, {}).setdefault(row.run, [])
            batches += [] if row.batch in batches else [row.batch]
    every = {row.batch for row in found}
    return {
        text: "; ".join(_about(run, batches, every) for run, batches in runs.items()) for text, runs in about.items()
    }


def _about(run: str, batches: Sequence[int], every: set[int]) -> str:
    return run if set(batches) == every else f"{run}, batch {', '.join(map(str, sorted(batches)))}"


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    for digits, limit in ((4, 0.1), (3, 1.0), (2, 10.0), (1, 100.0)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def percentage(value: float) -> str:
    """A whole number of percent; below ten one digit more."""
    return f"{value:.0f}%" if value >= 10 else f"{value:.1f}%"


def rates_in_words(rates: Mapping[str, float], precision: str) -> str:
    """The device's measured rates."""
    read, flops = rates["read"] / 1e9, rates["flops"] / 1e12
    fast = f"{read / 1e3:.2f} TB/s" if read >= 1e3 else f"{read:.1f} GB/s"
    sums = f"{flops:.0f} TFLOP/s" if flops >= 10 else f"{flops * 1e3:.0f} GFLOP/s"
    return f"reads {fast}, {precision} matrix products {sums} (measured)"


def markdown(found: Sequence[Row], kernels: Sequence[str], peers: Sequence[str]) -> str:
    """One Markdown table of all models, ms a token, first token or pass: the floor, our kernel sets (the first of
    ``kernels`` last, with the share of the floor that it reaches), the peers. What failed, and notes, stand below."""
    heads = ["model", "batch", "floor", *reversed(kernels), "% of floor", *peers]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for (model, precision, batch, _), group in _groups(found).items():
        by = {row.run: row for row in group}
        best = by.get(kernels[0]) if kernels else None
        share = "-" if best is None or best.percent is None else percentage(best.percent).removesuffix("%")
        name = f"{model}, {precision}{_length(group[0])}"
        cells = [name, str(batch), number(group[0].floor_ms), *(_cell(by.get(run)) for run in reversed(kernels)), share]
        lines.append(f"| {' | '.join([*cells, *(_cell(by.get(run)) for run in peers)])} |")
    remarks: list[str] = []
    for model, precision in dict.fromkeys((row.model, row.precision) for row in found):
        own = [row for row in found if (row.model, row.precision) == (model, precision)]
        remarks += [f"- {model}, {precision}; {about}: {text}" for text, about in _remarks(own).items()]
    return "\n".join([*lines, "", *remarks] if remarks else lines)


def _length(row: Row) -> str:
    """What tells rows of one model apart beside the batch."""
    if row.kind == "decode":
        return ""
    return f", {row.tokens} tokens" if row.kind == "encode" else f", first token behind {row.tokens}"


def _groups(found: Iterable[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in found:
        groups.setdefault((row.model, row.precision, row.batch, row.tokens), []).append(row)
    return groups


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.ms is None:
        return row.error if len(row.error) <= SHORT else "failed"
    return number(row.ms)


def write_json(path: Path, found: Sequence[Row]) -> None:
    """Writes the rows as a JSON list, aside and then in place."""
    write(path, json.dumps([asdict(row) for row in found], indent=2, ensure_ascii=False).encode() + b"\n")


def write(path: Path, data: bytes) -> None:
    """Writes a file whole: whoever reads it finds the old one or the new one."""
    target = path.resolve()
    aside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> list[Row]:
    """The rows that :func:`write_json` wrote."""
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return [Row(**record) for record in found]
