"""Objects with state and small tools for the tests of checkpoints."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.errors import CheckpointError
from engine.training.checkpoint import Checkpoints
from engine.training.random_state import RandomState
from tests.conftest import ROOT


class Box:
    """An object with any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state["state"]


def run(width: int = 4, extra: bool = False) -> dict[str, Any]:
    """A model with dropout and batch norm, AdamW, a schedule with a Counter in its state, random numbers."""
    layers: list[nn.Module] = [nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1)]
    model = nn.Sequential(*layers, *([nn.Linear(1, 1)] if extra else []))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "random": RandomState()}


def train(things: dict[str, Any], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        noise = random.gauss(0, 1) + float(np.random.randn())  # both make two numbers and keep one
        loss = (things["model"](torch.randn(5, 3)) - noise).square().mean()
        things["optimizer"].zero_grad()
        loss.backward()
        things["optimizer"].step()
        things["schedule"].step()
        losses.append(loss.item())
    return losses


def saved_box(directory: Path, *steps: int, keep: int = 3) -> Checkpoints:
    """A checkpoint for each step, whose object holds the step and a tensor of it."""
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, {"box": Box({"step": step, "tensor": torch.full((1000,), float(step))})})
    return checkpoints


def restored_box(checkpoints: Checkpoints, step: int | None = None) -> int:
    box = Box()
    found = checkpoints.restore({"box": box}, step)
    assert box.state["step"] == found
    assert box.state["tensor"].tolist() == [found] * 1000
    return found


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def refused(call: Callable[[], object], *words: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as found:
        call()
    message = str(found.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our lines of the log; torch writes others."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("slipstream")]


def python(code: str, *arguments: str, **keywords: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **keywords)


def sign(path: Path) -> None:
    """Makes the manifest fit the files, as someone who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["crc32"]
    for name, facts in manifest["files"].items():
        data = (path / name).read_bytes()
        facts.update(size=len(data), crc32=zlib.crc32(data))
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, separators=(",", ":")).encode())
    (path / "manifest.json").write_text(json.dumps(manifest))
