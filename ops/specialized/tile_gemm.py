"""GEMMs of a few hundred rows, with the norm before and bias, activation and residual behind them, in one launch.

So few rows are no work for cuBLAS, which covers them with too few tiles: these are small enough for every
multiprocessor to have one. A norm of the input needs whole rows, which no tile sees: the launch that writes the rows
leaves each tile's mean and squares (:class:`Statistics`), and the one that reads them adds these up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ops.closed_forms import ACTIVATION_FLOPS, norm_flops, product_cost
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import assert_runs_here, assert_shape, on, power_of_two
from ops.spec import Activation, NormKind
from ops.specialized.tile_kernels import _tile_gemm_kernel
from ops.specialized.tile_table import Tile, tile_for
from ops.triton_support import check, interpreted, launch_options

OP = "tile_gemm"


@dataclass(frozen=True)
class Statistics:
    """Partial statistics of rows [T, n]: for every ``width`` columns their mean and their sum of squared deviations.

    values: [2, rows, parts] fp32, ``rows`` at least T, ``parts`` the pieces of ``width`` columns; means first.
    """

    values: Tensor
    width: int

    @classmethod
    def empty(cls, rows: int, n: int, width: int, device: torch.device) -> Statistics:
        """Room for those of ``rows`` rows of ``n`` columns."""
        return cls(torch.empty(2, rows, -(-n // width), dtype=torch.float32, device=device), width)

    def assert_fit(self, name: str, like: Tensor, n: int) -> None:
        """Refuses statistics that are not of rows of ``like``, ``n`` columns wide."""
        values, width = self.values, self.width
        wanted = (2, values.shape[1] if values.dim() == 3 else 0, -(-n // width))
        assert_shape(OP, f"{name}.values", values, *wanted)
        if values.shape[1] < like.shape[0] or width != power_of_two(width):
            raise KernelError(
                f"{OP}: {name} has {values.shape[1]} rows in pieces of {width}: give {like.shape[0]} rows"
            )
        if values.dtype != torch.float32 or values.device != like.device or not values.is_contiguous():
            raise KernelError(f"{OP}: {name}.values is {values.dtype} on {values.device}, wanted contiguous fp32")


@dataclass(frozen=True)
class RowNorm:
    """A norm of rows [T, n] whose statistics are known: ``weight`` and ``bias`` are [n] (no bias: None)."""

    kind: NormKind
    eps: float
    weight: Tensor
    bias: Tensor | None
    statistics: Statistics


@dataclass(frozen=True)
class FoldedNorm:
    """A norm whose weights are folded into those of the GEMM (:func:`fold`); ``sums`` [N] fp32 come from there."""

    kind: NormKind
    eps: float
    sums: Tensor
    statistics: Statistics


@dataclass(frozen=True)
class Workspace:
    """Where blocks that split a tile leave their shares: ``partials`` fp32, and ``counters`` int32, zero between
    launches. Launches that run one after the other can share it."""

    partials: Tensor
    counters: Tensor

    @classmethod
    def of(cls, tile: Tile, m: int, n: int, device: torch.device) -> Workspace:
        """As much as ``tile`` takes for a result [m, n]; nothing where it is not split."""
        blocks = tile.blocks(m, n) if tile.split > 1 else 0
        partials = torch.empty(blocks * tile.rows * tile.columns, dtype=torch.float32, device=device)
        return cls(partials, torch.zeros(blocks // tile.split, dtype=torch.int32, device=device))

    def assert_holds(self, tile: Tile, m: int, n: int) -> None:
        """Refuses a tile that takes more."""
        blocks = tile.blocks(m, n)
        room = self.partials.numel() // (tile.rows * tile.columns), self.counters.numel() * tile.split
        if blocks > min(room):
            raise KernelError(
                f"{OP}: the workspace has room for {min(room)} blocks, {tile} over [{m}, {n}] has {blocks}"
            )


def fold(weight: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A GEMM's weight [N, K] and bias with the weights of the norm of its input folded in.

    Of ``y = norm(x) W^T + b`` remains ``y = (x W'^T - mean sums^T) / deviation + b'`` with ``W' = W gain``, ``sums``
    those of its rows and ``b' = b + W shift``, so that the norm needs nothing of ``x`` before the product. Returns
    (W' in ``weight``'s dtype, b' fp32, sums fp32 of W' as rounded).
    """
    folded = (weight.float() * gain.float()).to(weight.dtype)
    added = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias.float()
    if shift is not None:
        added = added + weight.float() @ shift.float()
    return folded, added, folded.float().sum(1)


