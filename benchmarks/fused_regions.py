"""Each fused region of a decoder layer against its unfused parts, at batch 1: norm + QKV, norm + MLP up + activation,
bias + residual of the output and down projections. One CUDA graph each, over weights that together exceed L2.

    python -m benchmarks.fused_regions --compile --json regions.json

The parts are PyTorch's own (``F.layer_norm``, ``F.linear``, ...); with --compile also what ``torch.compile`` makes of
them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gemm_cases import DTYPES, RIGHT, Case, Data, cublas, data, graph, model_cases, read_bandwidth, replays
from benchmarks.measure import machine
from ops.eager.functional import ACTIVATIONS
from ops.gemm import skinny_gemm
from ops.gemm.tuning import device_name
from ops.triton_support import dependent_launch

#: Regions by the last word of a case's name.
REGIONS = {
    "qkv": "norm + QKV",
    "up": "norm + MLP up + activation",
    "out": "out + bias + residual",
    "down": "down + bias + residual",
}


@dataclass(frozen=True)
class Region:
    """One measured region; times in microseconds, the product alone is cuBLAS's without what stands around it."""

    model: str
    region: str
    rows: int
    parts: float
    compiled: float | None
    product: float
    fused: float
    floor: float


def parts(one: Data, x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """The region in plain PyTorch, part by part."""
    case, norm = one.case, one.norm
    if norm is not None and case.norm == "layernorm":
        x = F.layer_norm(x, (case.inner,), norm.weight, norm.bias)
    elif norm is not None:
        x = F.rms_norm(x, (case.inner,), norm.weight, 1e-5)
    y = F.linear(x, weight, None if case.residual else one.bias)
    if case.residual and one.bias is not None:
        y = y + one.bias
    if case.gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    elif case.activation is not None:
        y = ACTIVATIONS[case.activation](y)
    return y if one.residual is None else y + one.residual[:rows]


def measured(case: Case, rows: int, pdl: bool, compile_parts: bool, bandwidth: float, rounds: int) -> Region:
    """One region, all its ways in turn in the same rounds."""
    one = data(case, rows)
    x, options = one.x[:rows], one.options(rows)
    out = torch.empty(rows, case.columns, device="cuda", dtype=case.dtype)

    def every(run: Callable[..., object]) -> Callable[[], object]:
        return lambda: [run(weight) for weight in one.weights]

    def fused(weight: Tensor) -> Tensor:
        return skinny_gemm(x, weight, out=out, pdl=pdl, **options)

    error = one.error(fused(one.weights[0]))
    if not error < RIGHT[case.dtype]:
        raise SystemExit(f"{case.name}: relative error {error:.2g} of the fused region")
    ways: list[Callable[[], object]] = [
        every(lambda weight: parts(one, x, weight, rows)),
        cublas(one, rows),
        every(fused),
    ]
    if compile_parts:
        compiled = torch.compile(lambda weight: parts(one, x, weight, rows), dynamic=False)
        ways.append(every(compiled))
    with torch.no_grad():
        times = replays([graph(way) for way in ways], len(one.weights), rounds)
    model, _, kind = case.name.rpartition(" ")
    floor = case.bytes / bandwidth * 1e6
    return Region(model, REGIONS[kind], rows, times[0], times[3] if compile_parts else None, times[1], times[2], floor)


def row(found: Region) -> dict[str, Any]:
    """A row of the table."""
    columns: dict[str, Any] = {"model": found.model, "region": found.region, "M": found.rows, "parts": found.parts}
    if found.compiled is not None:
        columns["compiled"] = found.compiled
    columns |= {"GEMM": found.product, "fused": found.fused, "x": found.parts / found.fused}
    return {**columns, "floor %": 100 * found.floor / found.fused}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="XL|Neo", help="a regular expression: models whose name has it")
    parser.add_argument("--m", default="1", help="numbers of rows")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--compile", action="store_true", help="also the parts through torch.compile")
    parser.add_argument("--no-pdl", action="store_true", help="without dependent launch")
    parser.add_argument("--rounds", type=int, default=15, help="replays")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    pdl, bandwidth = dependent_launch(device) and not options.no_pdl, read_bandwidth()
    print(f"{machine()}\n{device_name(device)}, reads {bandwidth / 1e12:.2f} TB/s; {options.dtype}; times in us")
    found = []
    for case in model_cases(DTYPES[options.dtype]):
        model, _, kind = case.name.rpartition(" ")
        if kind not in REGIONS or not re.search(options.models, model):
            continue
        for rows in map(int, options.m.split(",")):
            torch._dynamo.reset()
            found.append(measured(case, rows, pdl, options.compile, bandwidth, options.rounds))
    print(tabulate([row(one) for one in found], headers="keys", floatfmt=".2f"))
    if options.json is not None:
        facts = {"device": device_name(device), "machine": machine(), "bandwidth": bandwidth, "pdl": pdl}
        options.json.write_text(json.dumps({**facts, "regions": [asdict(one) for one in found]}, indent=1))


if __name__ == "__main__":
    main()
