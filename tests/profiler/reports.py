"""Reports for tests: counts are real or made up, times are made up from the limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from hypothesis import strategies as st

from profiler.ceilings import Ceilings, roofline
from profiler.counts import PHASES, Counts, ModuleCounts, Work
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


_TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=60)


@st.composite
def random_reports(draw) -> Report:
    """Any report: names in any script, any sizes, anything missing. Hypothesis draws the names and a seed."""
    texts = draw(st.lists(_TEXTS, min_size=4, max_size=8, unique=True))
    random = Random(draw(st.integers(0, 2**32)))

    def number() -> int:
        return int(10 ** random.uniform(0, 15)) - 1

    def some(keys: Sequence[str], value: Callable[[], Any]) -> dict[Any, Any]:
        return {key: value() for key in random.sample(keys, random.randint(0, min(3, len(keys))))}

    def spent() -> Spent:
        return Spent(10 ** random.uniform(-9, 4), random.randint(0, 10**6))

    def module(prefix: str, depth: int) -> ModuleCounts:
        name = f"{prefix}.{random.choice(texts)}" if prefix else random.choice(texts)
        own = some(PHASES, lambda: some(texts, lambda: Work(*(number() for _ in range(6)))))
        several = random.randint(0, 3 if depth < 4 else 0)
        children = tuple(module(f"{name}.{at}", depth + 1) for at in range(several))
        return ModuleCounts(name, random.choice(texts), number(), number(), {"forward": 1}, own, number(), children)

    counts = Counts(ModuleCounts("", "", children=(module("", 0),)), some(texts, lambda: random.randint(1, 10**6)))
    names = [one.name for one in counts.root.walk()]
    modules = some(names, lambda: some(PHASES, lambda: some(texts, spent)))
    numbers = {name: 10 ** random.uniform(-9, 4) for name in ("step_seconds", "idle_seconds", "plain_seconds")}
    timing = Timing(random.choice(["device", "host"]), modules, some(texts, spent), **numbers)
    workload = Workload(
        random.choice(["training", "inference", "call"]),
        random.choice(["fp32", "bf16"]),
        random.choice([None, 0, number()]),
        random.choice([None, 0, number()]),
        *(random.randint(1, 10**4) for _ in range(5)),
    )
    return Report(
        name=random.choice(texts),
        workload=workload,
        counts=counts,
        timing=random.choice([timing, timing, None]),
        limits=random.choice([LIMITS, LIMITS, None]),
        energy=random.choice([None, Energy(1.5, "power"), Energy(0.0, "counter")]),
        machine=some(texts, lambda: random.choice(texts)),
        notes=tuple(some(texts, int)),
    )
