"""What each process does in test_fit_ranks.py, under torchrun: ``HOME STEPS CASE...``, or ``HOME fail``."""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine import Engine
from engine.errors import EngineError
from tests.engine.training.trained import Stack, bert, config, masked

#: How the processes share the work out, layers dropped, and precision.
CASES: dict[str, tuple[str, bool, str]] = {
    "replicate": ("replicate", False, "fp32"),
    "replicate_drop": ("replicate", True, "fp32"),
    "replicate_fp16": ("replicate", False, "fp16"),
    "shard": ("shard", False, "fp32"),
    "shard_drop": ("shard", True, "fp32"),
    "shard_fp16": ("shard", False, "fp16"),
}


def rows(count: int = 24) -> list[dict[str, Any]]:
    """Samples with as many labels in each, so that the mean over processes is the mean over the batch."""
    found = [{name: value[0] for name, value in masked(1, seed).items()} for seed in range(count)]
    return [{**row, "labels": row["input_ids"]} for row in found]


def engine_of(home: Path, case: str, steps: int, together: bool) -> Engine:
    """The engine of a case that trains up to ``steps``."""
    how, drop, precision = CASES[case]
    training: dict[str, Any] = {
        "micro_batch_size": None, "accumulation_steps": 2, "train_batch_size": 8, "max_steps": steps,
        "output": str(home / case), "clip_norm": 0.5, "data_parallel": how if together else "auto",
    }  # fmt: skip
    if precision == "fp16":
        training["loss_scale"] = {"initial": 2.0**24}  # overflows a few times
    sections: dict[str, Any] = {"training": training, "precision": precision}
    if drop:
        sections["progressive_layer_drop"] = {"theta": 0.3, "gamma": 2.0}
    return Engine(config(**sections), model=bert(dropout=0.0))


class Failing:
    """Rows of which the second process cannot read the ones of its third step."""

    def __len__(self) -> int:
        return 24

    def batch(self, indices: Any, epochs: Any, seed: int) -> Any:
        """The rows, or an error."""
        self.asked = getattr(self, "asked", 0) + 1
        if dist.get_rank() == 1 and self.asked == 5:
            raise ValueError("this row is broken")
        found = [rows()[int(index)] for index in indices]
        return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def fail(home: Path) -> None:
    """The second process meets an error and does not end; the first waits for it in an exchange."""
    engine = engine_of(home, "replicate", 9, together=True)
    try:
        engine.fit(Failing())
    except ValueError:
        traceback.print_exc()
        sys.stderr.flush()
        time.sleep(120)


class Idle(Stack):
    """A model with a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = torch.nn.Linear(3, 3)


def idle(how: str, drop: bool) -> str:
    """What is said of it after three steps, which begin with other weights in each process: the first one's count."""
    sections: dict[str, Any] = {"training": {"data_parallel": how}}
    if drop:
        sections["progressive_layer_drop"] = {"gamma": 1e-9}
    model = Idle()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += dist.get_rank()
    engine = Engine(config(**sections), model=model, loss_function=lambda outputs, batch: outputs.square().mean())
    try:
        losses = [engine.train_batch({"x": torch.ones(4, 6)}).loss for _ in range(3)]
    except EngineError as error:
        return str(error)
    return f"{losses[0]:.5f}"


def main(home: Path, steps: str, *cases: str) -> None:
    """Goes on with each case, and saves it for others; then models with a layer that is not used."""
    for case in cases:
        engine = engine_of(home, case, int(steps), together=True)
        summary = engine.fit(rows(), rows(5))
        engine.save_pretrained(home / case / "saved")
        if dist.get_rank() == 0:
            facts = {"begun": summary.begun, "figures": dict(summary.figures)}
            (home / case / "two.json").write_text(json.dumps(facts), encoding="utf-8")
    said = {f"{how} {drop}": idle(how, drop) for how in ("shard", "replicate") for drop in (True, False)}
    if dist.get_rank() == 0:
        (home / "idle.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[2] == "fail":
        fail(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), *sys.argv[2:])
    dist.destroy_process_group()
