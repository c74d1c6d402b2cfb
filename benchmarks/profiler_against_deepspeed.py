"""Our profiler beside DeepSpeed's and torch's FlopCounterMode on ten models: what each counts, and what that costs.

    PYTHONPATH=... python -m benchmarks.profiler_against_deepspeed --json profilers.json     # where deepspeed lies
    python -m benchmarks.profiler_against_deepspeed --only gpt2,lstm --rounds 9
    python -m benchmarks.profiler_against_deepspeed --toy                                    # to try the command

On a CPU, fp32, random weights. Each profiler has each model in a process of its own. The reference for products is
torch's counter with what it does not know (attention on a CPU, oneDNN's LSTM, grouped products) taken apart into
products that it does: sdpa_kernel(MATH), no oneDNN, experts one by one. DeepSpeed counts and times in one pass; ours
are two, and both stand in the table, with all that they do before and after the forward pass.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import get_context
from statistics import median

from benchmarks.deepspeed_onebit import VERSION
from benchmarks.measure import machine, parser
from benchmarks.profiler_sides import SIDES, Found, run
from benchmarks.profiler_subjects import SUBJECTS
from benchmarks.steps import say
from config_schema import SlipstreamError
from engine.bench import options, report
from engine.jobs.tables import WIDTH, table
from engine.outputs import check_writable
from profiler.units import NOTHING, percentage, quantity, seconds

#: What the profilers found of a model, by profiler.
Row = Mapping[str, Found]


def missing() -> str | None:
    """What is not there, in one line; None where all is."""
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        found = "not importable"
    if found == VERSION:
        return None
    return (
        f"deepspeed is {found}: install deepspeed=={VERSION} in an environment of its own beside this project's "
        f"packages (DS_BUILD_OPS=0 pip install deepspeed=={VERSION})"
    )


def off(found: int, right: int) -> str:
    """How far off, in percent; ``0`` only where both are equal."""
    if found == right:
        return "0"
    return f"{100 * (found - right) / right:+.2g}%"


def products(rows: Mapping[str, Row]) -> str:
    """Multiply-accumulates of the forward pass."""
    cells = []
    for name, row in rows.items():
        ours, torchs, theirs = row["slipstream"], row["torch"], row["DeepSpeed"]
        cells.append([name, quantity(torchs.macs), quantity(torchs.whole)])
        cells[-1] += [quantity(ours.macs), off(ours.macs, torchs.whole)]
        cells[-1] += ["error", NOTHING] if theirs.error else [quantity(theirs.macs), off(theirs.macs, torchs.whole)]
    return table(["model", "torch", "apart", "slipstream", "off", "DeepSpeed", "off"], cells, texts=[0])


def operations(rows: Mapping[str, Row]) -> str:
    """FLOPs of the forward pass, and whether a backward pass counts."""
    cells = []
    for name, row in rows.items():
        ours, theirs = row["slipstream"], row["DeepSpeed"]
        cells.append([name, quantity(ours.flops), quantity(ours.executed)])
        if theirs.error:
            cells[-1] += ["error", NOTHING, NOTHING, backward(ours, row["torch"]), NOTHING]
        else:
            share = percentage(sum(theirs.unseen.values()) / ours.flops)
            cells[-1] += [quantity(theirs.flops), off(theirs.flops, ours.flops), share]
            cells[-1] += [backward(ours, row["torch"]), "yes" if theirs.beyond else "no"]
    headers = ["model", "ours", "executed", "theirs", "off", "unseen", "back", "theirs"]
    return table(headers, cells, texts=[0])


def backward(ours: Found, torchs: Found) -> str:
    """How far off ours is from torch's, on the operators that torch counts; "no" where ours has none."""
    if not any(ours.backward.values()):
        return "no"
    return off(sum(ours.backward.get(name, 0) for name in torchs.backward), sum(torchs.backward.values()))


def costs(rows: Mapping[str, Row]) -> str:
    """What counting and timing cost, in plain forward passes."""
    cells = []
    for name, row in rows.items():
        ours, theirs, torchs = row["slipstream"], row["DeepSpeed"], row["torch"]
        cells.append(
            [name, percentage(1 - sum(ours.unknown.values()) / ours.calls), seconds(median(ours.times["plain"]))]
        )
        cells[-1] += [times(ours, "counted"), times(ours, "timed"), times(theirs, "counted"), times(torchs, "counted")]
    return table(["model", "known", "plain", "counted", "timed", "DeepSpeed", "torch"], cells, texts=[0])


def times(found: Found, kind: str) -> str:
    """Of the plain forward pass in the same process, medians."""
    return f"{median(found.times[kind]) / median(found.times['plain']):.2f} x" if found.times else NOTHING


def unseen(rows: Mapping[str, Row]) -> str:
    """Operators outside of all that DeepSpeed counts, largest first; its errors; operators unknown to us."""
    lines = []
    for name, row in rows.items():
        ours, theirs = row["slipstream"], row["DeepSpeed"]
        ordered = sorted(theirs.unseen.items(), key=lambda item: -item[1])
        text = ", ".join(f"{operator.removeprefix('aten.')} {quantity(flops)}" for operator, flops in ordered)
        lines.append(f"{name}: {theirs.error or text or 'nothing'}")
        if ours.unknown:
            lines.append(f"{name}, unknown to slipstream: {', '.join(ours.unknown)}")
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def text_of(rows: Mapping[str, Row]) -> str:
    """All tables, in at most 80 columns."""
    parts = {
        "Multiply-accumulates of a forward pass (apart: every product taken apart)": products(rows),
        "FLOPs of a forward pass; the backward pass (back: ours, off torch's; theirs)": operations(rows),
        "Calls with a formula (known); a plain forward pass, profiled ones to it": costs(rows),
        "Unseen: operators outside of all that DeepSpeed counts, in FLOPs": unseen(rows),
    }
    return "\n\n".join(f"{title}\n{part}" for title, part in parts.items())


def main() -> int:
    """Measures and prints; the JSON file holds what each profiler said."""
    given = parser(__doc__ or "")
    given.set_defaults(rounds=3)
    given.add_argument("--only", type=options.names(SUBJECTS, "model"), default=tuple(SUBJECTS), help="models")
    given.add_argument("--toy", action="store_true", help="the models small, to try the command")
    chosen = given.parse_args()
    if lacking := missing():
        given.exit(2, f"error: {lacking}\n")
    rows: dict[str, dict[str, Found]] = {}
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for name in chosen.only:
                say(name)
                arguments = (name, chosen.toy, chosen.rounds, chosen.threads)
                rows[name] = {side: pool.submit(run, side, *arguments).result() for side in SIDES}
    except SlipstreamError as error:
        given.error(str(error))
    if chosen.json is not None:
        document = {
            "title": f"profilers side by side (DeepSpeed {VERSION})",
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": {name: {side: asdict(found) for side, found in row.items()} for name, row in rows.items()},
        }
        report.write(chosen.json, json.dumps(document, indent=1).encode() + b"\n")
    print(f"{machine()}\n\n{text_of(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
