"""MoQ on two processes: the eigenvalues, the schedule and the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PYTHONPATH
from tests.engine.training import moq_ranks


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", moq_ranks.__file__]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first == second
    assert first["mean"] == [1.5]
    for run in moq_ranks.RUNS:
        losses, shares, stages = moq_ranks.trained(run)
        found = first[run]
        rel = 2e-2 if run == "fp16" else 1e-4
        assert found[0] == pytest.approx(losses, rel=rel), run
        assert found[1] == pytest.approx(shares, rel=10 * rel), run
        assert found[2] == stages, run
        assert len({period for _, period in stages}) > 1, "some were stretched"
