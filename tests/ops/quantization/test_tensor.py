from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from config_schema.errors import SlipstreamError
from ops.quantization import QuantizationError, QuantizedTensor, dequantize, pack_nibbles, quantize, unpack_nibbles

KINDS = [(bits, symmetric) for bits in range(1, 9) for symmetric in (True, False)]


def random_tensor(out: int, inner: int, bits: int, group_size: int | None, symmetric: bool) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(out * 1000 + inner * 10 + bits)
    weight = torch.randn(out, inner, generator=generator)
    return quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric)


def assert_same(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert (left.bits, left.group_size, left.shape) == (right.bits, right.group_size, right.shape)
    for a, b in ((left.values, right.values), (left.scales, right.scales), (left.zero_points, right.zero_points)):
        if a is None or b is None:
            assert a is b
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# ==== Nibbles ====


def test_first_column_is_in_the_low_nibble_and_an_odd_tail_is_padded_with_zero() -> None:
    packed = pack_nibbles(torch.tensor([[1, 2, 15], [-8, -1, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0x21, 0x0F], [0xF8, 0x07]]
    assert packed.dtype == torch.uint8


def test_nibbles_are_read_as_twos_complement_only_if_signed() -> None:
    every = torch.tensor([[low | high << 4 for high in range(16) for low in range(16)]], dtype=torch.uint8)
    pairs = [(low, high) for high in range(16) for low in range(16)]
    unsigned = [nibble for pair in pairs for nibble in pair]
    assert unpack_nibbles(every, 512, signed=False).tolist() == [unsigned]
    assert unpack_nibbles(every, 512, signed=True).tolist() == [[n - 16 if n >= 8 else n for n in unsigned]]


@given(st.integers(0, 5), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_unpack_inverts_pack(out: int, inner: int, signed: bool, seed: int) -> None:
    low, dtype = (-8, torch.int8) if signed else (0, torch.uint8)
    integers = torch.randint(low, low + 16, (out, inner), generator=torch.Generator().manual_seed(seed)).to(dtype)
    unpacked = unpack_nibbles(pack_nibbles(integers), inner, signed=signed)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, integers)


# ==== Consistency ====


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_storage_dtypes_follow_bits_and_symmetry(bits: int, symmetric: bool) -> None:
    tensor = random_tensor(3, 7, bits, 4, symmetric)
    assert tensor.packed == (bits <= 4)
    assert tensor.values.shape == ((3, 4) if bits <= 4 else (3, 7))
    assert tensor.values.dtype == (torch.int8 if symmetric and bits > 4 else torch.uint8)
    assert tensor.integers().dtype == (torch.int8 if symmetric else torch.uint8)
    assert tensor.groups == 2
    assert tensor.symmetric == symmetric
    assert tensor.nbytes == (12 if bits <= 4 else 21) + 3 * 2 * 2 + (0 if symmetric else 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, "0 bits"),
        ({"bits": 9}, "9 bits"),
        ({"shape": (3, 0)}, "at least one column"),
        ({"shape": (-1, 10)}, "at least one column"),
        ({"shape": (3, 12)}, "values is"),
        ({"shape": (4, 10)}, "values is"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": 2}, "scales is"),
        ({"group_size": None}, "scales is"),
        ({"bits": 8}, "values is"),
        ({"values": torch.zeros(3, 5, dtype=torch.int8)}, "values is"),
        ({"scales": torch.zeros(3, 3, dtype=torch.float64)}, "scales is"),
        ({"scales": torch.zeros(3, 4)}, "scales is"),
        ({"zero_points": torch.zeros(3, 1, dtype=torch.uint8)}, "zero_points is"),
        ({"zero_points": torch.zeros(3, 3)}, "zero_points is"),
        ({"scales": torch.zeros(3, 3, device="meta")}, "scales is on meta"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    tensor = random_tensor(3, 10, 4, 4, symmetric=True)
    with pytest.raises(QuantizationError, match=message) as caught:
        replace(tensor, **changes)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SlipstreamError)


def test_to_moves_every_part() -> None:
    moved = random_tensor(3, 10, 4, 4, symmetric=False).to("meta")
    assert moved.device.type == "meta"
    assert moved.zero_points is not None
    assert moved.zero_points.device.type == "meta"


# ==== Slices ====


@given(
    st.integers(1, 6), st.integers(1, 30), st.sampled_from(KINDS), st.one_of(st.none(), st.integers(1, 9)), st.data()
)
def test_slices_dequantize_to_the_slices_of_the_whole(
    out: int, inner: int, kind: tuple[int, bool], group_size: int | None, data: st.DataObject
) -> None:
    tensor = random_tensor(out, inner, kind[0], group_size, kind[1])
    whole = dequantize(tensor)
    start = data.draw(st.integers(0, out))
    stop = data.draw(st.integers(start, out))
    assert torch.equal(dequantize(tensor.rows(start, stop)), whole[start:stop])
    step = 1 if tensor.groups == 1 else tensor.group_size
    assert step is not None
    left = step * data.draw(st.integers(0, (inner - 1) // step))
    right = data.draw(st.integers(left + 1, inner))
    part = tensor.columns(left, right)
    assert torch.equal(dequantize(part), whole[:, left:right])
    index = torch.tensor(data.draw(st.lists(st.integers(0, out - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(dequantize(tensor.select_rows(index)), whole[index])


def test_a_column_slice_owns_its_memory_and_clears_the_nibble_behind_its_end() -> None:
    tensor = QuantizedTensor.from_integers(torch.full((1, 6), 7), torch.ones(1, 2), None, bits=4, group_size=3)
    assert tensor.columns(0, 3).values.tolist() == [[0x77, 0x07]]
    eight = random_tensor(2, 8, 8, 4, symmetric=True)
    part = eight.columns(4, 8)
    assert part.values.is_contiguous()
    assert part.values.untyped_storage().nbytes() == 8


def test_a_row_slice_is_a_view() -> None:
    tensor = random_tensor(6, 8, 4, 4, symmetric=True)
    assert tensor.rows(2, 4).values.data_ptr() == tensor.values[2:].data_ptr()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.columns(1, 8), "multiple of 4"),
        (lambda t: t.columns(4, 11), r"do not lie in .* 10 columns"),
        (lambda t: t.columns(4, 4), "at least one column"),
        (lambda t: t.rows(2, 1), "rows"),
        (lambda t: t.rows(-1, 2), "rows"),
        (lambda t: t.rows(0, 4), "3 rows"),
        (lambda t: t.select_rows(torch.zeros(2, 2, dtype=torch.int64)), "one dimension"),
    ],
)
def test_slices_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        call(random_tensor(3, 10, 4, 4, symmetric=True))


# ==== Files ====


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), [(1, True), (3, False), (4, True), (8, True), (6, False)])
def test_a_file_gives_back_every_bit(tmp_path: Path, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    weights = {name: torch.randn(5, 21) for name in ("layers.0.up.weight", "layers.1.up.weight")}
    saved = {
        name: quantize(weight, bits=bits, group_size=8, symmetric=symmetric, scale_dtype=scale_dtype)
        for name, weight in weights.items()
    }
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name, tensor in saved.items():
        tensors |= tensor.to_tensors(name)
        metadata |= tensor.to_metadata(name)
    save_file(tensors, path, metadata=metadata)
    stored = read(path)
    for name, tensor in saved.items():
        assert_same(QuantizedTensor.from_tensors(name, *stored), tensor)


def test_a_slice_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "rank1.safetensors"
    part = random_tensor(6, 12, 4, 4, symmetric=False).rows(3, 6).columns(4, 12)
    save_file(part.to_tensors("w"), path, metadata=part.to_metadata("w"))
    assert_same(QuantizedTensor.from_tensors("w", *read(path)), part)


def test_the_documented_layout() -> None:
    tensor = random_tensor(3, 10, 4, 4, symmetric=False)
    assert set(tensor.to_tensors("a.b")) == {"a.b.qvalues", "a.b.scales", "a.b.zero_points"}
    assert set(random_tensor(3, 10, 4, 4, symmetric=True).to_tensors("a.b")) == {"a.b.qvalues", "a.b.scales"}
    assert {key: json.loads(value) for key, value in tensor.to_metadata("a.b").items()} == {
        "a.b.quantization": {
            "format": "slipstream.quantized.1",
            "bits": 4,
            "group_size": 4,
            "symmetric": False,
            "shape": [3, 10],
        }
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "w: values is"),
        ({"bits": True}, "wrong type"),
        ({"bits": "4"}, "wrong type"),
        ({"group_size": 2.0}, "wrong type"),
        ({"group_size": 5}, "w: scales is"),
        ({"shape": [3, 10, 1]}, "wrong type"),
        ({"shape": "3x10"}, "wrong type"),
        ({"shape": [10, 3]}, "w: values is"),
        ({"symmetric": 0}, "wrong type"),
        ({"symmetric": True}, "w.zero_points is there"),
        ({"format": "slipstream.quantized.2"}, "not of format"),
        ({"surplus": 1}, "not of format"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    tensor = random_tensor(3, 10, 4, 4, symmetric=False)
    facts = json.loads(tensor.to_metadata("w")["w.quantization"]) | changes
    with pytest.raises(QuantizationError, match=message):
        QuantizedTensor.from_tensors("w", tensor.to_tensors("w"), {"w.quantization": json.dumps(facts)})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "have no w.quantization"),
        ({"w.quantization": "{"}, "not JSON"),
        ({"w.quantization": "[]"}, "not of format"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused_by_name(metadata: dict[str, str], message: str) -> None:
    tensor = random_tensor(3, 10, 4, 4, symmetric=False)
    with pytest.raises(QuantizationError, match=message):
        QuantizedTensor.from_tensors("w", tensor.to_tensors("w"), metadata)


@pytest.mark.parametrize("part", ["qvalues", "scales", "zero_points"])
def test_a_missing_part_is_named(part: str) -> None:
    tensor = random_tensor(3, 10, 4, 4, symmetric=False)
    tensors = tensor.to_tensors("w")
    del tensors[f"w.{part}"]
    with pytest.raises(QuantizationError, match=f"w.{part} is missing"):
        QuantizedTensor.from_tensors("w", tensors, tensor.to_metadata("w"))


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (4, False)])
def test_stacked_is_quantized_together(bits: int, symmetric: bool) -> None:
    parts = [torch.randn(rows, 20) for rows in (3, 1, 6)]
    how: dict[str, Any] = {"bits": bits, "group_size": 8, "symmetric": symmetric}
    found = QuantizedTensor.stack([quantize(part, **how) for part in parts])
    whole = quantize(torch.cat(parts), **how)
    assert found.shape == (10, 20)
    assert all(
        torch.equal(a, b) for a, b in zip(found.to_tensors("w").values(), whole.to_tensors("w").values(), strict=True)
    )


@pytest.mark.parametrize(
    "other", [{"bits": 4}, {"group_size": 4}, {"symmetric": False}, {"scale_dtype": torch.float32}]
)
def test_what_cannot_be_stacked(other: dict[str, Any]) -> None:
    how: dict[str, Any] = {"bits": 8, "group_size": 8}
    with pytest.raises(QuantizationError, match="differ in bits, group size"):
        QuantizedTensor.stack([quantize(torch.randn(2, 8), **how), quantize(torch.randn(2, 8), **{**how, **other})])


def test_a_copy_has_memory_of_its_own() -> None:
    one = quantize(torch.randn(2, 8), bits=8, group_size=8, symmetric=False)
    copy = one.to("cpu", copy=True)
    assert one.to("cpu").values.data_ptr() == one.values.data_ptr()
    for part in ("values", "scales", "zero_points"):
        assert getattr(copy, part).data_ptr() != getattr(one, part).data_ptr()
        assert torch.equal(getattr(copy, part), getattr(one, part))
