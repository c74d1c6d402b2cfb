"""Whose time it is: one pass over the records of a step, a stack of places for each thread.

What is around a record says where it belongs. Around operators lie the ranges that ``Timer`` opens for modules and
optimizers, and autograd's nodes; a node belongs to the module in which its number was the next one. Kernels belong to
the place of the operator or range that launched them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch

from profiler.counts import Phase
from profiler.recording import Record
from profiler.times import BETWEEN_OPERATORS, Clock, Event, EventKind, Spent

#: Names of ranges: the whole step, a module by its number, an optimizer's step, and a function as one operator.
STEP, MODULE, OPTIMIZER, FUNCTION = "slipstream.step", "slipstream.module:", "slipstream.optimizer", "slipstream.call:"
#: What torch itself puts around steps of its optimizers, and autograd around a node with its hooks.
_TORCH_OPTIMIZER, _EVALUATE = "Optimizer.step#", "autograd::engine::evaluate_function: "
#: Kernels and operators that communicate.
_NCCL = ("ncclDevKernel", "ncclKernel")
_COLLECTIVES = ("c10d", "_c10d_functional")

#: How far ahead a rehearsal is searched for a kernel before it counts as a stranger.
_AHEAD = 16

#: Share of a step's kernels up to which they may differ from those of its rehearsal.
_ALIKE = 0.02

Spending = dict[str, dict[Phase, dict[str, Spent]]]

_NOTHING = Spent()


class Placed(NamedTuple):
    """A kernel, its module and phase, and the stream it ran on."""

    name: str
    module: str
    phase: Phase
    row: int = 0


@dataclass(slots=True)
class Measured:
    """One step: its length and its idle time in seconds, and whose the rest is."""

    seconds: float = 0.0
    idle: float = 0.0
    modules: Spending = field(default_factory=dict)
    communication: dict[str, Spent] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    #: The GPU's kernels and copies in their order; how many of them the rehearsal, if there was one, did not have, and
    #: how many of its own did not come.
    placed: list[Placed] = field(default_factory=list)
    strangers: int = 0
    missing: int = 0

    @property
    def alike(self) -> bool:
        """Whether these are, but for a few, the kernels of the rehearsal."""
        return self.strangers + self.missing <= _ALIKE * len(self.placed)


@dataclass(slots=True)
class _Frame:
    """What runs in a thread, from a begin to an end."""

    end: int
    module: str
    phase: Phase
    #: The operator whose time it is; what runs within one counts as its own.
    operator: str | None = None
    in_module: bool = False


class _Made:
    """Numbers that autograd's next node had in one thread, and the modules that ran then."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._modules: list[str] = []

    def note(self, number: int, module: str) -> None:
        if self._numbers and self._numbers[-1] == number:
            self._modules[-1] = module  # the operator that began last is the one that makes the node
        else:
            self._numbers.append(number)
            self._modules.append(module)

    def find(self, number: int) -> str:
        position = bisect_right(self._numbers, number)
        return self._modules[position - 1] if position else ""


def attribute(
    records: Sequence[Record],
    names: Sequence[str],
    clock: Clock,
    events: bool = False,
    rehearsed: Sequence[Placed] = (),
) -> Measured:
    """Whose the time of one step is.

    Args:
        records: by begin, with one range ``STEP`` among them; what lies outside of it is not looked at.
        names: of modules, by the number in the name of their ranges.
        clock: "device" adds up kernels and copies, "host" the thread that the step ran in.
        events: whether to list them for a timeline, too.
        rehearsed: where the same kernels belonged in an earlier step, whose word goes before that of their launches.
            Where nothing of the host was recorded, a kernel that is not among them is its forerunner's.
    """
    step = next(record for record in records if record.name == STEP)
    inside = [record for record in records if step.start <= record.start < step.end]
    waits = [record for record in inside if record.kind == "collective"] if clock == "host" else []
    walk = _Walk(step, names, clock, events, waits)
    walk.watched = any(record.kind == "host" and record is not step for record in inside)
    for record in inside:
        if record.kind == "host":
            walk.host(record)
        elif record.kind == "launch":
            walk.launch(record)
    walk.finish()
    if clock == "device":
        walk.device([record for record in inside if record.kind in ("kernel", "copy")], rehearsed)
    walk.found.seconds = (step.end - step.start) / 1e9
    walk.found.events.sort(key=lambda event: (event.start, -event.seconds))
    return walk.found


