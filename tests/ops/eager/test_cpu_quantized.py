"""Quantized products on a CPU: torch's kernels and the tiles behind them, against the dequantized weight in fp64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from ops.eager import cpu_quantized
from ops.eager.cpu_quantized import FEW_ROWS, Int4Groups, Int8Rows, pack_quantized_for_cpu
from ops.eager.linear import embedded, linear, tiled_product
from ops.quantization import QuantizedTensor, dequantize, quantize
from ops.weights import Linear

BF16 = torch.bfloat16


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 7 + shape[-1]))


def error(found: Tensor, x: Tensor, weight: QuantizedTensor) -> float:
    """Largest difference from the product in fp64, of its largest element."""
    wanted = x.double() @ dequantize(weight).double().t()
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize(
    ("shape", "bits", "group", "symmetric", "kind"),
    [
        ((96, 64), 8, None, True, Int8Rows),
        ((5, 576), 8, None, True, Int8Rows),
        ((96, 72), 8, None, True, QuantizedTensor),  # torch's kernel reads past rows of 72
        ((96, 64), 8, 32, True, QuantizedTensor),
        ((96, 64), 8, None, False, QuantizedTensor),
        ((96, 64), 4, 32, True, Int4Groups),
        ((4096 + 80, 128), 4, 64, True, Int4Groups),
        ((112, 512), 4, 256, False, Int4Groups),
        ((100, 64), 4, 32, True, QuantizedTensor),
        ((96, 80), 4, 64, True, QuantizedTensor),
        ((96, 64), 4, None, True, QuantizedTensor),
        ((96, 64), 3, 32, True, Int4Groups),
    ],
)
def test_product(rows: int, shape: tuple[int, int], bits: int, group: int | None, symmetric: bool, kind: type) -> None:
    weight = quantize(noise(*shape), bits=bits, group_size=group, symmetric=symmetric, scale_dtype=BF16)
    packed = pack_quantized_for_cpu(weight, BF16)
    if cpu_quantized.int8_works() and cpu_quantized.int4_works():
        assert isinstance(packed, kind)
    x, bias = noise(rows, shape[1]).to(BF16), noise(shape[0]).to(BF16)
    found = linear(x, Linear(packed, bias), bias=False)
    assert (found.dtype, found.shape) == (BF16, (rows, shape[0]))
    # Two roundings to bf16 (2^-9 each): of the weight, and of the product.
    assert error(found, x, weight) < 2**-7
    assert torch.equal(linear(x, Linear(packed, bias)), found + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_activations_take_tiles(dtype: torch.dtype) -> None:
    weight = quantize(noise(96, 64), bits=8, group_size=None)
    assert pack_quantized_for_cpu(weight, dtype) is weight


def test_no_rows() -> None:
    for weight in (quantize(noise(96, 64), bits=8, group_size=None), quantize(noise(96, 64), bits=4, group_size=32)):
        packed = pack_quantized_for_cpu(weight, BF16)
        assert linear(torch.empty(0, 64, dtype=BF16), Linear(packed)).shape == (0, 96)


def test_tiles_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(noise(50, 24), bits=4, group_size=7, symmetric=False)
    x = noise(3, 24)
    whole = tiled_product(x, weight)
    assert error(whole, x, weight) < 1e-6
    monkeypatch.setattr("ops.eager.linear.TILE", 24 * 8)
    torch.testing.assert_close(tiled_product(x, weight), whole)


def test_the_whole_weight_is_never_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr("ops.eager.linear.TILE", 24 * 8)

    def counted(part: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        seen.append(part.shape[0])
        return dequantize(part, dtype)

    monkeypatch.setattr("ops.eager.linear.dequantize", counted)
    tiled_product(noise(3, 24), quantize(noise(50, 24), bits=4, group_size=7))
    assert seen == [8] * 6 + [2]


def test_lookup() -> None:
    table = quantize(noise(30, 24), bits=4, group_size=8)
    index = torch.tensor([4, 29, 4])
    assert torch.equal(embedded(index, table, BF16), dequantize(table, BF16)[index])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_wrong_kernel_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    works = getattr(cpu_quantized, f"{name}_works")
    right = getattr(cpu_quantized, f"_{name}_product")
    works.cache_clear()
    monkeypatch.setattr(cpu_quantized, f"_{name}_product", lambda *args: right(*args) + 1)
    try:
        with caplog.at_level(logging.WARNING):
            assert not works()
        assert "is wrong on this machine: weights are expanded" in caplog.text
        weight = quantize(noise(96, 64), bits=int(name[-1]), group_size=None if name == "int8" else 32)
        assert pack_quantized_for_cpu(weight, BF16) is weight
    finally:
        works.cache_clear()
