"""Layer drop under Trainer with two real processes (DistributedDataParallel over Gloo)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.training.hf_small import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    target = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.training.hf_small", str(target), str(rank)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
    return [json.loads((target / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["plain", "checkpointing"])
def test_two_processes_learn_what_one_learns(ranks: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    one = run(tmp_path, per_device_train_batch_size=4)
    for found in ranks:
        assert found[name]["executed"] == one["executed"], "all ranks draw the gates of one process"
        assert found[name]["squares"] == pytest.approx(one["squares"], rel=1e-6)
    assert ranks[0][name]["losses"] == pytest.approx(one["losses"], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not told to look", "would wait for it: set ddp_find_unused_parameters=True in TrainingArguments"),
        ("not told to look for checkpoints", "not to look for such layers: set ddp_find_unused_parameters=True"),
        ("reentrant", 'set gradient_checkpointing_kwargs={"use_reentrant": False}'),
    ],
)
def test_settings_that_would_hang_are_told(ranks: list[dict[str, Any]], name: str, message: str) -> None:
    for found in ranks:
        assert message in found[name]["error"]
