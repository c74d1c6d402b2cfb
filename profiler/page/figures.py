"""The page's figures, made with plotly: roofline, flame graph, tree map of memory.

What depends on the phase and on what the reader chooses (values, colours) the page's script fills in from the rows.
Colours are custom properties of the page's style sheet, ``var(--ink)``: the script puts in what they stand for, so that
figures follow the reader's light or dark scheme.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from profiler.ceilings import Ceilings, intensity
from profiler.errors import ProfilerError
from profiler.page.rows import CELLS
from profiler.units import quantity

Row = dict[str, Any]

#: By verdict: its name in the legend, its colour.
VERDICTS = {
    "memory": ("bound by memory", "var(--memory)"),
    "compute": ("bound by compute", "var(--compute)"),
    "latency": ("by neither: latency", "var(--neither)"),
}
#: What lies further left is shown at the edge: such a module hardly computes.
LEAST_INTENSITY = 1e-2
#: Height of a label, as a part of the roofline's.
LABEL = 0.05
#: Names of labels: of the ceilings that count here, and of the others, which a narrow screen has no room for.
OURS, OTHER = "ours", "other"
_INK = {OURS: "var(--ink)", OTHER: "var(--muted)"}
#: Height of the bar that leads back out of a module, in pixels.
PATH = 24
#: Height of a level of the flame graph; least and most of all of it.
LEVEL, SHORTEST, TALLEST = 32, 150, 560
#: Labels of one size; those that do not fit are left out rather than made too small to read.
_TEXT = {"minsize": 11, "mode": "hide"}


def check_installed() -> None:
    """Raises ProfilerError where what draws and fills the page is missing, with what to install."""
    missing = [name for name in ("plotly", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ProfilerError(f"the HTML page needs {' and '.join(missing)}: pip install 'slipstream-runtime[report]'")


def library() -> str:
    """plotly.js, whole, as the Python package carries it (4.8 MB): no smaller part has both kinds of tree."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def roofline(limits: Ceilings, precision: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Operations a second over operations a byte, both logarithmic: lines of the ceilings, and for each verdict a
    trace of dots, which the script fills."""
    (left, right), (bottom, top) = _window(limits, precision, rows)
    figure = _figure(margin={"l": 62, "r": 14, "t": 36, "b": 50})
    _ceilings(figure, limits, precision, left, right, LABEL * math.log10(top / bottom))
    ridge, slope = limits.ridge(precision), left * (limits.ridge(precision) / left) ** 0.75
    figure.add_scatter(
        **{"x": [ridge, ridge], "y": [bottom, limits.peak(precision)], "mode": "lines", "hoverinfo": "skip"},
        **{"showlegend": False, "line": {"color": "var(--neither)", "width": 1, "dash": "dot"}},
    )
    _label(figure, ridge, bottom, f" ridge: {quantity(ridge)}", ("left", "bottom"), OURS)
    memory_rate = f"memory: {quantity(limits.bandwidth, 'B/s')}  "
    _label(figure, slope, slope * limits.bandwidth, memory_rate, ("right", "bottom"), OURS)
    for verdict, (legend, color) in VERDICTS.items():
        marker = {"color": color, "opacity": 0.8, "line": {"width": 1, "color": "var(--surface)"}}
        figure.add_scatter(
            **{"x": [None], "y": [None], "mode": "markers", "name": legend, "meta": verdict, "marker": marker},
            hovertemplate="%{customdata}<extra></extra>",
        )
    axis: dict[str, Any] = {"type": "log", "gridcolor": "var(--grid)", "zeroline": False, "dtick": 1}
    across, up = [math.log10(left), math.log10(right)], [math.log10(bottom), math.log10(top)]
    figure.update_xaxes(**axis, title=_title("operations a byte"), range=across, exponentformat="none")
    figure.update_yaxes(**axis, title=_title("operations a second"), range=up, exponentformat="SI extended")
    bar = {"orientation": "h", "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom", "itemsizing": "constant"}
    figure.update_layout(legend=bar)
    return _plain(figure)


def flame(rows: Sequence[Row]) -> dict[str, Any]:
    """An icicle of all rows, in their order; the script gives widths, colours and what is shown on hovering."""
    figure = _figure(margin={"l": 0, "r": 0, "t": 0, "b": 0}, uniformtext=_TEXT)
    tiling = {"orientation": "v", "pad": 1}
    figure.add_icicle(
        **_tree(rows),
        sort=False,
        textposition="middle left",
        tiling=tiling,
        leaf={"opacity": 1},
        pathbar={"thickness": PATH},
    )
    return _plain(figure)


def flame_height(rows: Sequence[Row]) -> int:
    """In pixels, for the depth that the modules have."""
    depths: list[int] = []
    for row in rows:
        depths.append(1 if row["parent"] < 0 else depths[row["parent"]] + 1)
    return PATH + min(TALLEST, max(SHORTEST, LEVEL * max(depths)))


def memory(rows: Sequence[Row]) -> dict[str, Any]:
    """A tree map of all rows, filled in the same way."""
    figure = _figure(margin={"l": 0, "r": 0, "t": 0, "b": 0}, uniformtext=_TEXT)
    marker = {"pad": {"t": 22, "l": 3, "r": 3, "b": 3}, "cornerradius": 3}
    figure.add_treemap(**_tree(rows), tiling={"pad": 2}, pathbar={"thickness": PATH}, marker=marker)
    return _plain(figure)


def _ceilings(figure: Any, limits: Ceilings, precision: str, left: float, right: float, gap: float) -> None:
    """A line for each peak; precisions with the same peak share one."""
    names: dict[float, list[str]] = {}
    for name, peak in sorted(limits.flops.items(), key=lambda item: item[1]):
        names.setdefault(peak, []).append(name)
    ours = limits.peak(precision)
    # The line that counts comes last, over the others.
    for peak in sorted(names, key=lambda peak: peak == ours):
        color, width, dash = ("var(--ink)", 2, "solid") if peak == ours else ("var(--neither)", 1, "dot")
        start = max(left, left if peak == ours else min(peak, ours) / limits.bandwidth)
        ridge = min(max(peak / limits.bandwidth, start), right)
        across = [start, ridge, right]
        figure.add_scatter(
            **{"x": across, "y": [min(peak, x * limits.bandwidth) for x in across], "mode": "lines"},
            **{"hoverinfo": "skip", "showlegend": False, "line": {"color": color, "width": width, "dash": dash}},
        )
    _peak_labels(figure, names, ours, right, bandwidth=limits.bandwidth, gap=gap)


def _peak_labels(
    figure: Any, names: Mapping[float, Sequence[str]], ours: float, right: float, *, bandwidth: float, gap: float
) -> None:
    """At the right end of each line; where lines are close, one above the other, away from the one that counts."""
    above = below = math.log10(min(ours, right * bandwidth))
    for peak in sorted(names, key=lambda peak: (peak < ours, abs(math.log(peak / ours)))):
        at = math.log10(min(peak, right * bandwidth))
        if peak < ours:
            at = below = min(at, below)
            below -= gap
        else:
            at = above = max(at, above)
            above += gap
        text, anchor = (
            f"{', '.join(names[peak])}: {quantity(peak, 'FLOP/s')}",
            ("right", "top" if peak < ours else "bottom"),
        )
        _label(figure, right, 10**at, text, anchor, OURS if peak == ours else OTHER)


def _window(limits: Ceilings, precision: str, rows: Sequence[Row]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Least and most operations a byte, and operations a second, so that every dot of every phase has its place."""
    seconds, executed, moved, limit = (CELLS.index(name) for name in ("seconds", "executed", "bytes", "limit"))
    across, up = [limits.ridge(precision)], [limits.peak(precision)]
    for row in rows:
        for cell in row["own"].values():
            taken = cell[seconds] or cell[limit]
            if cell[executed] and cell[moved] and taken:
                across.append(max(LEAST_INTENSITY, intensity(cell[executed], cell[moved])))
                up.append(cell[executed] / taken)
    left, right = min(0.3, *across) / 2, max(across) * 6
    highest = max(min(peak, right * limits.bandwidth) for peak in limits.flops.values())
    # A handful of almost idle modules must not squeeze the rest.
    bottom = max(min(up), limits.peak(precision) / 1e7)
    bottom = min(bottom, left * limits.bandwidth) / 2
    ours, decades = limits.peak(precision), math.log10(highest / bottom)
    stacked = ours * 10 ** (LABEL * decades * sum(peak > ours for peak in limits.flops.values()))
    return (left, right), (bottom, max(1.5 * 10 ** (LABEL * decades) * max(highest, stacked), 2 * max(up)))


