"""What the benchmarks share: interleaved medians, the machine in words, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each run once a round, so that a machine whose speed drifts is fair to all; one round to warm up comes first."""
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def spread(values: Sequence[float]) -> str:
    """Median with minimum and maximum."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def machine() -> str:
    """The machine and the libraries in one line."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {threads} threads; {versions}"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--rounds", type=int, default=5, help="measured rounds, after one to warm up")
    found.add_argument("--threads", type=int, default=0, help="threads of torch (0: as torch chooses)")
    found.add_argument("--json", type=Path, help="write what was measured to this file")
    return found


def report(title: str, rows: Sequence[Mapping[str, Any]], path: Path | None, **facts: Any) -> None:
    """Prints the table; writes title, machine, date, facts and rows to ``path`` if there is one."""
    print(f"{title}\n{machine()}")
    print(tabulate([dict(row) for row in rows], headers="keys", floatfmt=".4g"))
    if path is not None:
        document = {
            "title": title,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
        }
        aside = path.with_suffix(path.suffix + ".part")
        aside.write_text(json.dumps({**document, "rows": [dict(row) for row in rows]}, indent=2))
        aside.replace(path)
