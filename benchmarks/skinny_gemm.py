"""The skinny GEMM against cuBLAS, shape by shape: tries every candidate config, checks it against an fp32 product, and
times the fastest beside ``F.linear`` in CUDA graphs over weights that together exceed L2.

    python -m benchmarks.skinny_gemm --json gemm.json --ship ops/gemm/tuned/nvidia_h200.json
    python -m benchmarks.skinny_gemm --model-shapes --only 'XL|Neo' --ship ops/gemm/tuned/nvidia_h200.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as TooLate
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gemm_cases import (
    DTYPES,
    RIGHT,
    Case,
    Data,
    cublas,
    data,
    graph,
    model_cases,
    plain_cases,
    read_bandwidth,
    replays,
)
from benchmarks.measure import machine
from ops.errors import KernelError
from ops.gemm import GemmConfig, skinny_gemm
from ops.gemm.config import candidates
from ops.gemm.tuning import device_name, read_table, write_table
from ops.triton_support import dependent_launch
from ops.weights import Norm

HEAD = f"{'shape':<14}{'K x N':>12}{'M':>4}{'cuBLAS':>8}{'ours':>8}{'x':>6}{'floor':>6}  config"


@dataclass(frozen=True)
class Cell:
    """One measured shape and number of rows; times in microseconds a launch.

    percent is that of the floor (bytes of the weight over the measured read bandwidth) that ours reaches; top lists the
    fastest configs of the sweep with their times there, wrong the configs whose result was not right.
    """

    case: str
    inner: int
    columns: int
    rows: int
    cublas: float
    ours: float
    percent: float
    config: GemmConfig
    tried: int
    top: list[tuple[float, str]]
    wrong: list[str]

    @property
    def ratio(self) -> float:
        """How many times faster than cuBLAS."""
        return self.cublas / self.ours


def short(config: GemmConfig) -> str:
    """A config in a few letters: ``mma 16x128 w8``."""
    ring = f" s{config.slices} r{config.stages}" if config.kind == "ring" else ""
    return f"{config.kind} {config.block_n}x{config.block_k} w{config.warps}{ring}"


Job = tuple[Case, int, GemmConfig, bool]


def compiled_alike(job: Job) -> tuple[Any, ...]:
    """What a compiled kernel depends on: jobs with the same value share one."""
    case, rows, config, _ = job
    once = config.kind != "ring" and config.once(case.inner)
    # Triton compiles for 1 and for multiples of 16 apart from other numbers; the norm's step depends on K
    special = (rows == 1, rows % 16 == 0, case.columns % 16 == 0, case.inner % 16 == 0, case.inner % 8 == 0)
    epilogue = (case.dtype, case.norm, case.bias, case.activation, case.gated, case.residual)
    return (config, config.rows(rows), once, special, epilogue, case.inner if case.norm else 0)


def compile_jobs(jobs: list[Job]) -> list[str]:
    """Compiles into Triton's cache by running each job on a few columns, in a process of its own; the complaints."""
    said = []
    for case, rows, config, pdl in jobs:
        columns = 64 + case.columns % 16

        def zeros(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
            return torch.zeros(*shape, device="cuda", dtype=dtype)

        height = columns * (2 if case.gated else 1)
        norm = Norm(zeros(case.inner), zeros(case.inner) if case.norm == "layernorm" else None) if case.norm else None
        try:
            skinny_gemm(
                zeros(rows, case.inner),
                zeros(height, case.inner),
                zeros(height) if case.bias else None,
                norm=norm,
                norm_kind=case.norm or "layernorm",
                activation=case.activation,
                gated=case.gated,
                residual=zeros(rows, columns) if case.residual else None,
                config=config,
                pdl=pdl,
            )
        except KernelError as error:  # does not fit this GPU: the sweep will pass over it as well
            said.append(str(error))
    torch.cuda.synchronize()
    return said


def compile_all(jobs: Iterable[Job], processes: int, limit: float) -> int:
    """Compiles what the jobs need in parallel, for at most ``limit`` seconds; how many kernels that are."""
    alike = {compiled_alike(job): job for job in jobs}
    todo = list(alike.values())
    parts = [todo[start :: processes * 4] for start in range(processes * 4)]
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        for complaints in pool.map(compile_jobs, [part for part in parts if part], timeout=limit):
            for line in complaints:
                print(f"passed over: {line[:140]}", flush=True)
    except TooLate:
        print(f"compiling took longer than {limit:.0f} s: the rest compiles as it comes up", flush=True)
    pool.shutdown(wait=True, cancel_futures=True)
    return len(todo)


def launches(one: Data, rows: int, config: GemmConfig, pdl: bool, out: Tensor) -> Callable[[], object]:
    """Ours, of every weight."""
    x, options = one.x[:rows], one.options(rows)
    return lambda: [skinny_gemm(x, weight, out=out, config=config, pdl=pdl, **options) for weight in one.weights]


Ranked = list[tuple[float, GemmConfig]]


def rank(one: Data, rows: int, configs: Iterable[GemmConfig], pdl: bool, deadline: float) -> tuple[Ranked, list[str]]:
    """Tries configs until ``deadline``: microseconds of those whose result is right, fastest first, and what was
    wrong."""
    out = torch.empty(rows, one.case.columns, device="cuda", dtype=one.case.dtype)
    found: Ranked = []
    wrong = []
    for config in configs:
        if time.monotonic() > deadline:
            break
        out.fill_(math.nan)
        try:
            skinny_gemm(one.x[:rows], one.weights[0], out=out, config=config, pdl=pdl, **one.options(rows))
        except KernelError:
            continue
        error = one.error(out)
        if not error < RIGHT[one.case.dtype]:
            wrong.append(f"{short(config)}: relative error {error:.2g}")
            continue
        captured = graph(launches(one, rows, config, pdl, out), warm=True)
        found.append((replays([captured], len(one.weights), 4)[0], config))
    return sorted(found, key=lambda pair: pair[0]), wrong


def settle(one: Data, rows: int, ranked: Ranked, wrong: list[str], pdl: bool, bandwidth: float, rounds: int) -> Cell:
    """Times the three fastest again, beside cuBLAS."""
    case, best = one.case, [config for _, config in ranked[:3]]
    out = torch.empty(rows, case.columns, device="cuda", dtype=case.dtype)
    graphs = [graph(cublas(one, rows)), *(graph(launches(one, rows, config, pdl, out), warm=True) for config in best)]
    base, *times = replays(graphs, len(one.weights), rounds)
    ours = min(times)
    return Cell(
        case.name,
        case.inner,
        case.columns,
        rows,
        base,
        ours,
        100 * case.bytes / bandwidth * 1e6 / ours,
        best[times.index(ours)],
        len(ranked),
        [(round(micros, 3), short(config)) for micros, config in ranked[:12]],
        wrong,
    )


def shortlist(ranked: Ranked, inner: int) -> list[GemmConfig]:
    """Of a product's ranking what to try with more fused to it: the fastest, and the fastest that see all of K at once,
    which compute a norm more cheaply."""
    once = [config for _, config in ranked if config.kind != "ring" and config.once(inner)]
    return list(dict.fromkeys([*(config for _, config in ranked[:6]), *once[:4]]))


def line(cell: Cell) -> str:
    """A row of the table."""
    size = f"{cell.inner}x{cell.columns}"
    numbers = f"{cell.rows:>4}{cell.cublas:>8.2f}{cell.ours:>8.2f}{cell.ratio:>6.2f}{cell.percent:>5.0f}%"
    return f"{cell.case:<14}{size:>12}{numbers}  {short(cell.config)}"


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summary(cells: list[Cell]) -> Iterator[str]:
    """Geometric means and the worst cell."""
    for rows in sorted({cell.rows for cell in cells}):
        ratios = [cell.ratio for cell in cells if cell.rows == rows]
        yield f"M = {rows}: {geometric_mean(ratios):.3f} times cuBLAS (geometric mean of {len(ratios)} shapes)"
    worst = min(cells, key=lambda cell: cell.ratio)
    yield f"all: {geometric_mean(cell.ratio for cell in cells):.3f} over {len(cells)} cells"
    yield f"worst: {worst.ratio:.3f}, {worst.case} at M = {worst.rows}"


def parse() -> argparse.Namespace:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--m", default="1,2,4,8,10", help="numbers of rows")
    found.add_argument("--model-shapes", action="store_true", help="the layers of whole models, with what decode fuses")
    found.add_argument("--only", default="", help="a regular expression: shapes whose name has it")
    found.add_argument("--dtype", choices=DTYPES, default="fp16")
    found.add_argument("--no-pdl", action="store_true", help="without dependent launch")
    found.add_argument("--processes", type=int, default=14, help="that compile at the same time")
    found.add_argument("--rounds", type=int, default=15, help="replays of the last measurement")
    found.add_argument("--limit-seconds", type=float, default=420, help="bound on the whole run")
    found.add_argument("--json", type=Path, help="write what was measured to this file")
    found.add_argument("--ship", type=Path, help="add the fastest configs to this table")
    return found.parse_args()


def save(cells: list[Cell], cases: list[Case], bandwidth: float, options: argparse.Namespace) -> None:
    """Writes the files that were asked for."""
    device = device_name(torch.device("cuda", torch.cuda.current_device()))
    if options.ship is not None:
        named = {case.name: case for case in cases}
        configs = {named[cell.case].key(cell.rows): cell.config for cell in cells}
        write_table(options.ship, device, {**read_table(options.ship), **configs})
    if options.json is not None:
        facts = {"device": device, "machine": machine(), "bandwidth": bandwidth, "pdl": not options.no_pdl}
        rows = [{**asdict(cell), "ratio": cell.ratio} for cell in cells]
        options.json.write_text(json.dumps({**facts, "dtype": options.dtype, "cells": rows}, indent=1))


class Run:
    """One run of the benchmark: its options, and the time it has left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.start = options, time.monotonic()
        self.dtype = DTYPES[options.dtype]
        every = model_cases(self.dtype) if options.model_shapes else plain_cases(self.dtype)
        self.cases = [case for case in every if re.search(options.only, case.name)]
        self.rows = [int(part) for part in options.m.split(",")]
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.pdl = dependent_launch(self.device) and not options.no_pdl
        self.bandwidth = 0.0
        self.cells: list[Cell] = []
        self.configs: dict[tuple[Case, int], list[GemmConfig]] = {}

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.start

    def compile(self, cases: Iterable[Case], share: float) -> None:
        """Compiles the cases' configs in ``share`` of the time left."""
        jobs = [(case, m, config, self.pdl) for case in cases for m in self.rows for config in self.configs[case, m]]
        count = compile_all(jobs, self.options.processes, share * (self.options.limit_seconds - self.seconds()))
        print(f"{count} kernels compiled, {self.seconds():.0f} s since the start", flush=True)

    def measure(self, cases: list[Case], share: float, last: bool) -> dict[tuple[Case, int], Ranked]:
        """Ranks the cases' configs in ``share`` of the time left; the last time also settles, prints and saves."""
        end = self.seconds() + share * (self.options.limit_seconds - self.seconds())
        left, found = len(cases) * len(self.rows), {}
        for case in cases:
            one = data(case, max(self.rows))
            for m in self.rows:
                mine = max(0.0, end - self.seconds()) * 3 / max(3, left)  # cells differ: most leave some of it
                left -= 1
                ranked, wrong = rank(one, m, self.configs[case, m], self.pdl, time.monotonic() + mine)
                found[case, m] = ranked
                if not ranked:
                    print(f"{case.name}, M = {m}: no time left, or nothing right: {wrong}", flush=True)
                elif last:
                    cell = settle(one, m, ranked, wrong, self.pdl, self.bandwidth, self.options.rounds)
                    self.cells.append(cell)
                    print(line(cell), *(f"\n  wrong: {text}" for text in cell.wrong), sep="", flush=True)
                    save(self.cells, self.cases, self.bandwidth, self.options)
        return found

    def main(self) -> None:
        """Measures and prints."""
        models = self.options.model_shapes
        bare = list(dict.fromkeys(case.bare for case in self.cases)) if models else self.cases
        for case in bare:
            for m in self.rows:
                self.configs[case, m] = candidates(self.dtype, m, case.columns, case.inner, case.gated)
        self.compile(bare, 0.3 if models else 0.45)
        self.bandwidth = read_bandwidth()
        print(f"{machine()}\n{device_name(self.device)}, reads {self.bandwidth / 1e12:.2f} TB/s; {self.options.dtype}")
        print(f"dependent launch: {self.pdl}; times in us; floor: % of it that ours reaches\n{HEAD}", flush=True)
        ranked = self.measure(bare, 0.5 if models else 1.0, last=not models)
        if models:
            for case in self.cases:
                for m in self.rows:
                    self.configs[case, m] = shortlist(ranked[case.bare, m], case.inner)
            self.compile(self.cases, 0.6)
            self.measure(self.cases, 1.0, last=True)
        if self.cells:
            print(*summary(self.cells), sep="\n")
        print(f"{len(self.cells)} of {len(self.cases) * len(self.rows)} cells in {self.seconds():.0f} s")


if __name__ == "__main__":
    Run(parse()).main()
