"""Records as a GPU gives them, written by hand: kernels by the operator that launched them or by the launch's moment,
graphs, communication, streams that overlap, what a rehearsal knows better."""

from __future__ import annotations

import pytest

from profiler.attribution import MODULE, STEP, Placed, attribute
from profiler.recording import Record
from profiler.times import Spent

MAIN, AUTOGRAD, STREAM = 100, 200, 7
NAMES = ["top", "top.first", "top.last"]


def host(name, start, end, correlation, row=MAIN, thread=1, **more):
    return Record(name, "host", start, end, row, correlation, thread=thread, **more)


def module(number, start, end, correlation, **more):
    return host(f"{MODULE}{number}", start, end, correlation, **more)


def kernel(name, start, end, linked=0, correlation=0, row=STREAM, kind="kernel"):
    return Record(name, kind, start, end, row, correlation, linked)


def launch(start, correlation, row=MAIN, linked=0):
    return Record("cudaLaunchKernel", "launch", start, start + 5, row, correlation, linked)


def attributed(*records, clock="device", **more):
    return attribute(sorted(records, key=lambda record: (record.start, -record.end)), NAMES, clock, **more)


def seconds(spent):
    return {name: round(one.seconds * 1e9) for name, one in spent.items()}


STEPS = host(STEP, 0, 1000, 1)


def test_kernels_belong_to_the_operator_that_launched_them():
    """Also where they run long after their module has returned, on a stream of their own."""
    found = attributed(
        STEPS,
        module(0, 10, 200, 2),
        module(1, 20, 100, 3),
        host("aten::mm", 30, 60, 4, sequence=5),
        launch(40, 9000, linked=4),
        host("aten::add", 110, 130, 5, sequence=6),
        kernel("gemm", 300, 700, linked=4, correlation=9000),
        kernel("add", 700, 750, linked=5, correlation=9001),
        kernel("Memcpy DtoH", 800, 810, linked=2, kind="copy"),
        kernel("before", -50, -10, linked=4),
    )
    assert seconds(found.modules["top.first"]["forward"]) == {"gemm": 400}
    assert seconds(found.modules["top"]["forward"]) == {"add": 50, "Memcpy DtoH": 10}
    assert (found.seconds, found.idle) == (pytest.approx(1000e-9), pytest.approx(540e-9))


def test_a_launch_without_an_operator_is_placed_by_its_moment_and_thread():
    found = attributed(
        STEPS,
        module(1, 20, 100, 3),
        launch(50, 9000),
        module(2, 110, 200, 4),
        launch(150, 9001),
        launch(60, 9002, row=AUTOGRAD),
        *(kernel(name, at, at + 10, correlation=9000) for name, at in (("a", 300), ("b", 310), ("a", 320))),
        kernel("triton", 400, 430, correlation=9001),
        kernel("elsewhere", 500, 501, correlation=9002),
        kernel("unheard", 600, 602, correlation=1234),
    )
    assert found.modules["top.first"] == {"forward": {"a": Spent(pytest.approx(20e-9), 2), "b": Spent(1e-8, 1)}}
    assert seconds(found.modules["top.last"]["forward"]) == {"triton": 30}
    assert seconds(found.modules[""]["forward"]) == {"elsewhere": 1, "unheard": 2}


