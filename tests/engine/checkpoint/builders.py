"""Small checkpoints, whole and broken, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from engine.errors import CheckpointError

CONFIG = {"model_type": "llama", "hidden_size": 4}


def tensors() -> dict[str, Tensor]:
    """Random tensors of several dtypes and ranks, one of them empty."""
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(6, 4),
        "layers.0.norm.weight": torch.randn(4),
        "layers.0.mlp.weight": torch.randn(3, 4).to(torch.bfloat16),
        "layers.0.mlp.bias": torch.randn(3).to(torch.float16),
        "layers.1.scale": torch.tensor(2.5, dtype=torch.float64),
        "layers.1.mask": torch.tensor([True, False, True]),
        "layers.1.ids": torch.arange(5),
        "layers.1.empty": torch.empty(0, 4),
    }


def shards() -> list[dict[str, Tensor]]:
    """:func:`tensors` in three parts."""
    items = list(tensors().items())
    return [dict(items[:2]), dict(items[2:5]), dict(items[5:])]


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def single(directory: Path, values: Mapping[str, Tensor] | None = None) -> Path:
    """A directory with config.json and model.safetensors."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", CONFIG)
    safetensors.torch.save_file(dict(values or tensors()), directory / "model.safetensors")
    return directory


def single_bin(directory: Path) -> Path:
    """A directory with config.json and pytorch_model.bin."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", CONFIG)
    torch.save(tensors(), directory / "pytorch_model.bin")
    return directory


def sharded(directory: Path, suffix: str = "safetensors") -> Path:
    """A directory with config.json, three shards and their index."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", CONFIG)
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    save: Callable[[dict[str, Tensor], Path], object] = safetensors.torch.save_file if stem == "model" else torch.save
    weight_map: dict[str, str] = {}
    for number, part in enumerate(shards(), 1):
        name = f"{stem}-{number:05d}-of-00003.{suffix}"
        save(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    write_json(directory / f"{stem}.{suffix}.index.json", {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return directory


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    """Change the JSON file ``path`` in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    write_json(path, value)


def raw_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    """A safetensors file with just this header (JSON, or bytes as they are) and these bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refused(call: Callable[[], object], *parts: str) -> str:
    """The message of the ``CheckpointError`` that ``call`` raises: one line that contains each of ``parts``."""
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, f"{part!r} not in: {message}"
    return message
