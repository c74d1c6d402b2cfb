"""``Timer`` on a CPU: whose the time is and in which phase, what it leaves behind (nothing), and what it refuses."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter as Tally

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler import profile
from torch.nn.modules import module as hooks
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

from ops.costs import Cost, Weight, observed, priced, region
from profiler import Counter, ProfilerError, Timer, Timing, count, timed
from profiler.attribution import STEP, attribute
from profiler.recording import records_of
from profiler.times import BETWEEN_OPERATORS
from tests.profiler.test_counter import Net, train

CPU = torch.device("cpu")
NAP = 0.02


class Naps(torch.autograd.Function):
    """Sleeps on both ways, the second time twice as long."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(NAP)
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors  # where a checkpoint computes it again
        time.sleep(2 * NAP)
        return grad * torch.ones_like(x)


class Sleepy(nn.Module):
    def forward(self, x):
        return Naps.apply(x)


class Outer(nn.Module):
    """A sleepy block between two layers that are not, and a nap of its own."""

    def __init__(self, recompute=None):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), nn.Sequential(Sleepy()), nn.Linear(4, 4)
        self.recompute = recompute

    def forward(self, x):
        time.sleep(NAP)
        x = self.first(x)
        x = self.block(x) if self.recompute is None else checkpoint(self.block, x, use_reentrant=self.recompute)
        return self.last(x)


def measured(step, model=None, **kwargs):
    timer = Timer(model, **kwargs)
    with timer.step():
        step()
    return timer.timing()


def run(model):
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()


# ---- whose, and when ----


def test_time_belongs_to_the_module_that_took_it():
    found = measured(lambda: run(model), model := Outer())
    assert found.clock == "host"
    assert found.own("block.0", "forward").seconds >= NAP
    assert found.own("block.0", "backward").seconds >= 2 * NAP
    assert found.own("Outer", "forward").seconds >= NAP
    slept = found.own("block.0").seconds + found.own("Outer").seconds
    assert found.busy_seconds - slept < slept, "the others slept too"
    assert found.own("block").seconds < NAP
    assert found.modules["block.0"]["forward"][BETWEEN_OPERATORS].seconds >= NAP


def test_self_times_add_up_to_the_step():
    found = measured(lambda: run(model), model := Outer())
    assert found.busy_seconds == pytest.approx(found.step_seconds, rel=1e-9)
    assert found.idle_seconds == 0
    assert Timing.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_apart(reentrant):
    found = measured(lambda: run(model), model := Outer(reentrant))
    for phase, naps in (("forward", 1), ("recompute", 1), ("backward", 2)):
        assert found.own("block.0", phase).seconds >= naps * NAP, phase
        assert found.own("block.0", phase).seconds < (naps + 0.9) * NAP, phase
    assert "recompute" not in found.modules["first"]


def test_functions_that_are_computed_again_belong_to_their_module():
    class Functional(nn.Module):
        def forward(self, x):
            return checkpoint(lambda y: (y @ y).tanh(), x, use_reentrant=False)

    own = measured(lambda: Functional()(torch.ones(4, 4, requires_grad=True)).sum().backward()).modules["Functional"]
    assert [own[phase]["aten.mm"].calls for phase in ("forward", "recompute", "backward")] == [1, 1, 2]
    assert "aten.tanh" not in own["backward"]


@pytest.mark.parametrize("recompute", [None, "reentrant", "plain"])
@pytest.mark.parametrize("steps", [1, 3])
def test_operators_are_those_that_are_counted(recompute, steps):
    """By module, phase and name: the dispatcher's word against that of the profiler's ranges."""
    model = Net(recompute)
    optimizer = AdamW(model.parameters(), foreach=False)
    train(model, 1, optimizer)  # its state is there
    with Counter(model) as counter:
        train(model, steps, optimizer)
    found = measured(lambda: train(model, steps, optimizer), model)
    # What a view or a gradient's handing over calls is not the dispatcher's to see.
    aside, sums = {"aten.detach", "aten.new_empty_strided", "aten.copy_"}, {"aten.add", "aten.add_"}
    counted = timed = 0
    for module in counter.counts().root.walk():
        for phase, operators in module.own.items():
            calls = {name: work.operators for name, work in operators.items() if name not in aside}
            times = {name: spent.calls for name, spent in found.modules.get(module.name, {}).get(phase, {}).items()}
            if phase == "backward":
                # Autograd sums gradients in place if no mode sees it, where one counter and one timer are a node apart.
                counted += sum(calls.pop(name, 0) for name in sums)
                timed += sum(times.pop(name, 0) for name in sums)
            assert {name: times.get(name, 0) for name in calls} == calls, (module.name, phase)
    assert timed == counted > 0


