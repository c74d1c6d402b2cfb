"""Partial sums: two ranks that each hold half of the heads and half of the feed-forward give what one process gives."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import StateDictSource
from engine.inference.runner import Runner
from ops.collective import Collective, SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.spec import HeadSpec, LearnedPositions, ModelSpec
from tests.ops.specs import noise, spec

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "pre-norm": {"final_norm": True, "gated": True, "out_bias": True, "ffn_bias": True, "qkv_bias": True},
    "post-norm": {
        "placement": "post",
        "norm": "layernorm",
        "embedding_norm": True,
        "out_bias": True,
        "ffn_bias": True,
        "positions": LearnedPositions(20),
        "causal": False,
    },
}


class Meeting:
    """Two virtual ranks in two threads that add up what each brings."""

    def __init__(self) -> None:
        self.parts: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(2, timeout=20)

    def rank(self, number: int) -> Collective:
        return _Rank(self, number)


class _Rank:
    size = 2

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    def reduce(self, partial: Tensor) -> Tensor:
        self.meeting.parts[self.rank] = partial
        self.meeting.barrier.wait()
        total = self.meeting.parts[0] + self.meeting.parts[1]
        self.meeting.barrier.wait()
        return total


def weights_of(one: ModelSpec) -> dict[str, Tensor]:
    shapes = one.weight_shapes().items()
    return {
        name: noise(*shape, seed=i) * 0.3 + (1 if "norm.weight" in name else 0)
        for i, (name, shape) in enumerate(shapes)
    }


def half(one: ModelSpec, weights: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A rank's share: rows of q, k, v, gate and up, columns of out and down; biases behind a reduce whole."""
    found = {}
    for name, weight in weights.items():
        part = name.split(".")[-2]
        if part in ("q", "k", "v", "gate", "up"):
            weight = weight.chunk(2)[rank]
        elif part in ("out", "down") and name.startswith("layers") and name.endswith("weight"):
            weight = weight.chunk(2, dim=1)[rank]
        found[name] = weight.contiguous()
    return found


def run(one: ModelSpec, weights: dict[str, Tensor], group: Collective) -> Tensor:
    kernels = EagerKernels()
    packed = kernels.pack(one, StateDictSource(weights), CPU, torch.float32)
    with torch.inference_mode():
        outputs = Runner(one, packed, kernels, CPU, group).whole([[1, 2, 3, 4, 5], [6, 7]]).outputs
    assert outputs is not None
    return outputs


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_what_one_gives(model: str) -> None:
    one = spec(**MODELS[model], head=HeadSpec(task="causal_lm", outputs=50))
    weights = weights_of(one)
    whole = run(one, weights, SingleProcess())
    share = replace(one, heads=3, kv_heads=1, ffn=20)
    meeting = Meeting()
    found: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        found[rank] = run(share, half(one, weights, rank), meeting.rank(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], whole, atol=1e-5 * float(whole.abs().max()))


def test_one_process_returns_its_input() -> None:
    tensor = noise(3)
    group = SingleProcess()
    assert group.reduce(tensor) is tensor
    assert (group.rank, group.size) == (0, 1)
