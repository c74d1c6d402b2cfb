"""Everything that one profile found: work, time, the device's limits, energy. Plain frozen data, JSON both ways.

``report.schema.json`` beside this file describes the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from jsonschema.validators import extend

from ops.cache import write_aside
from profiler.ceilings import Ceilings
from profiler.counts import Counts
from profiler.errors import ProfilerError
from profiler.times import Timing

Format = Literal["table", "json", "html", "chrome_trace"]

Mode = Literal["training", "inference", "call"]
"""``training``: an optimizer step; ``inference``: a call or a generation of a runtime; ``call``: anything else."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """What one profiled step did, as far as it is known."""

    mode: Mode = "call"
    #: Name of the peak that its matrix products are held against: "fp32", "tf32", "bf16", "fp16", "int8", "fp8".
    precision: str = "fp32"
    #: Sequences, images, rows of this process in a step, over all its micro-batches; and tokens, where there are such.
    samples: int | None = None
    tokens: int | None = None
    micro_batches: int = 1
    #: Whose report this is, and of how many processes; degrees of parallelism.
    rank: int = 0
    world_size: int = 1
    data_parallel: int = 1
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Energy:
    """Of one step on this process's device, from NVML's counter of energy; "power" where there is none: its samples."""

    joules: float
    source: Literal["counter", "power"]


@dataclass(frozen=True, slots=True)
class Report:
    """One profile. What was not done is None."""

    #: The model's class, or the name that whoever profiled gave.
    name: str
    workload: Workload
    counts: Counts
    timing: Timing | None = None
    limits: Ceilings | None = None
    energy: Energy | None = None
    #: What profiling itself took.
    counting_seconds: float = 0.0
    timing_seconds: float = 0.0
    #: Versions and names: "torch", "device", "slipstream", "kernels".
    machine: Mapping[str, str] = field(default_factory=dict)
    #: What a reader must know: what could not be counted or timed, and why.
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.limits is not None:
            self.limits.peak(self.workload.precision)  # raises where there is none

    def __str__(self) -> str:
        from profiler.tables import text

        return text(self, top_modules=3, detailed=False)

    def to_dict(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers, for ``json.dumps``: the report, and under "judged" what follows
        from it. Events of the timeline are not part of it."""
        from profiler.advice import hot_spots, remarks
        from profiler.judge import Judged

        judged = Judged(self)
        return {
            "schema": SCHEMA_VERSION,
            **asdict(self),
            "counts": self.counts.to_dict(),
            "timing": None if self.timing is None else self.timing.to_dict(),
            "judged": {
                **judged.to_dict(),
                "hot_spots": [spot.to_dict() for spot in hot_spots(judged)],
                "remarks": [asdict(remark) for remark in remarks(judged)],
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The opposite of ``to_dict``, also after a way through JSON.

        Raises:
            ProfilerError: another version of the schema, or data that it does not describe.
        """
        if not isinstance(data, Mapping) or "schema" not in data:
            raise ProfilerError("not a profile: it has no schema. Give the JSON that a profile was written to")
        if data["schema"] != SCHEMA_VERSION:
            raise ProfilerError(
                f"a profile of schema {data['schema']!r}, and this version reads {SCHEMA_VERSION}: profile again"
            )
        error = best_match(_validator().iter_errors(data))
        if error is not None:
            raise ProfilerError(f"a damaged profile: {error.json_path}: {error.message[:200]}: profile again")
        given = {name: data[name] for name in ("name", "counting_seconds", "timing_seconds")}
        return cls(
            **given,
            workload=Workload(**data["workload"]),
            counts=Counts.from_dict(data["counts"]),
            timing=None if data["timing"] is None else Timing.from_dict(data["timing"]),
            limits=None if data["limits"] is None else Ceilings.from_dict(data["limits"]),
            energy=None if data["energy"] is None else Energy(**data["energy"]),
            machine=dict(data["machine"]),
            notes=tuple(data["notes"]),
        )

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def save(self, path: Path | str) -> None:
        """Write ``to_json`` to a file, aside first.

        Raises:
            ProfilerError: it cannot be written.
        """
        _write(Path(path), self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Report:
        """What ``save`` wrote.

        Raises:
            ProfilerError: it cannot be read, or is no profile.
        """
        try:
            data = json.loads(Path(path).read_text("utf-8"), parse_constant=_refuse)
            return cls.from_dict(data)
        except OSError as error:
            raise ProfilerError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ProfilerError(f"{path}: not a profile, as it is no JSON: {error}") from error
        except ProfilerError as error:
            raise ProfilerError(f"{path}: {error}") from error

    def write(
        self,
        formats: Sequence[Format] = ("table",),
        output_file: Path | str | None = None,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
    ) -> tuple[Path, ...]:
        """Write the report in one format or several; a table without a file is printed.

        Args:
            output_file: exactly this file for one format; for several each has its own ending in place of this one's:
                ``.txt``, ``.json``, ``.html``, ``.trace.json``.
            module_depth, top_modules, detailed: of the table, as ``profiler.tables.text`` has them.

        Returns:
            The files that were written.

        Raises:
            ProfilerError: an unknown format, one other than the table without a file, a Chrome trace of a profile
                without events, a library that is missing, or a file that cannot be written.
        """
        from profiler.tables import text

        makers: dict[Format, tuple[str, Callable[[], str]]] = {
            "table": (".txt", lambda: text(self, module_depth, top_modules, detailed)),
            "json": (".json", self.to_json),
            "html": (".html", self._html),
            "chrome_trace": (".trace.json", self._trace),
        }
        for name in formats:
            if name not in makers:
                raise ProfilerError(f"no format {name!r}: there are {', '.join(get_args(Format))}")
            if output_file is None and name != "table":
                raise ProfilerError(f"the format {name} needs a file to be written to: give output_file")
        made = {name: makers[name][1]() for name in formats}
        if output_file is None:
            print("\n".join(made.values()))
            return ()
        path = Path(output_file)
        files = {name: path if len(made) == 1 else path.with_suffix(makers[name][0]) for name in made}
        for name, content in made.items():
            _write(files[name], content)
        return tuple(files.values())

    def _html(self) -> str:
        from profiler.page import page

        return page(self)

    def _trace(self) -> str:
        from profiler.trace import trace

        return json.dumps(trace(self), allow_nan=False)


def schema() -> dict[str, Any]:
    """The JSON Schema of a report's JSON."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "report.schema.json").read_text("utf-8"))
    return found


@cache
def _validator() -> Any:
    # Data that has not been through JSON has tuples.
    arrays = Draft202012Validator.TYPE_CHECKER.redefine("array", lambda _, value: isinstance(value, list | tuple))
    return extend(Draft202012Validator, type_checker=arrays)(schema())  # type: ignore[no-untyped-call]


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _write(path: Path, content: str) -> None:
    try:
        write_aside(path, content.encode())
    except OSError as error:
        raise ProfilerError(f"{path}: the profile cannot be written: {error}") from error
