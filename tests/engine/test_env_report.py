"""What ``slipstream env`` says of this machine, and of machines that lack something."""

from __future__ import annotations

import builtins
import importlib.metadata
import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import build, cli, env_report


def test_the_report_is_true_of_this_machine() -> None:
    found = env_report.gather()
    assert found["torch"]["version"] == torch.__version__
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["memory_bytes"] > found["cpu"]["free_bytes"] > 0
    assert found["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert len(found["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert set(found["missing"]) == {name for name, version in found["packages"].items() if version is None}


def test_auto_is_what_the_connector_would_choose() -> None:
    auto = {choice["path"]: choice["value"] for choice in env_report.gather()["auto"]}
    assert auto == {choice.path: choice.value for choice in build.preview()}
    if not torch.cuda.is_available():
        assert auto == {"$.device": "cpu", "$.precision": "fp32", "$.kernels": "eager"}


def test_the_text_fits_80_columns_and_the_json_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("slipstream", "Python", "CPU", "memory", "torch", "GPU", "NVML", "triton", "cupy", '"auto"', "eager"):
        assert word in text
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["python"]


def test_what_is_missing_is_named_with_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("gguf", "triton", "pytorch-triton", "triton-windows"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "14.0" if name == "cupy-cuda12x" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = env_report.gather()
    assert found["packages"]["cupy"] in ("14.0", real_or_none("cupy-cuda13x"))
    assert found["packages"]["triton"] is None
    text = " ".join(env_report.as_text(found).split())
    assert "gguf not installed: GGUF checkpoints cannot be read: pip install" in text
    assert "triton not installed: the kernel sets generic and specialized need it" in text
    assert "cupy 14" in text or "cupy 13" in text


def real_or_none(name: str) -> str | None:
    try:
        return importlib.metadata.distribution(name).version
    except importlib.metadata.PackageNotFoundError:
        return None


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: what torch would say of it is put in its place."""
    facts = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=79 * 2**30, multi_processor_count=132
    )

    def busy(index: int) -> tuple[int, int]:
        if index:
            raise RuntimeError("CUDA-capable device(s) is/are busy")
        return 70 * 2**30, 79 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    gpus = env_report._gpus()
    assert [gpu["free_bytes"] for gpu in gpus] == [70 * 2**30, None]
    lines = [env_report._gpu_line(gpu) for gpu in gpus]
    assert lines == [
        "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB, 70.0 GiB free, 132 multiprocessors",
        "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB, 132 multiprocessors",
    ]


def test_no_nvml_is_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pynvml":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert env_report._nvml() == {"driver": None, "reason": "nvidia-ml-py is not installed"}
