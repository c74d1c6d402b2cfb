"""Loading keeps one copy of the weights: peak private memory under 1.15 times what is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.engine.checkpoint import builders
from tests.engine.checkpoint.gguf_builder import Sizes, write_llama

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


def loaded(directory: Path, how: str, *gguf_file: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, "-m", "tests.engine.checkpoint.load_worker", str(directory), how, *gguf_file]
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


def test_peak_while_loading_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_llama(tmp_path / "model.gguf", Sizes(vocabulary=512, hidden=1024, ffn=4096, layers=8, heads=8, kv_heads=8))
    found = loaded(tmp_path, "source", "model.gguf")
    assert found["float32"]["weights"] > 512 * MIB
    for one in found.values():
        assert one["rise"] < 1.15 * one["weights"], found


RULER = """
import json, mmap, sys, time
import psutil, torch
from tests.engine.checkpoint.memory import PeakMemory, private_bytes

path, size = sys.argv[1], 64 << 20
ours, uss = private_bytes(), psutil.Process().memory_full_info().uss
mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
mapped.sum()
found = {"read": private_bytes() - ours, "uss": psutil.Process().memory_full_info().uss - uss}
mapped.add_(1)
found["written"] = private_bytes() - ours
del mapped
with PeakMemory() as memory:
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"x" * size)
    deadline = time.monotonic() + 20
    while memory.rise < size // 2 and time.monotonic() < deadline:  # only the thread samples here
        time.sleep(0.001)
    block.close()
found["peak"], found["after"] = memory.rise, private_bytes() - memory.start
print(json.dumps(found))
"""


def test_the_ruler_counts_what_is_ours_and_not_what_is_the_files(tmp_path: Path) -> None:
    """In a process of its own: in this one the allocator holds earlier memory, and may give it back at any moment."""
    (tmp_path / "file").write_bytes(bytes(64 * MIB))
    command = [sys.executable, "-c", RULER, str(tmp_path / "file")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["read"] < 8 * MIB
    assert found["uss"] > 56 * MIB, "USS does count the file's pages, which is why it is not the ruler"
    assert found["written"] > 56 * MIB
    assert found["peak"] >= 32 * MIB
    assert found["after"] < 8 * MIB