def test_operators_of_many_layers_have_the_names_that_are_counted():
    layers = nn.ModuleList([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten()])
    layers += [nn.Linear(36, 8), nn.LayerNorm(8), nn.Dropout(), nn.GELU()]
    embedding, attention = nn.Embedding(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def step():
        x = nn.Sequential(*layers)(torch.ones(2, 2, 8, 8))
        x = torch.where(x > 0, x, x.std(0)) + x.max(1, keepdim=True).values
        x = x[:, None] + embedding(torch.tensor([[0, 1], [2, 3]]))
        x, _ = attention(x, x, x, need_weights=False)
        F.cross_entropy(torch.einsum("abc,dc->abd", x, embedding.weight).flatten(0, 1), torch.arange(4)).backward()

    _, counts = count(step)
    timed, counted = Tally(), Tally()
    for phases in measured(step).modules.values():
        for name, spent in phases.get("forward", {}).items():
            timed[name.replace("add_", "add")] += spent.calls  # a linear layer adds in place if no mode sees it
    for name, work in counts.root.operators("forward").items():
        counted[name.replace("add_", "add")] += work.operators
    for views in ("aten.view", "aten.detach", "aten.empty"):
        del timed[views], counted[views]
    assert counted.total() > 30
    assert {name: timed[name] for name in counted} == counted


def test_a_shared_module_has_the_name_it_is_called_by():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = Sleepy()
            self.other = nn.Sequential(self.one)

        def forward(self, x):
            return self.other(self.one(x))

    found = measured(lambda: run(model), model := Twice())
    for name in ("one", "other.0"):
        assert found.own(name, "forward").seconds >= NAP
        assert found.own(name, "backward").seconds >= 2 * NAP


def test_optimizers_and_what_is_called_so():
    model = Outer()
    optimizer = SGD(model.parameters(), lr=0.1)
    timer = Timer(model)

    def closure():
        optimizer.zero_grad()
        run(model)
        return torch.zeros(())

    with timer.step():
        with timer.optimizer_step():
            time.sleep(NAP)
        optimizer.step(closure)
    found = timer.timing()
    assert found.own("", "step").seconds >= NAP
    assert found.modules[""]["step"]["aten.add_"].calls == 4
    assert found.own("block.0", "forward").seconds >= NAP
    assert found.own("block.0", "backward").seconds >= 2 * NAP
    assert "step" not in found.modules["Outer"]


def test_modules_of_other_models_and_without_one():
    found = measured(lambda: (Outer()(torch.ones(2, 4)), Sleepy()(torch.ones(1))))
    assert {"Outer", "Outer.block.0", "Sleepy"} <= set(found.modules)


def test_regions_and_priced_functions():
    @priced(lambda result, x: Cost(1))
    def ours(x):
        time.sleep(NAP)
        return x.mul(2).add(1)

    def step():
        with region("layers.1", "layer"), region("ffn", "ffn", (Weight(1, 3, 12),)):
            ours(torch.ones(2))

    found = measured(step)
    ffn = found.modules["layers.1.ffn"]["forward"]
    assert ffn["ours"].seconds >= NAP
    assert ffn["ours"].calls == 1
    assert "aten.mul" not in ffn


@pytest.mark.parametrize("part", ["model", "block"])
def test_what_is_compiled_belongs_to_the_module_that_is_entered(part):
    model = Net()
    called = model
    if part == "model":
        called = torch.compile(model, backend="aot_eager")
    else:
        model.blocks[0] = torch.compile(model.blocks[0], backend="aot_eager")
    train(called)
    timer = Timer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with timer.step():
            train(called)
    found = timer.timing()
    names = {name for name in found.modules if "aten.addmm" in found.modules[name].get("forward", {})}
    expected = {"Net"} if part == "model" else {"blocks.0", "blocks.1.0", "head"}
    assert names == expected
    assert all("aten.mm" in found.modules[name]["backward"] for name in expected)
    assert "aten.mse_loss" in found.modules[""]["forward"], "left again"


def test_against_torch_on_the_same_trace():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    with profile(use_kineto=True) as found, torch._C._profiler._RecordFunctionFast(STEP):
        model(torch.randn(8, 64)).sum().backward()
    ours = attribute(records_of(found, CPU), [], "host")
    theirs = {row.key: row for row in found.key_averages()}
    operators: dict[str, list[float]] = {}
    for phases in ours.modules.values():
        for spending in phases.values():
            for name, spent in spending.items():
                before = operators.setdefault(name, [0.0, 0])
                operators[name] = [before[0] + spent.seconds, before[1] + spent.calls]
    for name in ("addmm", "tanh", "mm", "tanh_backward", "ones_like"):
        row = theirs[f"aten::{name}"]
        assert operators[f"aten.{name}"] == [pytest.approx(row.cpu_time_total / 1e6, abs=1e-8), row.count], name
    assert ours.seconds == pytest.approx(theirs[STEP].cpu_time_total / 1e6)


def test_collectives_are_apart():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = measured(lambda: dist.all_reduce(torch.ones(1 << 20)))
    finally:
        dist.destroy_process_group()
    assert found.communication["c10d.allreduce_"].calls == found.communication["gloo:all_reduce"].calls == 1
    assert "c10d.allreduce_" not in found.modules[""]["forward"]
    assert found.busy_seconds == pytest.approx(found.step_seconds, rel=1e-9)


# ---- steps ----


def test_the_median_step_stands_beside_the_plain_ones():
    timer, naps = Timer(), iter([0.03, 0.01, 0.02])
    for _ in range(3):
        with timer.step():
            time.sleep(next(naps))
    for nap in (0.03, 0.01, 0.02):
        with timer.plain():
            time.sleep(nap)
    found = timer.timing(warm_up=4)
    assert 0.02 <= found.step_seconds < 0.03
    assert 0.02 <= found.plain_seconds < 0.03
    assert (found.steps, found.warm_up) == (3, 4)
    with pytest.raises(ProfilerError, match="no step has been timed"):
        Timer().timing()


def test_a_function_is_timed():
    calls = []
    found = timed(lambda: calls.append(observed()), warm_up=2, repeats=2)
    assert calls == [False, False, True, False, True, False, True]
    assert (found.steps, found.warm_up) == (2, 3)
    assert found.plain_seconds > 0
    with pytest.raises(ProfilerError, match="repeats is 0"):
        timed(lambda: None, repeats=0)


def test_events_are_there_if_they_are_asked_for():
    model = Outer()
    assert measured(lambda: run(model), model).events == ()
    found = measured(lambda: run(model), model, events=True)
    names = [(event.name, event.kind) for event in found.events]
    assert names.index(("Outer", "module")) < names.index(("first", "module")) < names.index(("block.0", "module"))
    assert [event.start for event in found.events] == sorted(event.start for event in found.events)
    assert all(event.start >= 0 and event.start + event.seconds <= found.step_seconds + 1e-9 for event in found.events)
    assert {event.track for event in found.events} == {"host"}
    backward = [event for event in found.events if event.name == "aten.mm"]
    assert [(event.module, event.phase) for event in backward[:1]] == [("last", "backward")]


# ---- nothing is left behind ----


def watched():
    return (
        dict(hooks._global_forward_pre_hooks),
        dict(hooks._global_forward_hooks),
        torch.autograd._profiler_enabled(),
        observed(),
        warnings.filters[:],
    )


def test_nothing_is_left_behind():
    before = watched()
    model = Net().eval()
    timer = Timer(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with timer.plain():
        assert watched() == before, "a plain step is plain"
    with timer.step():
        assert watched() != before
        train(model)
    assert watched() == before
    assert not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_nothing_is_left_behind_by_an_exception():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    before, timer = watched(), Timer(model := nn.Sequential(nn.Sequential(Broken()), Sleepy()))
    with pytest.raises(RuntimeError, match="broken"), timer.step():
        model(torch.ones(1))
    assert watched() == before
    with pytest.raises(ProfilerError, match="no step has been timed"):
        timer.timing()
    with timer.step():
        model[1](torch.ones(1))
    assert timer.timing().own("1").seconds >= NAP


def test_results_are_the_same():
    def trained(timer):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
        optimizer = AdamW(model.parameters())
        for _ in range(3):
            with timer() as _:
                F.mse_loss(model(torch.randn(3, 4)), torch.zeros(3, 2)).backward()
                optimizer.step()
        return [parameter.detach() for parameter in model.parameters()], torch.get_rng_state()

    plain, timing = trained(Timer().plain), trained(Timer().step)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], timing[0], strict=True))
    assert torch.equal(plain[1], timing[1])


def test_one_at_a_time():
    with Counter(), pytest.raises(ProfilerError, match="counted or timed already"), Timer().step():
        pass
    with Timer().step(), pytest.raises(ProfilerError, match="runs already"):
        count(lambda: None)
    with Timer().step(), pytest.raises(ProfilerError, match="torch's profiler is running"), Timer().step():
        pass
    with profile(use_kineto=True), pytest.raises(ProfilerError, match="torch's profiler is running"), Timer().step():
        pass
    assert not observed()


def test_other_devices_are_refused():
    with pytest.raises(ProfilerError, match="meta: steps are timed on cpu and cuda"):
        Timer(nn.Linear(2, 2, device="meta"))


def test_kineto_is_quiet(capfd):
    measured(lambda: None)
    assert capfd.readouterr() == ("", "")