def _tile_cost(
    result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    norm: RowNorm | FoldedNorm | None = None, activation: Activation | None = None, residual: Tensor | None = None,
    residual_norm: RowNorm | None = None, **_: object,
) -> Cost:  # fmt: skip
    """A norm counts once by its definition, wherever it is computed; the bias is the product's, which the dense
    convention leaves out."""
    (rows, k), n = x.shape, weight.shape[0]
    beside = 0 if activation is None else ACTIVATION_FLOPS[activation]
    beside = (beside + (residual is not None)) * result.numel()
    known, width = (norm, k) if norm is not None else (residual_norm, n)
    read = sum(one.nbytes for one in (x, weight, bias, residual) if one is not None)
    if known is not None:
        beside += norm_flops(rows, width, known.kind, isinstance(known, RowNorm) and known.bias is not None)
        own = (known.sums,) if isinstance(known, FoldedNorm) else (known.weight, known.bias)
        read += sum(one.nbytes for one in (*own, known.statistics.values) if one is not None)
    cost = product_cost(rows, n, k, bias=bias is not None, beside=beside)
    return replace(cost, bytes_read=read, bytes_written=result.nbytes)


@priced(_tile_cost)
def tile_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RowNorm | FoldedNorm | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
    residual_norm: RowNorm | None = None,
    statistics: Statistics | None = None,
    tile: Tile | None = None,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """``activation(norm(x) weight^T + bias) + residual_norm(residual)`` [T, N], each part optional, in ``x``'s dtype.

    x, weight:     [T, K] and [N, K]. bias: [N], also in fp32.
    norm:          of ``x``; its result is rounded as if it had been stored, unless it is folded.
    residual:      [T, N]; ``residual_norm`` is of its rows. Only one of the two norms can be given.
    statistics:    gets those of the result, in pieces as wide as the tile.
    tile:          how it is cut; None takes :func:`ops.specialized.tile_table.tile_for`'s.
    workspace:     for tiles that are split; None allocates one.
    out:           [T, N], where the result goes; none of the inputs.
    pdl:           start while the launch in front drains (:func:`ops.triton_support.dependent_launch`).

    Raises :class:`KernelError` for tensors that do not fit together.
    """
    (m, k), n = _sizes(x, weight), weight.shape[0]
    tile = tile or tile_for(m, n, k, x.dtype)
    out = x.new_empty(m, n) if out is None else out
    _assert_fit(x, weight, bias, norm, residual, residual_norm, out)
    if statistics is not None:
        statistics.assert_fit("statistics", out, n)
        if statistics.width != tile.columns:
            raise KernelError(f"{OP}: statistics in pieces of {statistics.width}, the tile has {tile.columns} columns")
    if m == 0:
        return out
    if tile.split == 1:
        workspace = None
    elif workspace is None:
        workspace = Workspace.of(tile, m, n, x.device)
    else:
        workspace.assert_holds(tile, m, n)
    aligned = k * x.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    with on(x.device):
        _tile_gemm_kernel[(tile.blocks(m, n) // tile.split, tile.split)](
            x, weight, bias, out, residual, m=m, N=n, K=k, ACT=activation, **_of_norm(norm, residual_norm),
            **_of_result(statistics), **_of_tile(tile, workspace, m, n, k), WIDEN=interpreted(),
            PIECES=max(32 * tile.warps // tile.columns, 1) if aligned else 0, PDL=pdl,
            num_warps=tile.warps, num_stages=tile.stages, **launch_options(pdl),
        )  # fmt: skip
    return out


#: What it is told of none.
_NO_NORM = dict.fromkeys(("norm_weight", "norm_bias", "stats", "NORM")) | dict.fromkeys(
    ("plane", "eps", "LAYERNORM", "PARTS", "WIDTH", "BLOCK_PARTS"), 0
)


def _of_norm(norm: RowNorm | FoldedNorm | None, residual_norm: RowNorm | None) -> dict[str, Any]:
    """What the kernel is told of the norm."""
    known = norm or residual_norm
    if known is None:
        return _NO_NORM
    values = known.statistics.values
    folded = isinstance(known, FoldedNorm)
    return {
        "norm_weight": known.sums if isinstance(known, FoldedNorm) else known.weight,
        "norm_bias": None if isinstance(known, FoldedNorm) else known.bias,
        "stats": values,
        "plane": values.stride(0),
        "eps": known.eps,
        "NORM": "stream" if norm is None else "folded" if folded else "input",
        "LAYERNORM": known.kind == "layernorm",
        "PARTS": values.shape[2],
        "WIDTH": known.statistics.width,
        "BLOCK_PARTS": power_of_two(values.shape[2]),
    }


def _of_result(statistics: Statistics | None) -> dict[str, Any]:
    """Where the kernel leaves the result's statistics."""
    if statistics is None:
        return {"out_stats": None, "out_plane": 0, "OUT_PARTS": 0}
    values = statistics.values
    return {"out_stats": values, "out_plane": values.stride(0), "OUT_PARTS": values.shape[2]}


def _of_tile(tile: Tile, workspace: Workspace | None, m: int, n: int, k: int) -> dict[str, Any]:
    """How the kernel cuts the result [m, n]."""
    step = tile.depth * tile.slices * tile.split
    return {
        "partials": workspace and workspace.partials,
        "counters": workspace and workspace.counters,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "SLICES": tile.slices,
        "SPLIT": tile.split,
        "STEPS": -(-k // step),
        "EVEN_M": m % tile.rows == 0,
        "EVEN_N": n % tile.columns == 0,
        "EVEN_K": k % step == 0,
    }


def _is_fp32(bias: Tensor | None) -> bool:
    return bias is not None and bias.dtype == torch.float32


def _sizes(x: Tensor, weight: Tensor) -> torch.Size:
    assert_runs_here(OP, x)
    check(OP, x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise KernelError(f"{OP}: x {list(x.shape)} times weight {list(weight.shape)}: wanted [T, K] and [N, K]")
    return x.shape


def _assert_fit(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: RowNorm | FoldedNorm | None,
    residual: Tensor | None,
    residual_norm: RowNorm | None,
    out: Tensor,
) -> None:
    """Refuses what does not fit ``x`` and ``weight``."""
    (m, k), n = x.shape, weight.shape[0]
    check(OP, x, residual=residual, out=out, bias=None if _is_fp32(bias) else bias)
    if bias is not None and (bias.device != x.device or not bias.is_contiguous()):
        raise KernelError(
            f"{OP}: bias is on {bias.device} with strides {bias.stride()}, wanted contiguous on {x.device}"
        )
    assert_shape(OP, "bias", bias, n)
    assert_shape(OP, "residual", residual, m, n)
    assert_shape(OP, "out", out, m, n)
    if residual_norm is not None and (residual is None or norm is not None):
        raise KernelError(f"{OP}: residual_norm goes with a residual and without norm: give one of the norms")
    for known, like, width in ((norm, x, k), (residual_norm, out, n)):
        if known is None:
            continue
        known.statistics.assert_fit("norm.statistics", like, width)
        if isinstance(known, FoldedNorm):
            assert_shape(OP, "norm.sums", known.sums, n)
            check(OP, known.statistics.values, sums=known.sums)
        else:
            check(OP, x, **{"norm.weight": known.weight, "norm.bias": known.bias})
            assert_shape(OP, "norm.weight", known.weight, width)
            assert_shape(OP, "norm.bias", known.bias, width)