def test_a_node_belongs_to_the_module_in_which_it_was_made():
    """In autograd's thread, by the number in the forward thread; gradients are added where the last node was."""
    evaluate = "autograd::engine::evaluate_function: "
    numbered = {"row": AUTOGRAD, "thread": 2, "forward_thread": 1}
    found = attributed(
        STEPS,
        module(1, 10, 50, 2),
        host("aten::mm", 20, 30, 3, sequence=5),
        host("aten::mul", 35, 40, 5, sequence=6),  # makes no node: the next one has the number still
        module(2, 60, 90, 4),
        host("aten::mm", 75, 80, 6, sequence=6),
        host(f"{evaluate}MmBackward0", 100, 140, 7, sequence=6, **numbered),
        host("MmBackward0", 101, 130, 8, sequence=6, backward=True, **numbered),
        host("aten::mm", 105, 110, 9, row=AUTOGRAD, thread=2),
        host("aten::add_", 132, 138, 10, row=AUTOGRAD, thread=2),
        host(f"{evaluate}MmBackward0", 140, 160, 11, sequence=5, **numbered),
        host("aten::mm", 145, 150, 12, row=AUTOGRAD, thread=2),
        host(f"{evaluate}torch::autograd::AccumulateGrad", 160, 190, 13, row=AUTOGRAD, thread=2),
        host("torch::autograd::AccumulateGrad", 161, 189, 14, row=AUTOGRAD, thread=2, backward=True),
        host("aten::add_", 165, 170, 15, row=AUTOGRAD, thread=2),
        host(f"{evaluate}MulBackward0", 200, 210, 16, sequence=3, **numbered),
        host("aten::mul", 201, 205, 17, row=AUTOGRAD, thread=2),
        *(kernel(f"by {number}", 300 + number, 301 + number, linked=number) for number in (9, 10, 12, 15, 17)),
    )
    assert set(found.modules["top.last"]["backward"]) == {"by 9", "by 10"}
    assert set(found.modules["top.first"]["backward"]) == {"by 12", "by 15"}
    assert set(found.modules[""]["backward"]) == {"by 17"}, "made before the step"


def test_an_optimizer_steps_between_modules():
    found = attributed(
        STEPS,
        host("Optimizer.step#AdamW.step", 10, 100, 2),
        host("aten::add_", 20, 30, 3),
        module(0, 200, 300, 4),
        host("Optimizer.step#Inner.step", 210, 290, 5),
        host("aten::add_", 220, 230, 6),
        kernel("adam", 400, 410, linked=3),
        kernel("inner", 410, 420, linked=6),
    )
    assert {name: set(phases) for name, phases in found.modules.items()} == {"": {"step"}, "top": {"forward"}}


def test_communication_is_apart_and_streams_may_overlap():
    found = attributed(
        STEPS,
        module(1, 10, 90, 2),
        host("aten::mm", 20, 30, 3),
        kernel("gemm", 100, 300, linked=3),
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 200, 400, linked=3, row=9),
        kernel("Memcpy PtoP", 250, 260, linked=3, row=9, kind="copy"),
        events=True,
    )
    assert seconds(found.communication) == {"ncclDevKernel_AllReduce_Sum_bf16_RING_LL": 200}
    assert seconds(found.modules["top.first"]["forward"]) == {"gemm": 200, "Memcpy PtoP": 0}, "within gemm's"
    assert found.idle == pytest.approx(700e-9), "busy from 100 to 400"
    assert [(event.kind, event.track) for event in found.events] == [
        ("module", "host"),
        ("kernel", "stream 7"),
        ("communication", "stream 9"),
        ("copy", "stream 9"),
    ]
    assert (found.events[1].start, found.events[1].seconds) == (pytest.approx(100e-9), pytest.approx(200e-9))


def test_collectives_of_a_cpu_are_communication():
    found = attributed(STEPS, module(0, 0, 500, 2), host("c10d::allreduce_", 100, 300, 3), clock="host")
    assert seconds(found.communication) == {"c10d.allreduce_": 200}
    assert seconds(found.modules["top"]["forward"]) == {"between operators": 300}
    assert seconds(found.modules[""]["forward"]) == {"between operators": 500}


def test_waiting_for_a_collective_between_cpus_is_communication():
    """Where nothing is computed meanwhile; two that overlap are waited for once."""
    found = attributed(
        STEPS,
        module(0, 0, 500, 2),
        host("aten::mm", 100, 300, 3),
        Record("gloo:all_reduce", "collective", 90, 350, 300),
        Record("gloo:broadcast", "collective", 340, 360, 301),
        Record("gloo:all_reduce", "collective", 900, 2000, 301),
        clock="host",
    )
    assert found.communication == {
        "gloo:all_reduce": Spent(pytest.approx(160e-9), 2),
        "gloo:broadcast": Spent(pytest.approx(10e-9), 1),
    }
    assert seconds(found.modules["top"]["forward"]) == {"between operators": 230, "aten.mm": 200}
    assert seconds(found.modules[""]["forward"]) == {"between operators": 400}


