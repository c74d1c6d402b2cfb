"""The section "flops_profiler": one profile of training, by itself; the keys are DeepSpeed's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, FilePath, Section


class FlopsProfiler(Section):
    """What a step costs and how far from the device's limits it runs: of training counted and timed once, in steps of
    the run itself; of inference by `slipstream profile` and engine.profile(), which take format and file from here."""

    enabled: bool = False
    """Whether training profiles itself."""

    profile_step: Annotated[int, Field(ge=0, le=2**31 - 1)] = 1
    """Optimizer steps done before the one that is counted; up to eight more are timed behind it."""

    module_depth: Annotated[int, Field(ge=-1, le=2**31 - 1)] = -1
    """How deep the table's tree of modules goes, 0 for the model itself; -1 shows all."""

    top_modules: Count = 1
    """Classes of modules that the table lists for each depth."""

    detailed: bool = True
    """Whether the table shows every module by itself, and the longest kernels."""

    output_file: FilePath | None = None
    """Where the profile goes, with an ending for each format where there are several; null prints the table. With
    several processes each has its own, the rank in its name."""

    formats: Annotated[
        tuple[Literal["table", "json", "html", "chrome_trace"], ...],
        Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    ] = ("table",)
    """What is written: text, data, a page for a browser, a timeline for Perfetto."""
