"""``.bin`` files: nothing in them runs, and what is no plain dictionary of tensors is refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import open_checkpoint
from engine.checkpoint.bin_file import BinFile
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import refused


class Exploit:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_does_not_run(zipped: bool, tmp_path: Path) -> None:
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Exploit(marker)}, path, _use_new_zipfile_serialization=zipped)
    refused(
        lambda: BinFile(path), str(path), "posix.system", "a pickle is not run", "save_pretrained() writes safetensors"
    )
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the exploit works where pickles are run, so the test above proves something"


def test_the_map_is_shared_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.full((64,), 3.0)}, path)
    tensor = BinFile(path).tensor("a")
    content = path.read_bytes()
    at = content.index(torch.full((64,), 3.0).numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(torch.tensor([5.0]).numpy().tobytes())
    assert tensor[0].item() == 5.0


def test_the_old_format_is_read_and_said_to_take_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = builders.single_bin(tmp_path / "model") / "pytorch_model.bin"
    torch.save(builders.tensors(), path, _use_new_zipfile_serialization=False)
    with caplog.at_level(logging.WARNING, "slipstream.checkpoint"):
        source = open_checkpoint(str(path.parent)).source
    assert "cannot be memory-mapped" in caplog.text
    assert all(torch.equal(source.read(name), tensor) for name, tensor in builders.tensors().items())


def test_parameters_and_tied_tensors(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    weight = torch.nn.Parameter(torch.randn(3, 2))
    torch.save({"a": weight, "b": weight}, path)
    file = BinFile(path)
    assert list(file.names()) == ["a", "b"]
    assert not file.tensor("a").requires_grad
    assert torch.equal(file.tensor("b"), weight.detach())


CONTENTS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a list": ([torch.ones(1)], ("must hold a dictionary of tensors, holds list",)),
    "a tensor": (torch.ones(1), ("holds Tensor",)),
    "nested": ({"state_dict": {"a": torch.ones(1)}}, ("state_dict: a dictionary inside the dictionary",)),
    "a number": ({"a": torch.ones(1), "epoch": 3}, ("epoch: a int where a tensor must be",)),
    "a key that is no name": ({3: torch.ones(1)}, ("3: a Tensor",)),
    "sparse": ({"a": torch.ones(2, 2).to_sparse()}, ("a: not a plain dense tensor", "sparse_coo")),
    "complex": ({"a": torch.ones(2, dtype=torch.complex64)}, ("a: not a plain dense tensor", "complex64")),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_contents_that_are_no_weights(case: str, tmp_path: Path) -> None:
    content, parts = CONTENTS[case]
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    refused(lambda: BinFile(path), str(path), *parts)


@pytest.mark.parametrize("zipped", [True, False])
def test_every_truncation_is_noticed(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(builders.tensors(), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        refused(lambda: BinFile(path), str(path))


FILES = {
    b"": "empty (0 bytes)",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"<html>not found</html>": "an HTML or XML page",
    b"plain text": "something else",
}


@pytest.mark.parametrize("content", FILES, ids=range(len(FILES)))
def test_what_is_no_file_of_torch_save(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    refused(lambda: BinFile(path), str(path), FILES[content])


def test_half_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    directory = builders.sharded(tmp_path / "model", "bin")
    name = "pytorch_model-00002-of-00003.bin"
    (directory / name).unlink()
    refused(lambda: open_checkpoint(str(directory)), "pytorch_model.bin.index.json", f"1 of them missing: {name}")
    (directory / "pytorch_model.bin.index.json").unlink()
    refused(lambda: open_checkpoint(str(directory)), "pytorch_model.bin.index.json is missing", name)
