"""``python -m ops.gemm``: tunes shapes for the GPU at hand, into the user's table or into one to ship."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from ops.gemm.config import DTYPES, GemmConfig, key
from ops.gemm.timing import tune
from ops.gemm.tuning import device_name, read_table, remember, table_name, write_table
from ops.weights import Norm

_LOG = logging.getLogger("slipstream.ops.gemm")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ops.gemm", description=__doc__)
    parser.add_argument("--shapes", required=True, help="inputs x outputs of linear layers: 768x2304,3072x768")
    parser.add_argument("--m", default="1,2,4,8,16", help="numbers of rows")
    parser.add_argument("--dtype", choices=sorted(DTYPES.values()), default="fp16")
    parser.add_argument("--gated", action="store_true", help="outputs are gated: weights have twice the rows")
    parser.add_argument("--norm", choices=("layernorm", "rmsnorm"), help="tune with this norm in front")
    parser.add_argument(
        "--ship", type=Path, metavar="DIR", help="add to the table in this directory, not to the user's"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Tunes every shape for every number of rows; says on the log what won."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = next(dtype for dtype, name in DTYPES.items() if name == options.dtype)
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    for inner, columns in shapes:
        found: dict[str, GemmConfig] = {}
        for rows in map(int, options.m.split(",")):
            name = key(dtype, rows, columns, inner, options.gated, options.norm is not None)
            found[name], micros = _one(device, dtype, rows, columns, inner, options)
            _LOG.info("%s: %.2f us with %s", name, micros, found[name])
        _keep(device_name(device), found, options.ship)


def _one(
    device: torch.device, dtype: torch.dtype, rows: int, columns: int, inner: int, options: argparse.Namespace
) -> tuple[GemmConfig, float]:
    """The fastest config of one shape, and its microseconds."""
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns * (2 if options.gated else 1), inner, device=device, dtype=dtype)
    norm = None
    if options.norm is not None:
        ones = torch.ones(inner, device=device, dtype=dtype)
        norm = Norm(ones, torch.zeros_like(ones) if options.norm == "layernorm" else None)
    kind = options.norm or "layernorm"
    best, times = tune(x, weight, save=False, gated=options.gated, norm=norm, norm_kind=kind)
    return best, times[best]


def _keep(device: str, found: dict[str, GemmConfig], directory: Path | None) -> None:
    if directory is None:
        remember(device, found)
    else:
        path = directory / table_name(device)
        write_table(path, device, {**read_table(path), **found})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