def _tree(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "ids": [str(index) for index in range(len(rows))],
        "parents": ["" if row["parent"] < 0 else str(row["parent"]) for row in rows],
        "labels": [html.escape(row["label"], quote=False) for row in rows],
        "values": [0] * len(rows),
        # A parent is as large as its own and all below it: with "total" a rounding error in a sum would empty the plot.
        "branchvalues": "remainder",
        "textinfo": "label",
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _label(figure: Any, x: float, y: float, text: str, anchor: tuple[str, str], whose: str) -> None:
    figure.add_annotation(
        **{"x": math.log10(x), "y": math.log10(y), "text": text, "xanchor": anchor[0], "yanchor": anchor[1]},
        **{"name": whose, "showarrow": False, "bgcolor": "var(--surface)"},
        font={"size": 12, "color": _INK[whose]},
    )


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}, "standoff": 8}


def _figure(**layout: Any) -> Any:
    import plotly.graph_objects as go

    clear = "rgba(0,0,0,0)"
    hover = {"bgcolor": "var(--surface)", "bordercolor": "var(--line)", "font": {"color": "var(--ink)", "size": 13}}
    return go.Figure(
        layout={
            **{"template": "none", "paper_bgcolor": clear, "plot_bgcolor": clear, "autosize": True},
            **{"modebar": {"bgcolor": clear, "color": "var(--neither)", "activecolor": "var(--ink)"}},
            **{"font": {"color": "var(--muted)", "size": 13}, "hoverlabel": {**hover, "align": "left"}},
            **layout,
        }
    )


def _plain(figure: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(figure.to_json())
    return found
