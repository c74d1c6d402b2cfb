"""How parameters are put into batches."""

from __future__ import annotations

import torch
from torch import nn

from ops.optimizers.batch import batches, ensure_state
from tests.ops.optimizers.test_lamb import parameters, set_gradients


def sizes(params: list[nn.Parameter], limit: int) -> list[list[int]]:
    set_gradients(params, 0)
    states: list[dict] = [{} for _ in params]
    for state, param in zip(states, params, strict=True):
        ensure_state(state, param)
    return [[param.numel() for param in batch.params] for batch in batches(params, states, limit)]


def test_a_batch_holds_as_much_as_the_limit_allows() -> None:
    params = parameters([(60,), (40,), (1,), (0,), (500,), (5,), (5,)])
    assert sizes(params, 100) == [[60, 40], [1], [500], [5, 5]]
    assert sizes(params, 0) == [[60], [40], [1], [500], [5], [5]]
    assert sizes(params, 10**6) == [[60, 40, 1, 500, 5, 5]]
    assert sizes(parameters([(5,), (500,)]), 100) == [[5], [500]]
    assert sizes(parameters([(0,)]), 100) == []


def test_dtypes_do_not_mix() -> None:
    params = [*parameters([(3,)]), *parameters([(4,)], torch.bfloat16), *parameters([(5,)])]
    assert sizes(params, 100) == [[3, 5], [4]]


def test_state_that_is_there_is_not_touched() -> None:
    param = parameters([(3,)], torch.bfloat16)[0]
    moment = torch.ones(3)
    state = {"exp_avg": moment, "step": torch.tensor(4.0)}
    ensure_state(state, param)
    assert state["exp_avg"] is moment
    assert float(state["step"]) == 4
    assert sorted(state) == ["exp_avg", "exp_avg_sq", "master_weight", "step", "trust_ratio"]
