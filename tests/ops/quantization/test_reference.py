from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ops.quantization import QuantizationError, Rounding, dequantize, fake_quantize, lookup, quantize

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDINGS: list[Rounding] = ["nearest", "stochastic"]
schemes = st.fixed_dictionaries(
    {
        "bits": st.integers(1, 8),
        "group_size": st.one_of(st.none(), st.integers(1, 20)),
        "symmetric": st.booleans(),
        "scale_dtype": st.sampled_from(DTYPES),
    }
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """[0 to 5, 1 to 40], rows of very different magnitude, among them zeros, constants and one sign only."""
    out, inner, seed = draw(st.integers(0, 5)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))
    weight = torch.randn(out, inner, generator=torch.Generator().manual_seed(seed))
    rows: list[Any] = [
        lambda row: row,
        lambda row: row * 1e-7,
        lambda row: row * 1e3,
        lambda row: row * 0,
        lambda row: row.abs(),
        lambda row: -row.abs(),
        lambda row: row[:1].expand_as(row),
    ]
    for i in range(out):
        weight[i] = draw(st.sampled_from(rows))(weight[i].clone())
    return weight


def stored_scale(exact: np.float32, dtype: torch.dtype) -> np.float32:
    """The least number of ``dtype`` that is not below ``exact``, found by walking upwards."""
    scale = torch.tensor(float(exact)).to(dtype)
    while np.float32(scale.item()) < exact:
        scale = torch.nextafter(scale, torch.tensor(float("inf"), dtype=dtype))
    return np.float32(scale.item())


def numpy_group(group: np.ndarray, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[list[int], float, int]:
    """Integers, scale and zero point of one group, from the definition, in numpy."""
    zero = np.float32(0)
    smallest, largest = min(zero, group.min()), max(zero, group.max())
    if symmetric and bits == 1:
        scale = stored_scale(np.abs(group).sum(dtype=np.float32) / np.float32(len(group)), dtype)
        steps = group / (scale or np.float32(1))
        return [1 if np.rint((step + np.float32(1)) / np.float32(2)) >= 1 else -1 for step in steps], float(scale), 0
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = stored_scale(max(largest / np.float32(high), smallest / np.float32(low)), dtype)
        point = 0
    else:
        low, high = 0, 2**bits - 1
        scale = stored_scale((largest - smallest) / np.float32(high), dtype)
        point = int(np.rint(-smallest / (scale or np.float32(1))))
    steps = np.rint(group / (scale or np.float32(1)))
    return [min(max(int(step) + point, low), high) for step in steps], float(scale), point


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("inner", "group_size"), [(12, 4), (13, 4), (5, 8), (7, None), (3, 1)])
def test_integers_scales_and_zero_points_are_those_of_the_definition(
    inner: int, group_size: int | None, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(4, inner, generator=torch.Generator().manual_seed(inner + bits))
    tensor = quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    integers = tensor.integers().tolist()
    size = group_size or inner
    for row in range(4):
        for group, start in enumerate(range(0, inner, size)):
            values = weight[row, start : start + size].numpy()
            wanted, scale, point = numpy_group(values, bits, symmetric, scale_dtype)
            assert tensor.scales[row, group].item() == scale
            assert integers[row][start : start + size] == wanted
            assert symmetric or (tensor.zero_points is not None and tensor.zero_points[row, group] == point)


@pytest.mark.parametrize(("inner", "group_size"), [(12, 4), (13, 4), (7, None)])
def test_one_symmetric_bit_is_the_sign_times_the_mean_magnitude(inner: int, group_size: int | None) -> None:
    weight = torch.randn(4, inner, generator=torch.Generator().manual_seed(inner))
    restored = dequantize(quantize(weight, bits=1, group_size=group_size, scale_dtype=torch.float32))
    for start in range(0, inner, group_size or inner):
        group, back = (w[:, start : start + (group_size or inner)] for w in (weight, restored))
        torch.testing.assert_close(back, group.sign() * group.abs().mean(1, keepdim=True))


def test_the_whole_range_is_used_and_no_more() -> None:
    """Closed forms: a ramp of all representable integers comes back unchanged, both ends included."""
    for bits in range(2, 9):
        ramp = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float32)
        for scale in (1.0, 0.25):
            signed = quantize(ramp[None] * scale, bits=bits, group_size=None, symmetric=True)
            assert signed.scales.tolist() == [[scale]]
            assert signed.integers().tolist() == [ramp.tolist()]
            unsigned = quantize(ramp[None] * scale, bits=bits, group_size=None, symmetric=False)
            assert unsigned.integers().tolist() == [(ramp - ramp[0]).tolist()]
            assert unsigned.zero_points is not None
            assert unsigned.zero_points.tolist() == [[2 ** (bits - 1)]]
            assert torch.equal(dequantize(unsigned), ramp[None] * scale)


