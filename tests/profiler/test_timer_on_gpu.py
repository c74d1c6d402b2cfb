"""On a GPU: kernels against torch's own sums, modules of a backward pass in a thread of its own, graphs, energy."""

from __future__ import annotations

import logging
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch._C._profiler import _RecordFunctionFast
from torch.autograd.profiler import profile

from benchmarks.profiler_cost import runtime
from profiler import ProfilerError, Timer, timed
from profiler.attribution import STEP, attribute
from profiler.energy import energy
from profiler.recording import records_of
from tests.profiler.test_counter import Net

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def wide():
    """A small layer, a large one, a small one."""
    return nn.Sequential(nn.Linear(256, 1024), nn.Sequential(nn.Linear(1024, 8192)), nn.Linear(8192, 256)).to(DEVICE)


def run(model):
    model(torch.randn(512, 256, device=DEVICE)).sum().backward()


def measured(step, model=None):
    step()
    step()
    timer = Timer(model, DEVICE)
    with timer.rehearsal():
        step()
    with timer.step():
        step()
    return timer.timing()


def products(found, module, phase):
    """Kernels of matrix products: all libraries' have one of these in their names."""
    kernels = found.modules.get(module, {}).get(phase, {})
    return sum(
        spent.calls for name, spent in kernels.items() if any(part in name for part in ("gemm", "nvjet", "cutl"))
    )


def test_kernels_against_torch_on_the_same_trace():
    model = wide()
    run(model)
    with profile(use_kineto=True, use_device="cuda") as found, _RecordFunctionFast(STEP):
        run(model)
        torch.cuda.synchronize()
    ours = attribute(records_of(found, DEVICE), [], "device")
    kernels: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for phases in ours.modules.values():
        for spending in phases.values():
            for name, spent in spending.items():
                kernels[name][0] += spent.seconds
                kernels[name][1] += spent.calls
    theirs = {
        row.key: (row.self_device_time_total / 1e6, row.count)
        for row in found.key_averages()
        if row.device_type == torch.autograd.DeviceType.CUDA and not row.is_user_annotation
    }
    theirs.pop(STEP, None)
    assert set(kernels) == set(theirs)
    for name, (seconds, calls) in kernels.items():
        assert (seconds, calls) == (pytest.approx(theirs[name][0], abs=1e-8 * calls), theirs[name][1]), name


def test_times_add_up_to_the_step():
    found = timed(lambda: run(model), model := wide())
    assert found.clock == "device"
    assert found.busy_seconds + found.idle_seconds == pytest.approx(found.step_seconds, rel=0.05)
    assert 0 < found.busy_seconds < found.step_seconds
    assert found.plain_seconds > 0


@pytest.mark.parametrize("kind", [None, "reentrant", "plain"])
def test_kernels_belong_to_their_modules_in_every_phase(kind):
    model = Net(kind).to(DEVICE)

    def step():
        torch.manual_seed(0)
        loss = model(torch.randn(3, 4, device=DEVICE, requires_grad=True)).square().mean()
        loss.backward()

    found = measured(step, model)
    for name in ("blocks.0.0", "blocks.1.0", "head"):
        again = kind is not None and name != "head"
        assert products(found, name, "forward"), name
        assert products(found, name, "recompute") == again, name
        assert products(found, name, "backward"), name
    for name in ("blocks.0.1", "blocks.1.1"):
        assert found.own(name, "backward").calls == 1, "of tanh"
    assert not any(products(found, name, phase) for name in ("", "Net") for phase in ("forward", "backward"))


def test_the_optimizer_and_copies():
    model = wide()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    timer = Timer(model)

    def step():
        run(model)
        with timer.optimizer_step():
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        next(model.parameters())[0, 0].item()

    step()
    step()
    with timer.rehearsal():
        step()
    with timer.step():
        step()
    found = timer.timing()
    assert found.own("", "step").calls > 1
    assert any("dam" in name for name in found.modules[""]["step"])
    assert any(name.startswith("Memcpy DtoH") for name in found.modules[""]["forward"])
    assert products(found, "1.0", "backward")


