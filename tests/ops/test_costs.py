"""Costs beside the op: registering, and plain functions that tell a listener."""

from __future__ import annotations

import pytest
import torch

from ops import costs
from ops.costs import Cost, listening, priced, register_cost
from ops.errors import KernelError


@priced(lambda result, x, times=1: Cost(flops=times * x.numel()))
def scale(x, times=1):
    """Documented."""
    return x * times


def test_without_a_listener_the_function_is_the_function():
    assert scale(torch.ones(2), times=3).tolist() == [3, 3]
    assert (scale.__name__, scale.__doc__) == ("scale", "Documented.")


def test_a_listener_hears_every_call_and_makes_it():
    heard = []

    def listener(name, cost, function, args, kwargs):
        result = function(*args, **kwargs)
        heard.append((name, cost(result, *args, **kwargs)))
        return result

    with listening(listener):
        assert scale(torch.ones(2), times=3).tolist() == [3, 3]
    scale(torch.ones(2))
    assert heard == [("scale", Cost(flops=6))]


def test_one_listener_at_a_time_also_after_an_exception():
    with (
        pytest.raises(KernelError, match="a counter runs already"),
        listening(lambda *_: None),
        listening(lambda *_: None),
    ):
        pass
    assert costs._listener is None


def test_what_is_no_operator_cannot_be_registered():
    with pytest.raises(KernelError, match=r"is no operator: give torch.ops.NAMESPACE.NAME"):
        register_cost(torch.ops.aten.mm.default, lambda result, *args: Cost(0))  # type: ignore[arg-type]


def test_an_operator_is_registered_once(monkeypatch):
    monkeypatch.setattr(costs, "COSTS", {})
    register_cost(torch.ops.aten.sin, lambda result, x: Cost(x.numel()))
    with pytest.raises(KernelError, match=r"aten\.sin has a cost already"):
        register_cost(torch.ops.aten.sin, lambda result, x: Cost(0))


def test_a_function_may_be_counted_under_another_name():
    names = []

    @priced(lambda result: Cost(0), name="launch")
    def _hidden():
        return 1

    with listening(lambda name, cost, function, args, kwargs: names.append(name) or function()):
        assert _hidden() == 1
    assert names == ["launch"]


class Ears:
    def __init__(self):
        self.heard = []

    def region_enters(self, name, kind, parameters):
        self.heard.append((name, kind, tuple(parameters)))

    def region_leaves(self):
        self.heard.append("left")


def test_regions_are_heard_also_where_what_runs_inside_raises():
    ears = Ears()
    with costs.region("model", "lm"):
        assert not costs.observed()
    with costs.hearing(ears):
        assert costs.observed()
        with (
            pytest.raises(ValueError, match="on purpose"),
            costs.region("model", "lm"),
            costs.region("qkv", "qkv", (costs.Weight(1, 3, 6),)),
        ):
            raise ValueError("on purpose")
    assert ears.heard == [("model", "lm", ()), ("qkv", "qkv", ((1, 3, 6),)), "left", "left"]
    assert not costs.observed()


def test_one_hears_regions_at_a_time():
    with (
        pytest.raises(KernelError, match="a profiler runs already"),
        costs.hearing(Ears()),
        costs.hearing(Ears()),
    ):
        pass
    assert not costs.observed()
