"""Parts of models that are no modules: their names, their parameters, and whose the work in them is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from ops.costs import Weight, priced, region
from profiler import Cost, Counter

X = torch.ones(3)


def names(counts):
    return [(module.name, module.kind, module.own_work().operators) for module in counts.root.walk()]


def test_paths_lie_below_the_region_around_them():
    with Counter() as counter:
        for _ in range(2):
            with region("gpt2", "lm"):
                with region("layers.0.qkv", "qkv"):
                    X + 1
                with region("layers.1.qkv", "qkv"):
                    X + 1
                X + 1
    counts = counter.counts()
    assert names(counts) == [
        ("", "", 0),
        ("gpt2", "lm", 2),
        ("gpt2.layers", "layers", 0),
        ("gpt2.layers.0", "layer", 0),
        ("gpt2.layers.0.qkv", "qkv", 2),
        ("gpt2.layers.1", "layer", 0),
        ("gpt2.layers.1.qkv", "qkv", 2),
    ]
    assert counts.module("gpt2.layers.0.qkv").calls == {"forward": 2}
    assert counts.module("gpt2.layers").total().flops == 12


def test_modules_within_regions_and_regions_within_modules():
    inner = nn.Linear(3, 3)
    outer = nn.Module()

    def forward(x):
        with region("part", "part"):
            return inner(x) + 1

    outer.forward = forward
    with Counter(outer) as counter:
        outer(X)
    counts = counter.counts()
    assert counts.module("Module.part").own["forward"]["aten.add"].operators == 1
    assert counts.module("Linear").total().macs == 9


def test_parameters_count_at_the_first_that_has_them():
    one, other = Weight(1, 5, 10), Weight(2, 7, 28)
    with Counter() as counter:
        for _ in range(2):
            with region("model", "lm"), region("prefill", "prefill"), region("layers.0", "layer", (one,)):
                pass
        with region("model", "lm"), region("decode", "decode", (one, other)):
            pass
    root = counter.counts().root
    assert {place.name: (place.parameters, place.parameter_bytes) for place in root.walk() if place.parameters} == {
        "model.prefill.layers.0": (5, 10),
        "model.decode": (7, 28),
    }


def test_after_an_exception_work_is_nobodys():
    with Counter() as counter:
        with pytest.raises(ValueError, match="on purpose"), region("a", "a"), region("b", "b"):
            raise ValueError("on purpose")
        X + 1
    assert counter.counts().root.own_work().operators == 1


def test_a_region_that_outlives_its_counter_does_no_harm():
    with region("early", "x"):
        with Counter() as counter, region("a", "a"):
            X + 1
        late = region("late", "x")
    with Counter() as other:
        late = region("late", "x")
        late.__enter__()
    late.__exit__(None, None, None)
    assert [child.name for child in counter.counts().root.children] == ["a"]
    assert [child.name for child in other.counts().root.children] == ["late"]


@priced(lambda result, x: Cost(flops=7))
def launched(x):
    return x


def test_other_threads_are_not_heard():
    def elsewhere():
        with region("elsewhere", "x"):
            launched(X)

    with Counter() as counter, ThreadPoolExecutor(1) as pool, region("here", "x"):
        pool.submit(elsewhere).result()
        launched(X)
    assert names(counter.counts()) == [("", "", 0), ("here", "x", 1)]


@priced(lambda result, x: Cost(flops=int(x.sum().item())))
def looks(x):
    return x


def test_operators_of_a_cost_are_not_counted():
    with Counter() as counter:
        looks(X)
    assert {name: work.flops for name, work in counter.counts().root.operators().items()} == {"looks": 3}
