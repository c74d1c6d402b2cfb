"""Broken safetensors files: one clear line each, and never anything but ``CheckpointError``."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import open_checkpoint
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.errors import CheckpointError
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import raw_safetensors, refused


def f32(begin: int, end: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[Any, int, tuple[str, ...]]] = {
    "not JSON": (b'{"a": ', 0, ("header: not JSON", "line 1, column 7")),
    "not UTF-8": (b'{"\xff": 1}', 0, ("header: not UTF-8",)),
    "an array": ([1], 0, ("header: must be a JSON object",)),
    "a name twice": (b'{"a": 1, "a": 1}', 0, ("'a' appears twice",)),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, ("a: the header must give its dtype",)),
    "not an object": ({"a": 3}, 0, ("a: the header must give its dtype",)),
    "negative shape": ({"a": f32(0, 4, [-1])}, 4, ("a: bad header", "[-1]")),
    "boolean shape": ({"a": f32(0, 4, [True])}, 4, ("a: bad header", "[True]")),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 4, ("a: bad header",)),
    "backward offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, 4, ("a: shape [1]", "give -4")),
    "unknown dtype": (
        {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}},
        4,
        ("a: dtype 'F4' is not supported", "BF16", "convert"),
    ),
    "dtype of another type": ({"a": {"dtype": [1], "shape": [1], "data_offsets": [0, 4]}}, 4, ("dtype [1]",)),
    "shape too large": ({"a": f32(0, 4, [2])}, 4, ("a: shape [2] of F32 takes 8 bytes", "give 4")),
    "shape absurd": ({"a": f32(0, 4, [2**62, 2**62])}, 4, ("a: shape", "takes")),
    "overlap": ({"a": f32(0, 8), "b": f32(4, 12)}, 12, ("b: overlaps a",)),
    "out of the file": ({"a": f32(0, 8)}, 4, ("a: ends at byte 8", "the file has 4", "fetch the file again")),
    "gap": ({"a": f32(0, 4), "b": f32(8, 12)}, 12, ("b: 4 bytes before it belong to no tensor",)),
    "bytes left over": ({"a": f32(0, 4)}, 9, ("5 bytes at its end",)),
}


@pytest.mark.parametrize("case", HEADERS)
def test_bad_header(case: str, tmp_path: Path) -> None:
    header, size, parts = HEADERS[case]
    path = raw_safetensors(tmp_path / "model.safetensors", header, bytes(size))
    refused(lambda: SafetensorsFile(path), str(path), *parts)


FILES: dict[bytes, tuple[str, ...]] = {
    b"": ("empty (0 bytes)",),
    b"abc": ("not a safetensors file", "3 bytes"),
    struct.pack("<Q", 1 << 50) + b"{}": ("not a safetensors file", "1,125,899,906,842,624 bytes"),
    struct.pack("<Q", 100) + b"{}": ("cut off inside its header", "100 bytes"),
    struct.pack("<Q", 0): ("header: not JSON",),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 3\n": ("Git LFS pointer", "git lfs pull"),
    b"<!DOCTYPE html><html><body>404</body></html>": ("an HTML or XML page", "download the file again"),
    b"\n <HTML><body>404</body></html>": ("an HTML or XML page",),
    b"PK\x03\x04" + bytes(20): ("a zip archive", "pytorch_model.bin"),
    b"\x80\x02}q\x00.": ("a Python pickle",),
    b"GGUF\x03\x00\x00\x00": ("a GGUF file", "gguf_file"),
    b"just some words, no weights": ("not a safetensors file",),
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_what_is_no_safetensors_file(content: bytes, tmp_path: Path) -> None:
    directory = builders.single(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(content)
    refused(lambda: open_checkpoint(str(directory)), str(directory / "model.safetensors"), *FILES[content])


@pytest.mark.parametrize("first", [b"\x80", b"<", b"P", b"G", b"v"])
def test_a_length_that_begins_like_another_format(first: bytes, tmp_path: Path) -> None:
    """The first byte of a good file is the low byte of its header's length: any byte at all."""
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header += b" " * ((first[0] - len(header)) % 256)
    path = raw_safetensors(tmp_path / "model.safetensors", header, bytes(4))
    assert path.read_bytes()[:1] == first
    assert SafetensorsFile(path).tensor("a").tolist() == [0.0]


def test_a_file_that_is_a_directory(tmp_path: Path) -> None:
    builders.write_json(tmp_path / "config.json", builders.CONFIG)
    (tmp_path / "model.safetensors").mkdir()
    refused(lambda: open_checkpoint(str(tmp_path)), "model.safetensors", "not a regular file")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = (builders.single(tmp_path / "model") / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        refused(lambda: SafetensorsFile(path), str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=3))
def test_random_damage_is_refused_or_read(changes: list[tuple[int, int]], tmp_path: Path) -> None:
    """Damage may turn one valid file into another; what it may not do is raise anything else or crash."""
    original = tmp_path / "whole" / "model.safetensors"
    if not original.exists():
        builders.single(original.parent)
    content = bytearray(original.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        file = SafetensorsFile(path)
        for name in file.names():
            assert tuple(file.tensor(name).shape) == file.shape(name)
            assert file.tensor(name).dtype == file.dtype(name)