class _Follow:
    """Finds kernels in the rehearsal, in order, stream by stream if they are the same streams; some that are only here,
    or only there, do not lead it astray."""

    def __init__(self, rehearsed: Sequence[Placed], rows: Collection[int]) -> None:
        self._by_row = set(rows) <= {placed.row for placed in rehearsed}
        self._rehearsed: dict[int, list[Placed]] = defaultdict(list)
        for placed in rehearsed:
            self._rehearsed[placed.row * self._by_row].append(placed)
        self._next: dict[int, int] = defaultdict(int)
        self._any = bool(rehearsed)
        self.strangers, self.missing = 0, len(rehearsed)

    def find(self, name: str, row: int) -> Placed | None:
        """Where that kernel, the next of the step, belongs."""
        row *= self._by_row
        start = self._next[row]
        for position, known in enumerate(self._rehearsed[row][start : start + _AHEAD], start):
            if known.name == name:
                self._next[row] = position + 1
                self.missing -= 1
                return known
        self.strangers += self._any
        return None


class _Walk:
    def __init__(self, step: Record, names: Sequence[str], clock: Clock, events: bool, waits: Sequence[Record]) -> None:
        self.found = Measured()
        self._step = step
        self._names = names
        self._on_host = clock == "host"
        self._events = events
        #: Whether there are records of the host.
        self.watched = True
        self._stacks: dict[int, list[_Frame]] = defaultdict(lambda: [_Frame(step.end, "", "forward")])
        self._made: dict[int, _Made] = defaultdict(_Made)
        #: Of the node that was evaluated last in a thread: adding to ``.grad`` follows the node that completes it.
        self._latest: dict[int, str] = defaultdict(str)
        #: Where launches are: by number of the host's record, and of the launch.
        self._records: dict[int, tuple[str, Phase]] = {}
        self._launches: dict[int, tuple[str, Phase]] = {}
        #: Until when the step's thread is accounted for, and the collectives from the first that lasts longer.
        self._now = step.start
        self._waits = deque(waits)
        for wait in waits:
            self._communicated(wait.name, 0, calls=1)

    # ---- the host ----

    def host(self, record: Record) -> None:
        """A range, an operator or a node begins."""
        stack = self._until(record.row, record.start)
        frame = self._frame(record, stack[-1])
        if record.sequence >= 0 and not _is_node(record):
            self._made[record.thread].note(record.sequence, frame.module)
        self._records[record.correlation] = frame.module, frame.phase
        stack.append(frame)
        if self._events:
            self._host_event(record, frame, outer=stack[-2])

    def launch(self, record: Record) -> None:
        """The CUDA runtime is called."""
        if record.row in self._stacks:
            frame = self._until(record.row, record.start)[-1]
            self._launches[record.correlation] = frame.module, frame.phase

    def finish(self) -> None:
        """The step is over."""
        self._until(self._step.row, self._step.end)

    def _until(self, row: int, time: int) -> list[_Frame]:
        """The stack of a thread at a time, after what has ended by then."""
        stack = self._stacks[row]
        while len(stack) > 1 and stack[-1].end <= time:
            self._account(row, stack[-1], stack[-1].end)
            stack.pop()
        self._account(row, stack[-1], time)
        return stack

    def _account(self, row: int, frame: _Frame, time: int) -> None:
        if self._on_host and row == self._step.row and time > self._now:
            waited = 0 if frame.operator else self._waited(time)
            self._spend(frame.module, frame.phase, frame.operator, time - self._now - waited, calls=0)
            self._now = time

    def _waited(self, time: int) -> int:
        """Of the time from ``now`` on, in which there was no operator, that in which a collective was on its way: what
        waits for one is nowhere recorded."""
        reached = self._now
        while self._waits and self._waits[0].end <= reached:
            self._waits.popleft()
        total = 0
        for wait in self._waits:
            start, end = max(wait.start, reached), min(wait.end, time)
            if start < end:
                self._communicated(wait.name, end - start, calls=0)
                total, reached = total + end - start, end
        return total

    def _frame(self, record: Record, outer: _Frame) -> _Frame:
        name, end = record.name, record.end
        within = outer.phase in ("backward", "recompute")
        if name.startswith(MODULE):
            module = self._names[int(name.removeprefix(MODULE))]
            return _Frame(end, module, "recompute" if within else "forward", in_module=True)
        if _is_node(record):
            if record.sequence >= 0:
                self._latest[record.row] = self._made[record.forward_thread].find(record.sequence)
            return _Frame(end, self._latest[record.row], "backward")
        if name.startswith((OPTIMIZER, _TORCH_OPTIMIZER)):
            stepping = not within and not outer.in_module
            return _Frame(end, outer.module, "step" if stepping else outer.phase, in_module=outer.in_module)
        operator = outer.operator or (name.removeprefix(FUNCTION) if name.startswith(FUNCTION) else _operator(name))
        phase = outer.phase
        if phase == "backward" and record.sequence >= 0:
            phase = "recompute"  # gradients are on within a backward pass where something is computed anew
        if operator is not None and outer.operator is None and record.row == self._step.row and self._on_host:
            self._spend(outer.module, phase, operator, 0, calls=1)
        return _Frame(end, outer.module, phase, operator, outer.in_module)

    def _spend(self, module: str, phase: Phase, name: str | None, nanoseconds: int, calls: int) -> None:
        if name is not None and name.startswith(_COLLECTIVES):
            self._communicated(name, nanoseconds, calls)
            return
        operators = self.found.modules.setdefault(module, {}).setdefault(phase, {})
        name = name or BETWEEN_OPERATORS
        operators[name] = operators.get(name, _NOTHING) + Spent(nanoseconds / 1e9, calls)

    def _communicated(self, name: str, nanoseconds: int, calls: int) -> None:
        before = self.found.communication.get(name, _NOTHING)
        self.found.communication[name] = before + Spent(nanoseconds / 1e9, calls)

    # ---- the device ----

    def device(self, records: Sequence[Record], rehearsed: Sequence[Placed]) -> None:
        """Kernels and copies, by begin. An instant in which several run is the first one's, so that own times add up.
        Those that communicate are apart, and count in full."""
        reached = covered = self._step.start
        busy = 0
        nowhere: tuple[str, Phase] = "", "forward"
        last = nowhere
        follow = _Follow(rehearsed, {record.row for record in records})
        for record in records:
            start, end = max(record.start, covered), max(record.end, covered)
            busy, covered = busy + end - start, end
            found = follow.find(record.name, record.row)
            launched = self._launched(record) or (nowhere if self.watched else last)
            module, phase = last = (found.module, found.phase) if found else launched
            self.found.placed.append(Placed(record.name, module, phase, record.row))
            communicates = record.name.startswith(_NCCL)
            if communicates:
                self._communicated(record.name, record.end - record.start, calls=1)
            else:
                alone = max(record.end, reached) - max(record.start, reached)
                reached = max(record.end, reached)
                self._spend(module, phase, record.name, alone, calls=1)
            if self._events:
                kind: EventKind = "communication" if communicates else "copy" if record.kind == "copy" else "kernel"
                self._event(record, kind, f"stream {record.row}", record.name, module, phase)
        self.found.strangers, self.found.missing = follow.strangers, follow.missing
        self.found.idle = (self._step.end - self._step.start - busy) / 1e9

    def _launched(self, record: Record) -> tuple[str, Phase] | None:
        return self._records.get(record.linked) or self._launches.get(record.correlation)

    # ---- the timeline ----

    def _host_event(self, record: Record, frame: _Frame, outer: _Frame) -> None:
        if record.name.startswith(MODULE):
            self._event(record, "module", "host", frame.module, frame.module, frame.phase)
        elif self._on_host and record.row == self._step.row and frame.operator and not outer.operator:
            collective = frame.operator.startswith(_COLLECTIVES)
            kind: EventKind = "communication" if collective else "operator"
            self._event(record, kind, "host", frame.operator, frame.module, frame.phase)

    def _event(self, record: Record, kind: EventKind, track: str, name: str, module: str, phase: Phase) -> None:
        start, seconds = (record.start - self._step.start) / 1e9, (record.end - record.start) / 1e9
        self.found.events.append(Event(name, kind, track, start, seconds, module, phase))


def _is_node(record: Record) -> bool:
    """Whether it is a node of a backward pass, or what the engine does around it: summing gradients, hooks."""
    return record.backward or record.name.startswith(_EVALUATE)


@cache
def _operator(name: str) -> str | None:
    """``aten.mm`` of ``aten::mm``; None for what is no operator or only calls others (``aten::linear``)."""
    namespace, _, rest = name.partition("::")
    if not rest or "::" in rest:
        return None
    variants = [schema.overload_name for schema in torch._C._jit_get_schemas_for_operator(name)]
    full = [f"{name}.{variant}".removesuffix(".") for variant in variants if not variant.endswith("out")]
    known = [variant for variant in full if torch._C._dispatch_has_kernel(variant)]  # to the dispatcher
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    # Where some variants only call others, those have the same name.
    only_calls = all(composite(variant, "CompositeImplicitAutograd") for variant in known)
    return None if only_calls else f"{namespace}.{rest}"
