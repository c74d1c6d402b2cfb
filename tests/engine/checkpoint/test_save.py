"""Saving: what is written can be read by others, and a failure leaves the old file as it was."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from engine.checkpoint import save_safetensors
from engine.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import refused


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = builders.tensors() | {"a ü name": torch.arange(7, dtype=torch.int8)}
    save_safetensors(values, path)
    read = safetensors.torch.load_file(path)
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in read.items()} == {
        name: (tensor.dtype, tensor.tolist()) for name, tensor in values.items()
    }
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_that_is_read_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.tensor([0.0, 1.0, 2.0]).to(dtype)
    save_safetensors({"a": value}, tmp_path / "a.safetensors", {"step": "3"})
    read = SafetensorsFile(tmp_path / "a.safetensors").tensor("a")
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), value.view(torch.uint8))


def test_views_tied_tensors_and_parameters(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    values = {
        "a": weight,
        "b": weight,
        "transposed": weight.t(),
        "column": weight[:, 2],
        "reversed": weight.detach().flip(0),
    }
    save_safetensors(values, tmp_path / "a.safetensors")
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], value) for name, value in values.items())


def test_tensors_are_aligned(tmp_path: Path) -> None:
    save_safetensors({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64)}, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header["b"]["data_offsets"] == [0, 16]


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors({"a": torch.ones(2)}, path)
    before = path.read_bytes()
    for value in (torch.ones(1, dtype=torch.complex64), torch.ones(2, 2).to_sparse(), torch.empty(2, device="meta")):
        refused(functools.partial(save_safetensors, {"b": value}, path), str(path), "b: a torch.", "cannot be stored")
    refused(lambda: save_safetensors({"__metadata__": torch.ones(1)}, path), "__metadata__")
    assert path.read_bytes() == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 64 KiB: the kernel refuses the write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    save_safetensors({"a": torch.arange(4.0)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_half_way(old: Path) -> None:
    before = old.read_bytes()
    values = {name: torch.ones(4096) for name in "abcdefgh"}
    refused(lambda: save_safetensors(values, old), str(old), "cannot be written (13", "File too large", "unchanged")
    assert old.read_bytes() == before
    assert [entry.name for entry in old.parent.iterdir()] == [old.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_last_moment(call: str, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = old.read_bytes()
    monkeypatch.setattr(os, call, full)
    refused(lambda: save_safetensors({"a": torch.ones(9)}, old), str(old), "No space left on device", "unchanged")
    assert old.read_bytes() == before
    assert [entry.name for entry in old.parent.iterdir()] == [old.name]


def test_a_process_killed_while_it_writes(old: Path) -> None:
    """The process ends without any cleaning up, in the middle of the second tensor: the old file is there, whole."""
    before = old.read_bytes()
    code = f"""
        import os, torch
        from engine.checkpoint import save, save_safetensors
        inner, seen = save._bytes, []
        def kill(tensor):
            seen.append(tensor)
            return inner(tensor) if len(seen) == 1 else os.kill(os.getpid(), 9)
        save._bytes = kill
        save_safetensors({{"a": torch.ones(10**6), "b": torch.ones(10**6)}}, {str(old)!r})
    """
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, check=False)
    assert done.returncode == -9
    assert old.read_bytes() == before
    assert SafetensorsFile(old).tensor("a").tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_tensor_that_cannot_be_copied_leaves_nothing_behind(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.Tensor) -> memoryview:
        raise RuntimeError("CUDA error")

    before = old.read_bytes()
    monkeypatch.setattr("engine.checkpoint.save._bytes", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        save_safetensors({"a": torch.ones(9)}, old)
    assert old.read_bytes() == before
    assert [entry.name for entry in old.parent.iterdir()] == [old.name]


def test_no_such_directory(tmp_path: Path) -> None:
    refused(lambda: save_safetensors({}, tmp_path / "no" / "model.safetensors"), "No such file or directory")
