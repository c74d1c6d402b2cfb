"""Shared by the whole suite: one thread a worker, no network, the demo's real models."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester", "tests.plugins.house_report"]

ROOT = Path(__file__).resolve().parent.parent
#: Where other processes find our packages, and then whatever this one was told.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

# Before anything imports torch. With several workers, threads of each would only fight over the same cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that reaches for the hub by mistake fails at once instead of waiting for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _demo_model(name: str) -> Path:
    """The directory of a demo model; missing is a failure, unless SLIPSTREAM_OFFLINE=1 says that it cannot be had."""
    directory = ROOT / "build" / "models" / name
    if (directory / "config.json").is_file():
        return directory
    if os.environ.get("SLIPSTREAM_OFFLINE") == "1":
        pytest.skip(f"SLIPSTREAM_OFFLINE=1, and {directory} is not there")
    pytest.fail(f"{directory} is not there. Run `make models` (or set SLIPSTREAM_OFFLINE=1 to skip these tests)")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct: a causal LM of the Llama family, bf16 safetensors, with a chat template."""
    return _demo_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2: a sentence encoder of the BERT family, fp32 safetensors."""
    return _demo_model("all-MiniLM-L6-v2")
