"""LAMB on sharded parameters: two real processes over Gloo, FSDP2, checkpoints; the same as one process."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ops.optimizers import LAMB

STEPS = 3


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    # Seven rows on two processes, and tensors of one row: one process has less, or nothing.
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1)).to(dtype)


def train(model: nn.Module, optimizer: LAMB, first: int, last: int) -> None:
    for step in range(first, last):
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        (model(inputs) ** 2).mean().backward()
        optimizer.step()


def rank_main(rank: int, store: str, foreach: bool, dtype: torch.dtype) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    alone, model = network(dtype), network(dtype)
    fully_shard(model)
    optimizer = LAMB(model.parameters(), lr=0.05, weight_decay=0.1, foreach=foreach)
    single = LAMB(alone.parameters(), lr=0.05, weight_decay=0.1, foreach=foreach)
    train(model, optimizer, 0, STEPS)
    train(alone, single, 0, STEPS)
    saved = get_optimizer_state_dict(model, optimizer)
    again = LAMB(model.parameters(), lr=0.01, foreach=foreach)
    set_optimizer_state_dict(model, again, saved)
    train(model, again, STEPS, STEPS + 2)
    train(alone, single, STEPS, STEPS + 2)
    limit = 16 * torch.finfo(dtype).eps
    for mine, whole in zip(model.parameters(), alone.parameters(), strict=True):
        assert isinstance(mine, DTensor)
        torch.testing.assert_close(mine.full_tensor(), whole.detach(), rtol=limit, atol=limit)
    for mine, whole in zip(again.trust_ratios().values(), single.trust_ratios().values(), strict=True):
        assert abs(mine - whole) <= limit * whole
    dist.destroy_process_group()


def test_sharded_parameters_are_measured_whole(tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for foreach, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        mp.spawn(rank_main, (str(tmp_path / f"store{foreach}"), foreach, dtype), nprocs=2)
