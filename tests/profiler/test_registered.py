"""Operators of our own and of others: costs that are registered, and plain functions that announce theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ops.costs import COSTS, priced
from profiler import Cost, Counter, count, register_cost


@torch.library.custom_op("slipstream_test::twice", mutates_args=())
def twice(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight) * 2


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for registry in (COSTS, flop_registry):
        for op in [op for op in registry if "slipstream_test" in str(op)]:
            monkeypatch.delitem(registry, op)
    yield
    for registry in (COSTS, flop_registry):
        for op in [op for op in registry if "slipstream_test" in str(op)]:
            del registry[op]


OP = torch.ops.slipstream_test.twice
X, W = torch.ones(3, 4), torch.ones(4, 5)


def test_an_operator_without_a_cost_is_listed_with_its_calls():
    with Counter() as counter:
        twice(X, W)
        twice(X, W)
    assert counter.counts().unknown == {"slipstream_test.twice": 2}
    work = counter.counts().total()
    assert (work.operators, work.flops, work.bytes_read, work.bytes_written) == (2, 0, 2 * 4 * 32, 2 * 4 * 15)


def test_a_registered_cost_is_taken():
    register_cost(OP, lambda result, x, weight: Cost(flops=2 * x.numel() * weight.shape[1], macs=60, bytes_read=1))
    _, counts = count(twice, X, W)
    work = counts.root.operators()["slipstream_test.twice"]
    assert not counts.unknown
    assert (work.flops, work.macs, work.executed_flops, work.bytes_read, work.bytes_written) == (120, 60, 120, 1, 60)


def test_formulas_of_torchs_registry_are_taken():
    register_flop_formula(OP)(lambda x, weight, out_shape=None, **_: 2 * x[0] * x[1] * weight[1])
    _, counts = count(twice, X, W)
    assert not counts.unknown
    assert (counts.total().flops, counts.total().macs) == (120, 60)


@priced(lambda result, x, weight: Cost(flops=120, macs=60, executed_flops=100))
def plain(x, weight):
    return inner(x @ weight)


@priced(lambda result, x: Cost(flops=7))
def inner(x):
    return x * 2


def test_a_plain_function_is_one_operator_and_hides_what_it_calls():
    model = torch.nn.Module()
    model.forward = lambda x: plain(x, W) + 1
    with Counter(model) as counter:
        model(X)
    counts = counter.counts()
    assert set(counts.root.operators()) == {"plain", "aten.add"}
    work = counts.module("Module").own["forward"]["plain"]
    assert (work.flops, work.macs, work.executed_flops) == (120, 60, 100)
    assert (work.bytes_read, work.bytes_written) == (4 * 32, 4 * 15)
    _, counts = count(inner, X)
    assert set(counts.root.operators()) == {"inner"}


def test_after_an_exception_in_a_plain_function_operators_are_counted_again():
    with Counter() as counter:
        with pytest.raises(RuntimeError):
            plain(X, X)
        X + 1
    assert set(counter.counts().root.operators()) == {"aten.add"}
