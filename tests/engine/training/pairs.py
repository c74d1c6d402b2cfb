"""Features of training, each with each: what test_pairs.py runs, and each of two processes under torchrun."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import Engine
from tests.engine.training.trained import Stack, config

#: What each feature says in a configuration.
FEATURES: dict[str, dict[str, Any]] = {
    "layer_drop": {"progressive_layer_drop": {"theta": 0.3, "gamma": 2.0}},
    "moq": {"quantize_training": {"start_bits": 7, "target_bits": 5, "quantize_period": 1}},
    "activation_checkpointing": {"training": {"activation_checkpointing": True}},
    "compile": {"training": {"compile": True}},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "training": {"loss_scale": {"initial": 256.0}}},  # no step is skipped
    "lamb": {"optimizer": {"type": "LAMB", "lr": 1e-2}},
    "replicate": {"training": {"data_parallel": "replicate"}},
    "shard": {"training": {"data_parallel": "shard"}},
}
#: Those that need several processes; those that change no number; and those that change it by their rounding.
SPREAD, EXACT, ROUNDED = {"replicate", "shard"}, {"activation_checkpointing", "compile", "replicate", "shard"}, 3e-2
#: What cannot be chosen together.
CONTRADICT = [{"bf16", "fp16"}, SPREAD, {"moq", "shard"}]
#: So many rows that layer drop scales weights, not outputs, on two processes too.
STEPS, ROWS = 5, 96

PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if set(pair) not in CONTRADICT]


def losses(*features: str) -> tuple[list[float], list[float]]:
    """Each step's loss over all processes, and layers that ran."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    base: dict[str, Any] = {"micro_batch_size": ROWS // 2 // world, "max_steps": STEPS, "clip_norm": 0.5}
    sections: dict[str, Any] = {"training": base}
    for feature in features:
        for name, section in FEATURES[feature].items():
            merged = {**sections.get(name, {}), **section} if isinstance(section, dict) else section
            sections[name] = merged
    given = config(**sections)
    if "lamb" in features:
        given["optimizer"] = FEATURES["lamb"]["optimizer"]
    engine = Engine(given, model=Stack(blocks=4), loss_function=lambda outputs, batch: outputs.square().mean())
    generator = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(STEPS):
        # Rows of a micro-batch stay together: micro-batch m of a step has the same rows on any number of processes.
        x = torch.randn(2, world, ROWS // 2 // world, 6, generator=generator)
        own = x[:, dist.get_rank() if world > 1 else 0].flatten(0, 1)
        reports.append(engine.train_batch({"x": own}))
    return [r.loss for r in reports], [r.metrics.get("layer_drop/layers", 4.0) for r in reports]


def main(target: Path) -> None:
    """Every pair that needs several processes, and what it gave or was refused with."""
    found = {}
    for pair in PAIRS:
        if SPREAD & set(pair):
            found[" ".join(pair)] = losses(*pair)
    if dist.get_rank() == 0:
        target.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