def test_each_side_of_zero_has_its_own_reach() -> None:
    """-8 and 7 are different limits: the scale is the least that covers both."""
    weight = torch.tensor([[-8.0, 1.0], [-1.0, 7.0], [-8.0, 7.5], [-3.0, -16.0]])
    tensor = quantize(weight, bits=4, group_size=None, scale_dtype=torch.float32)
    assert tensor.scales[:, 0].tolist() == [1.0, 1.0, np.float32(7.5) / np.float32(7), 2.0]


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    weight = torch.tensor([[100.0, -100.0, 100.0, 0.5, -0.25]])
    tensor = quantize(weight, bits=8, group_size=3, scale_dtype=torch.float32)
    assert tensor.scales.tolist() == [[np.float32(100) / np.float32(127), np.float32(0.5) / np.float32(127)]]
    assert dequantize(tensor)[0, 3:].tolist() == pytest.approx([0.5, -0.25], abs=0.25 / 127)
    binary = quantize(weight, bits=1, group_size=3, scale_dtype=torch.float32)
    assert binary.scales.tolist() == [[100.0, 0.375]]


@given(weights(), schemes, st.sampled_from(ROUNDINGS))
def test_the_error_is_at_most_half_a_step_or_a_step(weight: Tensor, scheme: dict[str, Any], rounding: Rounding) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = quantize(weight, **scheme, rounding=rounding, generator=generator)
    restored = dequantize(tensor)
    size = scheme["group_size"] or weight.shape[1]
    scale = tensor.scales.double().repeat_interleave(size, 1)[:, : weight.shape[1]]
    error = (weight.double() - restored.double()).abs()
    if scheme["bits"] == 1 and scheme["symmetric"]:
        bound = weight.double().abs() + scale
    else:
        bound = scale * (0.5 if rounding == "nearest" else 1.0)
    # fp32 rounds weight / scale and, if the scale is fp32, the product: each by at most 2^-24 of the weight.
    assert bool((error <= bound + 2**-22 * weight.double().abs() + 1e-44).all())


@given(weights(), schemes, st.sampled_from(ROUNDINGS), st.sampled_from(DTYPES))
def test_fake_quantization_is_real_quantization_bit_for_bit(
    weight: Tensor, scheme: dict[str, Any], rounding: Rounding, dtype: torch.dtype
) -> None:
    weight = weight.to(dtype)
    fake = fake_quantize(weight, **scheme, rounding=rounding, generator=torch.Generator().manual_seed(1))
    real = dequantize(quantize(weight, **scheme, rounding=rounding, generator=torch.Generator().manual_seed(1)), dtype)
    assert fake.dtype == dtype
    assert torch.equal(fake.view(torch.uint8), real.view(torch.uint8))


