"""What the ranks of a process group do in test_checkpoint.py: ``python -m ... RANK SIZE DIRECTORY``.

Each restores the plain checkpoint in ``plain/`` (written by one process) and what earlier, smaller groups saved, into
a model that FSDP2 shards, trains on, and saves. All ranks see the same data, so that the mean of their gradients is the
gradient that one process has.
"""

from __future__ import annotations

import errno
import random
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine.errors import EngineError
from engine.training import checkpoint_files
from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.random_state import RandomState


def objects(sharded: bool) -> dict[str, Stateful]:
    """A model whose sizes no number of ranks divides, and AdamW; always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))
    if sharded:
        fully_shard(model)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def train(things: dict[str, Stateful], first: int, steps: int) -> list[float]:
    """Losses of the steps after ``first``."""
    model, optimizer = things["model"], things["optimizer"]
    assert isinstance(model, nn.Module)
    assert isinstance(optimizer, torch.optim.Optimizer)
    found = []
    for step in range(first, first + steps):
        batch = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def reshard(source: Path, target: Path, first: int) -> None:
    """Goes on from ``source`` for two steps, sharded, and saves in ``target``."""
    things = objects(sharded=True)
    assert Checkpoints(source).restore(things) == first
    train(things, first, 2)
    Checkpoints(target).save(first + 2, things)


class Awkward(Exception):
    """Cannot be sent to another process as it is."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"of rank {rank}{why}")


class Refusing(RandomState):
    """Has no state on rank 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise Awkward(self.rank, "")
        return {}


def fail_on_one_rank(root: Path, rank: int) -> None:
    """Rank 1's disk is full: every rank says so and the earlier checkpoint stays."""
    full = checkpoint_files.NewFile.write

    def refuse(self: checkpoint_files.NewFile, data: bytes | memoryview) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        full(self, data)

    checkpoints = Checkpoints(root / "full")
    things: dict[str, Stateful] = {"random": RandomState()}
    random.seed(rank)
    checkpoints.save(1, things)
    expected = random.random()
    checkpoint_files.NewFile.write = refuse  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"No space left on device.*step 1 is still there"):
        checkpoints.save(2, things)
    checkpoint_files.NewFile.write = full  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="Awkward: of rank 1"):
        checkpoints.save(2, {"awkward": Refusing(rank)})
    assert checkpoints.latest() == 1
    checkpoints.restore(things)
    assert random.random() == expected, "each rank has its own random state back"


def main() -> None:
    """Runs as one rank."""
    rank, size, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    store = f"file://{root}/store-{size}"
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=size)
    if size == 2:
        reshard(root / "plain", root / "sharded-2", 2)
        replicated = objects(sharded=False)
        Checkpoints(root / "plain").restore(replicated)
        train(replicated, 2, 2)
        Checkpoints(root / "replicated").save(4, {**replicated, "random": RandomState()})
        fail_on_one_rank(root, rank)
    else:
        reshard(root / "sharded-2", root / "sharded-3", 4)
        Checkpoints(root / "replicated").restore({**objects(sharded=False), "random": RandomState()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