def test_graphs_belong_to_the_module_that_replays_them():
    model, x = wide(), torch.randn(512, 256, device=DEVICE)
    with torch.no_grad():
        model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        model(x)

    class Replays(nn.Module):
        def forward(self):
            graph.replay()

    top = nn.Sequential(Replays())
    found = measured(lambda: top[0](), top)
    assert set(found.modules) == {"0"}
    assert products(found, "0", "forward")
    assert found.own("0").calls >= 3
    assert found.busy_seconds + found.idle_seconds == pytest.approx(found.step_seconds, rel=0.05)


def test_kernels_that_no_operator_launches_belong_to_their_module():
    triton = pytest.importorskip("triton")
    from tests.profiler.doubling import double

    class Doubles(nn.Module):
        def forward(self, x):
            double[(triton.cdiv(x.numel(), 256),)](x, x.numel(), BLOCK=256)
            return x

    model = nn.Sequential(nn.Tanh(), Doubles())
    found = measured(lambda: model(torch.ones(1000, device=DEVICE)), model)
    assert list(found.modules["1"]["forward"]) == ["double"], found.modules


@pytest.mark.parametrize("name", ["bert-base", "gpt2"])
def test_the_runtime_s_graphs_are_told_apart_by_a_rehearsal(name, caplog):
    _, step = runtime(name, DEVICE, toy=True)
    step()
    with caplog.at_level(logging.WARNING):
        found = timed(step, device=DEVICE)
    assert not caplog.records, "kernels that the rehearsal did not have"
    assert any("layers.1" in module for module in found.modules)
    assert found.own("").seconds < 0.5 * found.busy_seconds
    assert found.busy_seconds + found.idle_seconds == pytest.approx(found.step_seconds, rel=0.05)


def test_nothing_is_left_that_records():
    model = wide()
    measured(lambda: run(model), model)
    assert not torch.autograd._profiler_enabled()
    with Timer(model).step(), pytest.raises(ProfilerError, match="torch's profiler is running"), Timer(model).step():
        pass


def test_compiled_models():
    model = Net().to(DEVICE)
    called = torch.compile(model)
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    called(x).sum().backward()
    found = measured(lambda: called(x).sum().backward(), model)
    assert found.own("Net", "forward").calls > 0
    assert found.own("Net", "backward").calls > 0
    assert set(found.modules) <= {"", "Net"}


def test_energy_is_that_of_a_gpu_at_work():
    model = wide()
    found = timed(lambda: run(model), model)
    joules = energy(lambda: run(model), DEVICE)
    assert joules is not None
    assert 20 < joules.joules / found.plain_seconds < 2000, "watts"


def test_steps_that_are_not_those_of_their_rehearsal_are_watched(caplog):
    """The first such step shows it, the others count; each kernel is where it belongs."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).to(DEVICE)
    rows = torch.randn(64, 256, device=DEVICE)

    def step(layers):
        result = rows
        for layer in model[:layers]:
            result = layer(result)

    timer = Timer(model, DEVICE)
    with timer.rehearsal():
        step(8)
    for _ in range(3):
        with timer.step():
            step(3)
    found = timer.timing()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert found.steps == 2
    assert {name for name in found.modules if products(found, name, "forward")} == {"0", "1", "2"}


def test_where_kernels_belong_does_not_depend_on_watching():
    """The same step with the host watched, for a timeline, and followed by its kernels alone."""
    model = Net("plain").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    rows = torch.randn(3, 4, device=DEVICE, requires_grad=True)

    def step():
        model(rows).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def calls(found):
        return {
            (module, phase, name): spent.calls
            for module, phases in found.modules.items()
            for phase, kernels in phases.items()
            for name, spent in kernels.items()
        }

    step()
    watched, followed = timed(step, model, events=True), timed(step, model)
    assert watched.events
    assert not followed.events
    assert calls(watched) == calls(followed)
    assert followed.step_seconds == pytest.approx(followed.busy_seconds + followed.idle_seconds)
