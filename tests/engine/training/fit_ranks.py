"""What each process does in test_fit.py: HOME STEPS replicate|shard|auto DROP, under torchrun or alone."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist

from engine import Engine
from tests.engine.training.trained import bert, config, masked


def main(home: str, steps: str, how: str, drop: str) -> None:
    """Trains on the rows that all processes share out."""
    rows = [{name: value[0] for name, value in masked(1, seed).items()} for seed in range(24)]
    for row in rows:  # as many labels in each, so that the mean over processes is the mean over the batch
        row["labels"] = row["input_ids"]
    training = {
        "micro_batch_size": None, "accumulation_steps": 2, "train_batch_size": 8, "max_steps": int(steps),
        "output": home, "clip_norm": 0.5, "data_parallel": how,
    }  # fmt: skip
    sections: dict[str, Any] = {"training": training}
    if drop == "1":
        sections["progressive_layer_drop"] = {"theta": 0.3, "gamma": 2.0}
    Engine(config(**sections), model=bert(dropout=0.0)).fit(rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
