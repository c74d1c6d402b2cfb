"""A picture of the rows: a bar a run, grouped by batch, with the floor as a line. Needs matplotlib (extra "report")."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.bench.job import PEERS
from engine.bench.report import Row, number, percentage, write
from engine.errors import EngineError

OURS, THEIRS, FLOOR = "#1f5fa8", "#b5bcc6", "#c8442b"
#: Beyond such a ratio of the longest bar to the shortest floor, a linear axis would not tell the short ones apart.
LINEAR = 12.0


def check_installed() -> None:
    """Raises where there is no matplotlib, with what to install."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("--chart needs matplotlib: pip install 'slipstream-runtime[report]'")


def draw(found: Sequence[Row], path: Path) -> None:
    """Writes a PNG of the rows of one model that have figures; with none of them there is nothing to draw.

    The axis is logarithmic where the bars differ too much for a linear one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in found if row.ms is not None and row.ms > 0]
    if not measured:
        return
    groups = sorted({(row.tokens, row.batch) for row in measured})
    members = [sorted(_of(measured, group), key=lambda row: row.ms or 0) for group in groups]
    bars = sum(len(group) for group in members)
    figure = Figure(figsize=(8.6, 1.5 + 0.3 * bars + 0.55 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [len(group) + 0.8 for group in members]
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    longest = max(row.ms or 0 for row in measured)
    shortest = min(row.floor_ms for row in measured)
    log = longest / shortest > LINEAR
    for axis, group in zip(axes, members, strict=True):
        _group(axis, group, log, longest, shortest)
    first = measured[0]
    what = {"decode": "ms a token", "prefill": "ms to the first token", "encode": "ms a pass"}[first.kind]
    axes[-1].set_xlabel(what + (" (logarithmic)" if log else ""))
    prompt = "" if first.kind == "encode" else f", prompt of {first.tokens} tokens"
    figure.suptitle(f"{first.model}, {first.precision}{prompt}, {first.device}", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write(path, picture.getvalue())


def _of(found: Sequence[Row], group: tuple[int, int]) -> list[Row]:
    return [row for row in found if (row.tokens, row.batch) == group]


def _group(axis: Any, group: Sequence[Row], log: bool, longest: float, shortest: float) -> None:
    """The bars of one batch, the fastest on top."""
    times = [row.ms or 0 for row in group]
    colors = [THEIRS if row.run in PEERS else OURS for row in group]
    places = range(len(group))
    axis.barh(places, times, height=0.68, color=colors, zorder=2)
    axis.set_yticks(places, [row.run for row in group], fontsize=9)
    axis.invert_yaxis()
    floor = group[0].floor_ms
    axis.axvline(floor, color=FLOOR, linewidth=1.6, zorder=3)
    for place, row in zip(places, group, strict=True):
        share = "" if row.percent is None else f"  ({percentage(row.percent)} of floor)"
        axis.annotate(
            f"{number(row.ms or 0)}{share}",
            (row.ms or 0, place),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    first = group[0]
    title = f"batch {first.batch}, {first.tokens} tokens" if first.kind == "encode" else f"batch {first.batch}"
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_title(f"red line: floor, {number(floor)} ms", fontsize=8, loc="right", color=FLOOR)
    if log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        axis.set_xlim(shortest / 2, longest * 3)
    else:
        axis.set_xlim(0, longest * 1.3)
    axis.grid(axis="x", color="#e3e6ea", linewidth=0.7, zorder=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(axis="y", length=0)
