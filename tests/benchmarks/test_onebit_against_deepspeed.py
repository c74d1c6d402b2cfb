"""What stands beside DeepSpeed: how losses are compared, the stand-in for CuPy, one line where it is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib import util

import numpy as np
import pytest
import torch

from benchmarks import deepspeed_onebit
from benchmarks.onebit_against_deepspeed import CASES, KINDS, Plan, compared, options_of, order
from tests.conftest import PYTHONPATH, ROOT

PLAN = Plan("cpu", "fp32", steps=60, warmup=24, seeds=2, store="", result="")


def test_a_row() -> None:
    theirs = [[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.2, 1.4]]
    ours = [[4.0, 3.0 + 1e-9, 2.3, 1.0], [4.0, 3.0, 2.1, 1.5]]
    row = compared(ours, theirs, warmup=1, near=1e-6)
    assert row["equal steps"] == 2
    assert row["warm-up"] == pytest.approx(1e-9, rel=1e-3)
    assert row["then"] == pytest.approx(0.3)
    assert row["of means"] == pytest.approx((0.1 + 0.05) / 2)
    assert row["seeds"] == pytest.approx((0.2 + 0.4) / 2**0.5 / 2)
    assert (row["start"], row["end"], row["DeepSpeed's"]) == pytest.approx((4.0, 1.25, 1.2))


def test_losses_that_stay_equal() -> None:
    row = compared([[2.0, 1.0, 0.5]] * 2, [[2.0, 1.0, 0.5]] * 2, warmup=1, near=1e-6)
    assert row["equal steps"] == 3


def test_a_loss_that_is_no_number_is_not_equal() -> None:
    row = compared([[2.0, float("nan")]] * 2, [[2.0, float("nan")]] * 2, warmup=0, near=1e-6)
    assert row["equal steps"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_those_of_our_optimizers(kind: str) -> None:
    ours, theirs = options_of(PLAN, CASES["10"], kind)
    KINDS[kind]([torch.nn.Parameter(torch.ones(2))], **ours)
    names = ("var_freeze_step", 23) if kind == "ZeroOneAdam" else ("freeze_step", 24)
    assert theirs[names[0]] == names[1]
    assert set(ours) - set(theirs) == {"bias_correction"}


def test_each_epoch_deals_every_sample_once() -> None:
    dealt = order(0, 60)
    assert dealt.shape == (60, 2)
    assert dealt[:25].flatten().sort().values.tolist() == list(range(50))
    assert not torch.equal(dealt, order(1, 60))


def test_cupy_of_numpy_shares_memory_and_packs() -> None:
    cupy = deepspeed_onebit._numpy_as_cupy()
    flags = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)
    array = cupy.from_dlpack(torch.utils.dlpack.to_dlpack(flags))
    assert np.shares_memory(array, flags.numpy())
    packed = cupy.packbits(array)
    assert packed.tolist() == [0b10000000, 0b11000001]
    assert torch.equal(torch.from_dlpack(cupy.unpackbits(packed)), flags)
    cupy.cuda.Device(0).use()
    cupy.cuda.get_current_stream().synchronize()


@pytest.mark.parametrize(
    "name", ["onebit_against_deepspeed", "compression_against_deepspeed", "profiler_against_deepspeed"]
)
@pytest.mark.skipif(util.find_spec("deepspeed") is not None, reason="deepspeed is installed here")
def test_without_deepspeed_one_line(name: str) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: deepspeed is not importable: install deepspeed==0.19.6")