@given(weights(), schemes)
def test_zero_stays_zero_and_rows_do_not_see_each_other(weight: Tensor, scheme: dict[str, Any]) -> None:
    whole = quantize(weight, **scheme)
    for row in range(weight.shape[0]):
        alone = quantize(weight[row : row + 1], **scheme)
        assert torch.equal(alone.values, whole.values[row : row + 1])
        assert torch.equal(alone.scales, whole.scales[row : row + 1])
    if not (scheme["bits"] == 1 and scheme["symmetric"]):
        assert bool((dequantize(whole)[weight == 0] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_group_of_zeros_has_scale_zero_and_comes_back_as_zeros(bits: int, symmetric: bool) -> None:
    weight = torch.zeros(2, 6)
    weight[0, 0] = 1.0
    tensor = quantize(weight, bits=bits, group_size=3, symmetric=symmetric)
    assert tensor.scales[:, 1].tolist() == [0.0, 0.0]
    assert torch.equal(dequantize(tensor)[1], weight[1])


def test_tiny_weights_do_not_underflow_in_an_fp16_scale() -> None:
    weight = torch.tensor([[3e-9, -2e-9], [8e-8, -5e-8]])
    tensor = quantize(weight, bits=4, group_size=None)
    assert bool((tensor.scales > 0).all())
    assert bool(((dequantize(tensor) - weight).abs() <= tensor.scales.float() / 2).all())


@pytest.mark.parametrize(
    "make", [lambda w: w.t(), lambda w: w[:, ::2], lambda w: w[::3], lambda w: w[:, :1].expand(-1, 9)]
)
def test_strides_do_not_matter(make: Any) -> None:
    weight = make(torch.randn(12, 9))
    strided, packed = (quantize(w, bits=4, group_size=4, symmetric=False) for w in (weight, weight.contiguous()))
    assert torch.equal(strided.values, packed.values)
    assert torch.equal(strided.scales, packed.scales)


@pytest.mark.parametrize("bits", range(2, 9))
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    """The mean of n draws of one weight has a standard error of at most scale / (2 sqrt(n)); 5 of them are allowed."""
    weight = torch.tensor([[-1.0, -0.3, 0.05, 0.61, 1.0]])
    draws = 4000
    generator = torch.Generator().manual_seed(bits)
    tensor = quantize(
        weight.repeat(draws, 1), bits=bits, group_size=None, symmetric=False, rounding="stochastic", generator=generator
    )
    scale = tensor.scales[0, 0].item()
    inside = weight[0, 1:4]
    assert (dequantize(tensor)[:, 1:4].mean(0) - inside).abs().max() <= 5 * scale / (2 * draws**0.5)


def test_stochastic_rounding_of_one_symmetric_bit_is_unbiased_within_the_scale() -> None:
    weight = torch.tensor([[-1.0, -0.5, 0.25, 0.5, 1.0]]).repeat(4000, 1)
    tensor = quantize(
        weight, bits=1, group_size=None, rounding="stochastic", generator=torch.Generator().manual_seed(0)
    )
    scale = tensor.scales[0, 0].item()
    assert (dequantize(tensor).mean(0) - weight[0].clamp(-scale, scale)).abs().max() <= 5 * scale / 4000**0.5


def test_stochastic_rounding_leaves_representable_weights_alone() -> None:
    ramp = torch.arange(-128.0, 128.0).repeat(200, 1)
    tensor = quantize(ramp, bits=8, group_size=None, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    assert torch.equal(dequantize(tensor), ramp)


def test_fake_quantization_goes_up_to_sixteen_bits_with_falling_error() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for symmetric in (True, False):
        errors = [
            (fake_quantize(weight, bits=bits, group_size=16, symmetric=symmetric) - weight).abs().max().item()
            for bits in range(1, 17)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inf_and_nan_are_refused_with_their_place_and_shown_by_fake_quantization(bad: float, symmetric: bool) -> None:
    weight = torch.ones(3, 8)
    weight[1, 6] = bad
    with pytest.raises(QuantizationError, match="row 1, column 6"):
        quantize(weight, bits=8, group_size=4, symmetric=symmetric)
    fake = fake_quantize(weight, bits=8, group_size=4, symmetric=symmetric)
    assert not bool(fake[1, 4:].isfinite().any())
    assert bool(fake[0].isfinite().all() & fake[1, :4].isfinite().all())


def test_a_scale_that_fp16_cannot_hold_is_refused() -> None:
    weight = torch.full((1, 4), 1e6)
    with pytest.raises(QuantizationError, match="use bfloat16 or float32"):
        quantize(weight, bits=4, group_size=None)
    assert dequantize(quantize(weight, bits=4, group_size=None, scale_dtype=torch.bfloat16))[0, 0] == pytest.approx(
        1e6, rel=2**-4
    )


@pytest.mark.parametrize(
    ("weight", "changes", "message"),
    [
        (torch.zeros(3), {}, "floating-point"),
        (torch.zeros(3, 0), {}, "floating-point"),
        (torch.zeros(3, 4, dtype=torch.int8), {}, "floating-point"),
        (torch.zeros(3, 4), {"bits": 0}, "0 bits: use 1 to 8"),
        (torch.zeros(3, 4), {"bits": 9}, "9 bits: use 1 to 8"),
        (torch.zeros(3, 4), {"group_size": 0}, "group size 0"),
        (torch.zeros(3, 4), {"rounding": "up"}, "nearest, stochastic"),
        (torch.zeros(3, 4), {"scale_dtype": torch.float64}, "float16"),
    ],
)
def test_arguments_out_of_range_are_refused(weight: Tensor, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        quantize(weight, **({"bits": 4, "group_size": 2} | changes))


def test_an_empty_out_dimension_stays_empty() -> None:
    tensor = quantize(torch.zeros(0, 7), bits=4, group_size=3)
    assert tensor.scales.shape == (0, 3)
    assert dequantize(tensor).shape == (0, 7)


def test_lookup_dequantizes_the_rows_asked_for() -> None:
    tensor = quantize(torch.randn(10, 7), bits=4, group_size=3, symmetric=False)
    index = torch.tensor([[3, 3, 0], [9, 1, 2]])
    assert torch.equal(lookup(tensor, index, torch.bfloat16), dequantize(tensor, torch.bfloat16)[index])
    assert lookup(tensor, index[:0]).shape == (0, 3, 7)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "share"), [(8, 0.27), (4, 0.145)])
def test_bytes_stay_within_the_share_of_fp32_at_group_64(bits: int, share: float, symmetric: bool) -> None:
    weight = torch.randn(96, 576)
    tensor = quantize(weight, bits=bits, group_size=64, symmetric=symmetric)
    stored = sum(part.numel() * part.element_size() for part in tensor.to_tensors("w").values())
    exact = (576 * bits // 8 + 9 * (2 if symmetric else 3)) / (4 * 576)
    assert tensor.nbytes == stored == exact * weight.numel() * 4
    assert exact <= share