def test_a_rehearsal_tells_what_a_graph_does_not():
    names = ["norm", "gemm", "norm", "gemm", "head"]
    modules = ["first", "first", "last", "last", ""]
    rehearsed = [Placed(name, module, "forward") for name, module in zip(names, modules, strict=True)]
    played = ["Memcpy HtoD", *names[:3], "extra", *names[3:]]
    replay = [kernel(name, 100 + 10 * at, 105 + 10 * at, correlation=7) for at, name in enumerate(played)]
    found = attributed(STEPS, module(0, 10, 90, 2), launch(50, 7), *replay, rehearsed=rehearsed)
    assert {name: set(phases["forward"]) for name, phases in found.modules.items()} == {
        "first": {"norm", "gemm"},
        "last": {"norm", "gemm"},
        "": {"head"},
        "top": {"Memcpy HtoD", "extra"},
    }
    assert found.strangers == 2
    assert attributed(STEPS, module(0, 10, 90, 2), launch(50, 7), *replay).strangers == 0


def test_a_step_of_kernels_alone_follows_its_rehearsal():
    """Stream by stream, in whatever order those take turns; what is new is its forerunner's."""
    order = [("gemm", "first", 7), ("copy", "head", 9), ("gemm", "last", 7), ("copy", "loss", 9)]
    rehearsed = [Placed(name, module, "backward", row) for name, module, row in order]
    played = [("copy", 9), ("copy", 9), ("gemm", 7), ("new", 7), ("gemm", 7)]
    replay = [kernel(name, 100 + 10 * at, 105 + 10 * at, row=row) for at, (name, row) in enumerate(played)]
    step = host(STEP, 0, 1000, -1, row=0)
    found = attributed(step, launch(50, 7), *replay, rehearsed=rehearsed)
    assert {name: dict(phases) for name, phases in found.modules.items()} == {
        "head": {"backward": {"copy": Spent(pytest.approx(5e-9), 1)}},
        "loss": {"backward": {"copy": Spent(pytest.approx(5e-9), 1)}},
        "first": {"backward": {"gemm": Spent(pytest.approx(5e-9), 1), "new": Spent(pytest.approx(5e-9), 1)}},
        "last": {"backward": {"gemm": Spent(pytest.approx(5e-9), 1)}},
    }
    assert (found.strangers, found.missing, found.alike) == (1, 0, False)


def test_steps_that_lack_layers_are_not_alike():
    """Their kernels have the names of those that are missing."""
    layers = [Placed(name, f"layers.{layer}", "forward", STREAM) for layer in range(9) for name in ("norm", "gemm")]
    played = [kernel(placed.name, 10 * at, 10 * at + 5) for at, placed in enumerate(layers)]
    step = host(STEP, -5, 1000, -1, row=0)
    assert attributed(step, *played, rehearsed=layers).alike
    dropped = attributed(step, *played[:10], rehearsed=layers)
    assert (dropped.strangers, dropped.missing, dropped.alike) == (0, 8, False)


def test_kernels_that_wait_for_others_add_nothing():
    """Launched early, they wait on the device; and one may end before another that began before it."""
    found = attributed(
        STEPS,
        module(1, 20, 100, 3),
        kernel("a", 100, 200, linked=3),
        kernel("b", 150, 300, linked=3),
        kernel("c", 210, 290, linked=3, row=8),
        kernel("d", 295, 320, linked=3),
    )
    assert seconds(found.modules["top.first"]["forward"]) == {"a": 100, "b": 100, "c": 0, "d": 20}
    assert found.idle == pytest.approx(780e-9)
