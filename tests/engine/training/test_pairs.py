"""Every pair of training's features does what both say: what docs/training.md promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from tests.conftest import PYTHONPATH
from tests.engine.training import pairs
from tests.engine.training.pairs import EXACT, PAIRS, ROUNDED, SPREAD, losses

alone = cache(losses)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """What two processes found."""
    target = tmp_path_factory.mktemp("pairs") / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", pairs.__file__]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(target)], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, tuple[list[float], list[float]]] = json.loads(target.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=" ".join)
def test_pair(pair: tuple[str, str], request: pytest.FixtureRequest) -> None:
    """As without those of them that change no number; in low precision about as in fp32."""
    spread = SPREAD & set(pair)
    found, layers = request.getfixturevalue("together")[" ".join(pair)] if spread else alone(*pair)
    others = [feature for feature in pair if feature not in EXACT]
    wanted, ran = alone(*others)
    low = {"bf16", "fp16"} & set(pair)
    assert found == pytest.approx(wanted, rel=1e-2 if low else 1e-5)
    if low:
        assert found == pytest.approx(alone(*(set(others) - low))[0], rel=ROUNDED)
        assert found != alone(*(set(others) - low))[0], "it was computed in low precision"
    assert layers == ran
    assert (sum(layers) < 4 * pairs.STEPS) == ("layer_drop" in pair)
    if "lamb" in pair:
        assert found[-1] != pytest.approx(alone(*(set(others) - {"lamb"}))[0][-1], rel=ROUNDED)
