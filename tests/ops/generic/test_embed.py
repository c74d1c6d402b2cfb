"""Embeddings and the norm behind them against their definitions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.generic.embed import embed
from ops.generic.launch import WIDEST_ROW
from ops.spec import NormKind
from ops.weights import Norm
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARY, PLACES, TYPES = 11, 20, 3


def moved(device: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", ["token", "position", "type", "first type", "all", "looked up"])
@pytest.mark.parametrize(("tokens", "n"), [(1, 48), (5, 33), (0, 8), (2, 300), (1, 1)])
def test_embed(device: str, dtype: torch.dtype, parts: str, tokens: int, n: int) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    positions = torch.randint(0, PLACES - 2, (tokens,), generator=generator)
    types = torch.randint(0, TYPES, (tokens,), generator=generator)
    table = noise(VOCABULARY, n, dtype=dtype)
    given: dict[str, Any] = {"scale": 1.5 if parts == "token" else 1.0, "positions": positions}
    if parts in ("position", "all", "looked up"):
        given |= {"position_table": noise(PLACES, n, dtype=dtype, seed=1), "offset": 2}
    if parts in ("type", "all", "first type"):
        given["type_table"] = noise(TYPES, n, dtype=dtype, seed=2)
    if parts in ("type", "all"):
        given["types"] = types
    rows = table[ids]
    exact = reference.embed(
        rows.double(),
        given["scale"],
        positions + given.get("offset", 0),
        given["position_table"].double() if "position_table" in given else None,
        given.get("types"),
        given["type_table"].double() if "type_table" in given else None,
    )
    at = {"ids": None, "table": rows} if parts == "looked up" else {"ids": ids, "table": table}
    raw, none = embed(**moved(device, at), **moved(device, given))
    assert none is None
    assert_near(raw, exact, dtype, 3)
    kinds: tuple[NormKind, ...] = ("layernorm", "rmsnorm")
    for kind in kinds:
        weight, bias = noise(n, dtype=dtype, seed=4) + 1, noise(n, dtype=dtype, seed=5)
        weights = Norm(weight.to(device), bias.to(device) if kind == "layernorm" else None)
        raw, normed = embed(**moved(device, at), **moved(device, given), weights=weights, kind=kind, eps=1e-5)
        assert normed is not None
        assert raw.dtype == normed.dtype == dtype
        assert_near(raw, exact, dtype, 3)
        double = bias.double() if kind == "layernorm" else None
        assert_near(normed, reference.norm(exact, kind, weight.double(), double, 1e-5), dtype, n)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_no_block_holds(device: str) -> None:
    n = WIDEST_ROW + 3
    table, weight = noise(3, n), noise(n, seed=1)
    ids = torch.tensor([2, 0])
    raw, normed = embed(ids.to(device), table.to(device), weights=Norm(weight.to(device)), kind="rmsnorm", eps=1e-5)
    assert torch.equal(raw.cpu(), table[ids])
    assert normed is not None
    exact = reference.norm(table[ids].double(), "rmsnorm", weight.double(), None, 1e-5)
    assert_near(normed, exact, torch.float32, n)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    table = noise(5, 6, device=device)
    ids = torch.arange(4, device=device)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(KernelError, match=f"embed: {message}"):
            embed(**({"ids": ids, "table": table} | changes))

    refused(r"x has strides \(1, 5\)", table=noise(6, 5, device=device).t())
    refused(r"ids is torch\.int32", ids=ids.int())
    refused("ids is torch.int64 on meta", ids=ids.to("meta"))
    refused(r"positions has shape \[3\], wanted \[4\]", positions=ids[:3], position_table=table)
    refused("position_table without positions", position_table=table)
    refused(
        r"position_table has shape \[5, 5\], wanted \[5, 6\]", positions=ids, position_table=noise(5, 5, device=device)
    )
    refused(r"type_table is torch\.float16", type_table=table.half())
    refused(r"weight has shape \[5\], wanted \[6\]", weights=Norm(noise(5, device=device)))
    refused(r"x has shape \[6\], wanted \[rows, n\]", table=table[0].clone())
