"""The fused GEMM of the encoder path against its definition in fp64: every norm, epilogue and way to cut it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.spec import NormKind
from ops.specialized.tile_gemm import FoldedNorm, RowNorm, Statistics, Workspace, fold, tile_gemm
from ops.specialized.tile_table import Tile
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILES = {
    "whole": Tile(16, 16, 16, warps=2, stages=2),
    "sliced": Tile(16, 32, 16, warps=2, stages=2, slices=2),
    "split": Tile(16, 16, 16, warps=2, stages=3, split=3),
    "sliced and split": Tile(32, 16, 16, warps=2, stages=2, slices=2, split=2),
}
EPS = 1e-5


def exact_norm(x: Tensor, kind: NormKind, gain: Tensor, shift: Tensor | None) -> Tensor:
    return reference.norm(x.double(), kind, gain.double(), None if shift is None else shift.double(), EPS)


def known(x: Tensor, kind: NormKind, width: int, biased: bool = True, spare: int = 3) -> RowNorm:
    """A norm of ``x`` whose statistics come from the definition, with room for more rows than there are."""
    n = x.shape[1]
    statistics = Statistics.empty(x.shape[0] + spare, n, width, x.device)
    statistics.values.fill_(torch.nan)
    statistics.values[:, : x.shape[0]] = reference.partial_statistics(x.double(), width).float()
    gain = noise(n, dtype=x.dtype, seed=5).to(x.device) + 1
    return RowNorm(kind, EPS, gain, noise(n, dtype=x.dtype, seed=6).to(x.device) if biased else None, statistics)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(1, 16, 16), (21, 50, 70), (16, 32, 96), (33, 17, 33), (5, 8, 200)])
def test_product(device: str, dtype: torch.dtype, tile: str, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, weight = noise(m, k, dtype=dtype, device=device), noise(n, k, dtype=dtype, seed=1, device=device)
    bias, residual = noise(n, dtype=dtype, seed=2, device=device), noise(m, n, dtype=dtype, seed=3, device=device)
    ours = tile_gemm(x, weight, bias, residual=residual, tile=TILES[tile])
    exact = reference.fused_product(*(t.double().cpu() for t in (x, weight, bias)), None, residual.double().cpu())
    assert ours.dtype == dtype
    assert_near(ours, exact, dtype, k)
    assert_near(tile_gemm(x, weight, tile=TILES[tile]), x.double().cpu() @ weight.double().cpu().T, dtype, k)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "tanh"])
def test_activations(device: str, dtype: torch.dtype, kind: Any) -> None:
    x, weight = noise(7, 40, dtype=dtype, device=device), noise(24, 40, dtype=dtype, seed=1, device=device) * 0.2
    ours = tile_gemm(x, weight, activation=kind, tile=TILES["whole"])
    exact = reference.fused_product(x.double().cpu(), weight.double().cpu(), None, kind, None)
    assert_near(ours, exact, dtype, 40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("folded", [False, True])
def test_norm_of_the_input(device: str, dtype: torch.dtype, tile: str, kind: NormKind, folded: bool) -> None:
    """70 columns in pieces of 16: the last one is narrower, and weighs less."""
    x = noise(21, 70, dtype=dtype, device=device) * 2 + 1
    weight, bias = (noise(*s, dtype=dtype, seed=1, device=device) * 0.3 for s in ((50, 70), (50,)))
    norm: RowNorm | FoldedNorm = known(x, kind, 16, kind == "layernorm")
    assert isinstance(norm, RowNorm)
    normed = exact_norm(x, kind, norm.weight, norm.bias).cpu()
    exact = reference.fused_product(normed, weight.double().cpu(), bias.double().cpu(), "gelu", None)
    used, added = weight, bias
    if folded:
        used, added, sums = fold(weight, bias, norm.weight, norm.bias)
        norm = FoldedNorm(kind, EPS, sums, norm.statistics)
    ours = tile_gemm(x, used, added, norm=norm, activation="gelu", tile=TILES[tile])
    assert_near(ours, exact, dtype, 70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norm_of_the_residual(device: str, dtype: torch.dtype, tile: str, kind: NormKind) -> None:
    x, weight = noise(21, 40, dtype=dtype, device=device), noise(50, 40, dtype=dtype, seed=1, device=device) * 0.3
    residual = noise(21, 50, dtype=dtype, seed=2, device=device) * 2 + 1
    norm = known(residual, kind, 32)
    ours = tile_gemm(x, weight, residual=residual, residual_norm=norm, tile=TILES[tile])
    normed = exact_norm(residual, kind, norm.weight, norm.bias).cpu()
    assert_near(ours, reference.fused_product(x.double().cpu(), weight.double().cpu(), None, None, normed), dtype, 40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("n", [48, 50, 16])
def test_statistics_of_the_result(device: str, dtype: torch.dtype, tile: str, n: int) -> None:
    """They are of what was stored, as a norm that reads it would find them; rows behind the last stay as they are."""
    chosen = TILES[tile]
    x, weight = noise(21, 40, dtype=dtype, device=device), noise(n, 40, dtype=dtype, seed=1, device=device)
    statistics = Statistics.empty(23, n, chosen.columns, x.device)
    statistics.values.fill_(7)
    ours = tile_gemm(x, weight, noise(n, dtype=dtype, device=device), statistics=statistics, tile=chosen)
    exact = reference.partial_statistics(ours.double().cpu(), chosen.columns)
    assert_near(statistics.values[0, :21], exact[0], torch.float32, chosen.columns)
    assert_near(statistics.values[1, :21], exact[1], torch.float32, chosen.columns)
    assert bool((statistics.values[:, 21:] == 7).all())


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_mean_does_not_cancel(device: str) -> None:
    x = noise(3, 48, device=device) + 3000
    norm = replace(known(x, "layernorm", 16), weight=torch.ones(48, device=device), bias=None, eps=0.0)
    ours = tile_gemm(x, torch.eye(48, device=device), norm=norm, tile=TILES["whole"])
    exact = reference.norm(x.double().cpu(), "layernorm", torch.ones(48).double(), None, 0.0)
    assert float((ours.double().cpu() - exact).abs().max()) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
def test_a_workspace_serves_launch_after_launch(device: str) -> None:
    """The counters are back at zero, and the sum of shares does not depend on who came last."""
    tile = TILES["sliced and split"]
    x, weight = noise(40, 64, device=device), noise(48, 64, seed=1, device=device)
    workspace = Workspace.of(tile, 40, 48, x.device)
    workspace.partials.fill_(torch.nan)
    found = [tile_gemm(x, weight, tile=tile, workspace=workspace) for _ in range(3)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert not bool(workspace.counters.any())
    assert_near(found[0], x.double().cpu() @ weight.double().cpu().T, torch.float32, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_written_behind_the_result(device: str) -> None:
    room = torch.full((8, 17), 3.0, device=device)
    x, weight = noise(5, 16, device=device), noise(17, 16, seed=1, device=device)
    ours = tile_gemm(x, weight, out=room[:5], tile=TILES["whole"])
    assert ours.data_ptr() == room.data_ptr()
    assert bool((room[5:] == 3).all())


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_give_no_rows(device: str) -> None:
    x, weight = noise(0, 16, device=device), noise(8, 16, device=device)
    assert tile_gemm(x, weight).shape == (0, 8)


@pytest.mark.parametrize("device", DEVICES)
def test_the_default_tile_serves(device: str) -> None:
    x, weight = noise(9, 70, dtype=torch.float16, device=device), noise(40, 70, dtype=torch.float16, device=device)
    assert_near(tile_gemm(x, weight), x.double().cpu() @ weight.double().cpu().T, torch.float16, 70)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    x, weight = noise(4, 16, device=device), noise(32, 16, device=device)
    norm = known(x, "layernorm", 16)
    wide = known(noise(4, 32, device=device), "layernorm", 16)
    tile = TILES["split"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"weight": weight.half()}, "weight is torch.float16"),
        ({"weight": noise(16, 32, device=device).t()}, "weight has strides"),
        ({"weight": noise(32, 15, device=device)}, r"x \[4, 16\] times weight \[32, 15\]"),
        ({"x": noise(16, 4, device=device).t()}, "x has strides"),
        ({"x": x.double()}, "x is torch.float64: cast it"),
        ({"bias": noise(31, device=device)}, r"bias has shape \[31\], wanted \[32\]"),
        ({"bias": noise(64, device=device)[::2]}, "bias is on .* with strides"),
        ({"residual": noise(4, 31, device=device)}, "residual has shape"),
        ({"residual": noise(8, 32, device=device)[::2]}, "residual has strides"),
        ({"out": noise(3, 32, device=device)}, "out has shape"),
        ({"residual_norm": wide}, "residual_norm goes with a residual"),
        ({"residual": noise(4, 32, device=device), "residual_norm": wide, "norm": norm}, "give one of the norms"),
        ({"norm": wide}, "norm.statistics.values has shape"),
        ({"norm": known(noise(3, 16, device=device), "layernorm", 16, spare=0)}, "has 3 rows in pieces of 16"),
        ({"norm": replace(norm, weight=noise(15, device=device))}, "norm.weight has shape"),
        ({"norm": FoldedNorm("layernorm", EPS, noise(31, device=device), norm.statistics)}, "norm.sums has shape"),
        ({"statistics": Statistics.empty(4, 32, 32, x.device)}, "statistics in pieces of 32, the tile has 16 columns"),
        ({"workspace": Workspace.of(tile, 4, 16, x.device)}, "the workspace has room for"),
    ]
    for changes, message in bad:
        arguments = {"x": x, "weight": weight, "tile": tile, **changes}
        with pytest.raises(KernelError, match=f"^tile_gemm: {message}|^tile_gemm: .*{message}"):
            tile_gemm(**arguments)
    if device == "cuda":
        with pytest.raises(KernelError, match="weight is on cpu"):
            tile_gemm(x, weight.cpu())
