"""Packed CPU weights against the plain product, and which weights are packed how."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops.eager import cpu_linear
from ops.eager.cpu_linear import Blocked, HalfPacked, exact_scale, pack_for_cpu
from ops.eager.linear import linear
from ops.quantization.reference import dequantize, quantize
from ops.weights import Linear
from tests.ops.specs import assert_near, noise

SHAPES = [(1, 1), (3, 5), (48, 33), (7, 576), (257, 64), (96, 1)]


def half_exact(out: int, inner: int) -> Tensor:
    return (noise(out, inner) * 0.02).bfloat16().float()


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33, 130])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["half", "fp32", "bf16", "fp16"])
def test_the_product_is_that_of_the_plain_weight(kind: str, shape: tuple[int, int], rows: int) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    weight = half_exact(*shape) if kind == "half" else noise(*shape, dtype=dtype)
    bias = noise(shape[0], dtype=dtype, seed=4)
    x = noise(rows, shape[1], dtype=dtype, seed=9)
    ours = linear(x, Linear(pack_for_cpu(weight), bias))
    assert ours.dtype == dtype
    assert_near(ours, F.linear(x.double(), weight.double(), bias.double()), dtype, shape[1])
    bare = linear(x, Linear(pack_for_cpu(weight), bias), bias=False)
    assert_near(bare, F.linear(x.double(), weight.double()), dtype, shape[1])


def test_strided_rows() -> None:
    x = noise(6, 48)[:, ::2]
    for weight in (half_exact(20, 24), noise(20, 24, seed=2)):
        packed = pack_for_cpu(weight)
        assert not isinstance(packed, Tensor)
        assert_near(packed.apply(x), x.double() @ weight.double().t(), torch.float32, 24)


def test_bf16_checkpoints_in_fp32_are_read_as_fp16() -> None:
    packed = pack_for_cpu(half_exact(64, 32))
    assert isinstance(packed, HalfPacked) == cpu_linear.half_works()


def test_weights_that_fp16_would_round_are_not() -> None:
    assert not isinstance(pack_for_cpu(noise(64, 32)), HalfPacked)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([0.0, 0.0], 1.0),
        ([1.0, -2.5], 1.0),
        ([2.0**-30, 2.0**-25], 2.0**38),
        ([1e5, 1.0], None),
        ([65536.0, 32768.0], 2.0**-3),
        ([1.0, 1.0 + 2**-12], None),
        ([float("inf"), 1.0], None),
        ([float("nan"), 1.0], None),
    ],
)
def test_exact_scale(values: list[float], scale: float | None) -> None:
    found = exact_scale(torch.tensor([values]))
    assert found == scale
    if found is not None:
        scaled = torch.tensor([values]) * found
        assert torch.equal(scaled.half().float(), scaled)


def test_a_shared_fp32_weight_is_not_copied() -> None:
    """The tied head's table stays for the lookup: a second fp32 copy of it would cost more than it gains."""
    weight = noise(64, 32)
    packed = pack_for_cpu(weight, shared=True)
    held = packed.weight if isinstance(packed, Blocked) else packed
    assert isinstance(held, Tensor)
    assert held.data_ptr() == weight.data_ptr()
    half = noise(64, 32, dtype=torch.bfloat16)
    assert pack_for_cpu(half, shared=True) is half


def test_an_empty_weight_is_left_alone() -> None:
    weight = torch.zeros(0, 8)
    assert pack_for_cpu(weight) is weight


def test_without_the_packed_operators_the_plain_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "half_works", lambda: False)
    monkeypatch.setattr(cpu_linear, "blocked_works", lambda dtype: False)
    weight = half_exact(8, 8)
    assert pack_for_cpu(weight) is weight


def test_a_probe_that_gives_wrong_products_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    assert not cpu_linear._probe("a broken product", lambda x, w: F.linear(x, w) + 1, torch.float32)
    assert "wrong products" in caplog.text


def test_a_probe_that_fails_is_not_used() -> None:
    def absent(x: Tensor, weight: Tensor) -> Tensor:
        raise RuntimeError("no such operator\nand more")

    assert not cpu_linear._probe("an absent product", absent, torch.float32)


def test_a_quantized_weight_is_dequantized() -> None:
    quantized = quantize(noise(12, 40), bits=4, group_size=16, symmetric=False)
    x = noise(3, 40, seed=5)
    assert torch.equal(linear(x, Linear(quantized)), F.linear(x, dequantize(quantized, torch.float32)))
