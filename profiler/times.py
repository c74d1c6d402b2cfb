"""What a timing pass found, as plain frozen data: seconds by module, phase and kernel. JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from profiler.counts import Phase

Clock = Literal["device", "host"]
"""``device``: kernels as the GPU's activity records have them. ``host``: wall clock, where the CPU itself computes."""

EventKind = Literal["module", "operator", "kernel", "copy", "communication"]


BETWEEN_OPERATORS = "between operators"
"""On the host's clock, the name under which a module spends what it spends in no operator: Python, autograd."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of calls; they add up."""

    seconds: float = 0.0
    #: Kernels, or operators on a CPU.
    calls: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.calls + other.calls)


@dataclass(frozen=True, slots=True)
class Event:
    """One stretch of a timed step, for a timeline."""

    name: str
    kind: EventKind
    #: The row it is drawn in: "host", "stream 7".
    track: str
    #: Seconds since the step began, and how long it took.
    start: float
    seconds: float
    #: Whose it is, as ``ModuleCounts.name``; "" between modules.
    module: str
    phase: Phase


@dataclass(frozen=True, slots=True)
class Timing:
    """One step's time, the median of several, and whose it is.

    ``busy_seconds`` and ``idle_seconds`` add up to ``step_seconds``. Where kernels ran at the same time (on several
    streams, or one that waits for the end of another), an instant is that one's which began first. Communication counts
    in full, so that what of it was hidden behind kernels is in excess.
    """

    clock: Clock
    #: Own time, without that of modules below: by module's name as in ``Counts`` ("" between modules), phase, and
    #: kernel (operator on a CPU). Communication is not in here.
    modules: Mapping[str, Mapping[Phase, Mapping[str, Spent]]]
    #: Collectives by name of the kernel or the operation.
    communication: Mapping[str, Spent] = field(default_factory=dict)
    #: From the step's begin to its end on the device, while it was being timed.
    step_seconds: float = 0.0
    #: Of it, time in which the device did nothing. 0 on the host's clock.
    idle_seconds: float = 0.0
    #: The same step without any of this, median: what being timed costs is ``step_seconds / plain_seconds``.
    plain_seconds: float = 0.0
    #: Steps timed, and those run before.
    steps: int = 1
    warm_up: int = 0
    #: Of one step; empty unless they were asked for. Not part of the JSON.
    events: tuple[Event, ...] = ()

    def own(self, module: str, phase: Phase | None = None) -> Spent:
        """A module's own time in a phase, or in all."""
        phases = self.modules.get(module, {})
        chosen = phases.values() if phase is None else [phases.get(phase, {})]
        return sum((spent for kernels in chosen for spent in kernels.values()), Spent())

    def kernels(self, phase: Phase | None = None) -> dict[str, Spent]:
        """By name, over all modules in a phase; over all phases communication is among them."""
        found = dict(self.communication) if phase is None else {}
        for phases in self.modules.values():
            for one in phases if phase is None else phases.keys() & {phase}:
                for name, spent in phases[one].items():
                    found[name] = found.get(name, Spent()) + spent
        return found

    @property
    def busy_seconds(self) -> float:
        """Sum over all modules, what lies between them, and communication."""
        modules = sum(self.own(name).seconds for name in self.modules)
        return modules + sum(spent.seconds for spent in self.communication.values())

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, strings and numbers, for ``json.dumps``; without ``events``."""
        data = asdict(self)
        del data["events"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Timing:
        """The opposite of ``to_dict``, also after a way through JSON."""
        modules = {
            name: {phase: _spent(kernels) for phase, kernels in phases.items()}
            for name, phases in data["modules"].items()
        }
        return cls(**{**data, "modules": modules, "communication": _spent(data["communication"])})


def _spent(kernels: Mapping[str, Any]) -> dict[str, Spent]:
    return {name: Spent(**spent) for name, spent in kernels.items()}
