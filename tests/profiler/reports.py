"""Reports for tests: counts are real or made up, times are made up from the limits."""

from __future__ import annotations

from profiler.ceilings import Ceilings, roofline
from profiler.counts import Counts, ModuleCounts, Work
from profiler.report import Energy, Report, Workload
from profiler.times import Spent, Timing

#: 1 TFLOP/s and 100 GB/s: the ridge is at 10 operations a byte, in bf16 at 40.
LIMITS = Ceilings(
    device="Test device",
    flops={"fp32": 1e12, "bf16": 4e12},
    bandwidth=100e9,
    sources={"fp32": "measured", "bf16": "measured", "bandwidth": "measured"},
)


def product(rows: int, inner: int, columns: int, element: int = 4) -> Work:
    """One ``[rows, inner] @ [inner, columns]``."""
    macs = rows * inner * columns
    return Work(1, 2 * macs, 2 * macs, macs, (rows + columns) * inner * element, rows * columns * element)


def elementwise(elements: int, calls: int = 1, element: int = 4) -> Work:
    """``calls`` unary operators of one operation an element."""
    return Work(calls, elements * calls, elements * calls, 0, elements * element * calls, elements * element * calls)


def leaf(name: str, kind: str, parameters: int = 0, calls: int = 1, **phases: dict[str, Work]) -> ModuleCounts:
    return ModuleCounts(
        name, kind, parameters, parameters * 4, {"forward": calls}, phases, activation_bytes=1000 * calls
    )


def branch(name: str, kind: str, *children: ModuleCounts, **phases: dict[str, Work]) -> ModuleCounts:
    return ModuleCounts(name, kind, 0, 0, {"forward": 1}, phases, children=children)


def timing_of(counts: Counts, slower: float = 2.0, clock: str = "host", **more) -> Timing:
    """Every operator takes ``slower`` times its limit, and at least a microsecond a call."""
    modules = {}
    for module in counts.root.walk():
        for phase, operators in module.own.items():
            for name, work in operators.items():
                flops = work.executed_flops if work.macs else 0
                least, _ = roofline(LIMITS, flops, work.bytes_read + work.bytes_written, "fp32")
                spent = Spent(max(slower * least, 1e-6 * work.operators), work.operators)
                modules.setdefault(module.name, {}).setdefault(phase, {})[name] = spent
    busy = sum(spent.seconds for phases in modules.values() for ops in phases.values() for spent in ops.values())
    busy += sum(spent.seconds for spent in more.get("communication", {}).values())
    settings = {"step_seconds": busy + more.get("idle_seconds", 0.0), "plain_seconds": busy, "steps": 3, "warm_up": 1}
    return Timing(clock=clock, modules=modules, **{**settings, **more})


def hand_made(layers: int = 3) -> Report:
    """A training step of a little encoder: in each layer a product, which compute bounds, and an activation, which
    memory bounds; a head whose product reads its weights for few rows; the optimizer's step."""

    def layer(number: int) -> ModuleCounts:
        name = f"layers.{number}"
        big = product(2048, 512, 512)
        return branch(
            name,
            "Layer",
            leaf(f"{name}.linear", "Linear", 262656, forward={"aten.addmm": big}, backward={"aten.mm": big + big}),
            leaf(
                f"{name}.act",
                "NewGELU",
                forward={"aten.mul": elementwise(2048 * 512, 6), "aten.tanh": elementwise(2048 * 512)},
                backward={"aten.mul": elementwise(2048 * 512, 12)},
            ),
        )

    head = leaf("head", "Linear", 512 * 8000, forward={"aten.mm": product(4, 512, 8000)})
    model = branch("Net", "Net", branch("layers", "ModuleList", *map(layer, range(layers))), head)
    own = {"forward": {"aten.mean": elementwise(100)}, "step": {"aten._foreach_add_": elementwise(5_000_000, 4)}}
    counts = Counts(ModuleCounts("", "", own=own, children=(model,)), {"mylib.mystery": 3})
    return Report(
        name="Net",
        workload=Workload("training", samples=4, tokens=2048),
        counts=counts,
        timing=timing_of(counts),
        limits=LIMITS,
        energy=Energy(1.5, "counter"),
        counting_seconds=0.25,
        timing_seconds=1.5,
        machine={"device": "Test device", "torch": "2.13.0"},
        notes=("One thing that a reader must know.",),
    )
