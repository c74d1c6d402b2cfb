"""Embeddings and norms of the encoder path against their definitions in fp64, and ids that lie outside the tables."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.spec import NormKind
from ops.specialized.encoder_rows import Tables, embed_sequences, norm_rows
from ops.specialized.tile_gemm import Statistics
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (5, 1, 7)


def tables(n: int, dtype: torch.dtype, device: str, *, positions: bool = True, types: int = 2) -> Tables:
    return Tables(
        noise(30, n, dtype=dtype, device=device),
        noise(12, n, dtype=dtype, seed=1, device=device) if positions else None,
        2 if positions else 0,
        noise(types, n, dtype=dtype, seed=2, device=device) if types else None,
        1.5,
    )


def starts(lengths: tuple[int, ...], device: str) -> Tensor:
    """Up to a power of two, the end again and again."""
    found = [0, *accumulate(lengths)]
    return torch.tensor(found + [sum(lengths)] * (8 - len(found)), dtype=torch.int32, device=device)


def run(ids: Tensor, types: Tensor | None, given: Tables, rows: int, width: int = 16) -> tuple[Tensor, Statistics, int]:
    device = given.token.device
    out = torch.full((rows, given.token.shape[1]), torch.nan, dtype=given.token.dtype, device=device)
    statistics = Statistics.empty(rows, out.shape[1], width, device)
    wrong = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
    embed_sequences(
        ids.to(device),
        None if types is None else types.to(device),
        starts(LENGTHS, str(device)),
        given,
        out=out,
        statistics=statistics,
        wrong=wrong,
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return out, statistics, int(wrong)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [48, 50])
@pytest.mark.parametrize("kind", ["all", "no types given", "no types", "no positions"])
def test_embeddings(device: str, dtype: torch.dtype, n: int, kind: str) -> None:
    """Three rows more than the sequences have tokens: they are in the way of nobody."""
    given = tables(n, dtype, device, positions=kind != "no positions", types=0 if kind == "no types" else 2)
    ids = torch.arange(16) * 7 % 30
    types = torch.arange(16) % 2 if kind == "all" else None
    ours, statistics, wrong = run(ids, types, given, 16)
    tokens = sum(LENGTHS)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]) + given.offset
    exact = reference.embed(
        given.token.double().cpu()[ids[:tokens]],
        given.scale,
        positions,
        None if given.position is None else given.position.double().cpu(),
        None if types is None else types[:tokens],
        None if given.token_type is None else given.token_type.double().cpu(),
    )
    assert wrong == 0
    assert_near(ours[:tokens], exact, dtype, 3)
    partial = reference.partial_statistics(ours.double().cpu(), 16)
    assert_near(statistics.values[0], partial[0], torch.float32, 16)
    assert_near(statistics.values[1], partial[1], torch.float32, 16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("at", "value", "wrong"), [(0, 30, 1), (12, -1, 1), (12, 29, 0), (13, 2**40, 0), (7, 2**40, 1)]
)
def test_an_id_outside_the_table_is_told(device: str, at: int, value: int, wrong: int) -> None:
    """Of a row that belongs to a sequence; the rows behind hold whatever was there before."""
    given = tables(48, torch.float32, device)
    ids = torch.zeros(16, dtype=torch.int64)
    ids[at] = value
    assert run(ids, None, given, 16)[2] == wrong


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("value", "wrong"), [(2, 1), (-1, 1), (1, 0)])
def test_a_type_outside_the_table_is_told(device: str, value: int, wrong: int) -> None:
    types = torch.zeros(16, dtype=torch.int64)
    types[3] = value
    assert run(torch.zeros(16, dtype=torch.int64), types, tables(48, torch.float32, device), 16)[2] == wrong


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 33), (0, 16)])
def test_norm_of_rows(device: str, dtype: torch.dtype, kind: NormKind, shape: tuple[int, int]) -> None:
    x = noise(*shape, dtype=dtype, device=device) * 3 + 1
    gain, shift = (noise(shape[1], dtype=dtype, seed=i, device=device) for i in (1, 2))
    for bias in (shift, None):
        out = torch.full_like(x, torch.nan)
        norm_rows(x, gain, bias, kind, 1e-5, out=out)
        exact = reference.norm(
            x.double().cpu(), kind, gain.double().cpu(), None if bias is None else bias.double().cpu(), 1e-5
        )
        assert_near(out, exact, dtype, shape[1])


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    given = tables(48, torch.float32, device)
    good: dict[str, Any] = {
        "ids": torch.zeros(16, dtype=torch.int64, device=device),
        "types": None,
        "starts": starts(LENGTHS, device),
        "tables": given,
        "out": torch.zeros(16, 48, device=device),
        "statistics": Statistics.empty(16, 48, 16, given.token.device),
        "wrong": torch.zeros(1, dtype=torch.int32, device=device),
    }
    bad: list[tuple[dict[str, Any], str]] = [
        ({"ids": good["ids"][:9]}, r"ids has shape \[9\], wanted \[16\]"),
        ({"ids": good["ids"].int()}, "ids is torch.int32"),
        ({"types": good["ids"][:3]}, "types has shape"),
        ({"starts": good["starts"][:3]}, "3 starts: repeat the last one"),
        ({"starts": good["starts"].long()}, "starts is torch.int64"),
        ({"tables": Tables(given.token, given.position.half() if given.position is not None else None)}, "float16"),
        ({"tables": Tables(noise(30, 40, device=device))}, "token has shape"),
        ({"statistics": Statistics.empty(9, 48, 16, given.token.device)}, "statistics has 9 rows"),
        ({"wrong": torch.zeros(1, device=device)}, "wrong is torch.float32"),
    ]
    for changes, message in bad:
        with pytest.raises(KernelError, match=message):
            embed_sequences(**{**good, **changes})
    x, gain = noise(4, 48, device=device), noise(48, device=device)
    for out in (noise(3, 48, device=device), noise(4, 48, device=device).half(), noise(48, 4, device=device).t()):
        with pytest.raises(KernelError, match="norm_rows: out"):
            norm_rows(x, gain, None, "rmsnorm", 1e-5, out=out)
    with pytest.raises(KernelError, match="norm_rows: rows of"):
        norm_rows(noise(1, 16385, device=device), noise(16385, device=device), None, "rmsnorm", 1e-5, out=x)
