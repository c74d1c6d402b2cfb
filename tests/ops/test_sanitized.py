"""The selection of ``make sanitize``: every entry finds tests, and all together they stay few."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import torch

from tests.conftest import ROOT
from tests.ops.conftest import SANITIZED, selected


def collected(marker: str) -> Counter[str]:
    """Tests of tests/ops by path and name, as pytest itself chooses them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", marker, "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests/ops"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return Counter(re.findall(r"^tests/ops/([^\[\n]+?)(?:\[.*)?$", done.stdout, re.MULTILINE))


def test_every_entry_finds_tests_and_they_are_few() -> None:
    found = collected("gpu and sanitize")
    assert set(found) == set(SANITIZED), "a test or one of its parameters has another name now"
    assert max(found.values()) <= 16
    assert sum(found.values()) <= 160
    assert not collected("sanitize") - found, "only tests on a GPU are marked"


def test_what_belongs_to_an_entry() -> None:
    name = "specialized/test_tile_gemm.py::test_product"
    wanted = {"dtype": torch.float16, "shape": (33, 17, 33), "tile": "whole", "device": "cuda"}
    assert selected(f"tests/ops/{name}[x-y]", wanted) == name
    assert selected(f"tests/ops/{name}[x-y]", {**wanted, "shape": (5, 8, 200)}) is None
    assert selected(f"tests/ops/{name}[x-y]", {"shape": (33, 17, 33)}) is None
    assert selected("tests/ops/specialized/test_tile_gemm.py::test_activations[x]", wanted) is None
    assert selected("tests/ops/generic/test_decoder.py::test_place[1-cuda]", {"rows": 1}) is not None
