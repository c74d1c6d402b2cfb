"""Steps of optimizers over a network: real ranks over Gloo, and the bytes that leave their collectives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.optimizer_steps import OPTIMIZERS, parameters
from tests.conftest import PYTHONPATH


def test_parameters_are_those_of_bert() -> None:
    """Hugging Face's model, without its pooler."""
    from transformers import BertConfig, BertModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "vocab_size": 50}
    model = BertModel(BertConfig(**sizes, intermediate_size=96), add_pooling_layer=False)
    assert sum(p.numel() for p in parameters(2, 24, 50)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_two_ranks(kind: str) -> None:
    more = ["--local-steps", "2"] if kind == "ZeroOneAdam" else []
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
        "benchmarks.optimizer_steps", "--optimizer", kind, "--layers", "1", "--hidden", "16", "--vocabulary", "40",
        *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}, 0.0M elements" in done.stdout
    assert ("with 15% warm-up" in done.stdout) == (kind not in ("AdamW", "LAMB"))
