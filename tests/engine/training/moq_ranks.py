"""What each of two processes does in test_moq_ranks.py: trains with eigenvalues, on its own rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import Engine
from engine.training.parallel import mean_of
from tests.engine.training.trained import Stack, config

#: What each run is trained with; layers that are dropped exchange gradients in another way.
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer_drop": {"progressive_layer_drop": {"theta": 0.6, "gamma": 1.0}},
    "fp16": {"precision": "fp16", "training": {"loss_scale": {"initial": 256.0}}},
}
STEPS, ROWS = 5, 16


def trained(run: str) -> tuple[list[float], dict[str, float], list[list[int]]]:
    """Losses, eigenvalues, and each weight's bits and period."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    bits = {"start_bits": 8, "target_bits": 4, "quantize_period": 1, "rounding": "stochastic"}
    second = {"max_iter": 300, "tol": 1e-5}
    sections: dict[str, Any] = {**RUNS[run], "quantize_training": {**bits, "eigenvalue": second}}
    sizes = {"micro_batch_size": ROWS // world, "max_steps": 100}
    sections["training"] = {**sizes, **sections.get("training", {})}
    engine = Engine(config(**sections), model=Stack(), loss_function=lambda outputs, batch: outputs.square().mean())
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(2, world, ROWS // world, 6, generator=generator)
        losses.append(engine.train_batch({"x": x[:, rank].flatten(0, 1)}).loss)
    moq = engine._trainer.plan.quantize_training
    assert moq is not None
    return losses, moq.eigenvalues, [[stage.bits, stage.period] for stage in moq.stages]


def main(target: Path) -> None:
    """Each process writes what it found."""
    found: dict[str, Any] = {run: trained(run) for run in RUNS}
    found["mean"] = mean_of(torch.tensor([1.0 + dist.get_rank()])).tolist()
    (target / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
