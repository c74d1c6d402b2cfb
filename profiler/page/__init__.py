"""A report as one HTML page: text, figures and tables in a file that needs nothing else and asks no one.

``page.html.j2`` is the page, filled by Jinja, which escapes what it is given; ``summary.py`` gives its text,
``rows.py`` its tables, ``figures.py`` its plots. ``plots.js`` and ``tables.js`` are what moves on it. A policy in the
page forbids every request, and every script but these.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from profiler.judge import Judged
from profiler.page import figures, rows, summary
from profiler.page.figures import check_installed
from profiler.report import Report
from profiler.summary import executed_differs

__all__ = ["check_installed", "page"]

_PHASES = {
    "all": "All",
    "forward": "Forward",
    "recompute": "Recompute",
    "backward": "Backward",
    "step": "Optimizer",
}
_MEMORY = (("activations", "Activations"), ("parameterBytes", "Parameters"))
_SCRIPTS = ("common.js", "plots.js", "tables.js")


def page(report: Report) -> str:
    """The report as an HTML document of some 5 MB, most of it plotly's library, for a browser of 2023 or later.

    Raises:
        ProfilerError: plotly or Jinja is not installed; or the limits have no peak for the workload's precision.
    """
    check_installed()
    from jinja2 import Environment

    judged = Judged(report)
    data = _data(judged)
    scripts = [figures.library(), *map(_read, _SCRIPTS)]
    environment = Environment(autoescape=True)
    environment.filters["micro"] = _micro
    return environment.from_string(_read("page.html.j2")).render(
        **summary.text(judged),
        phases=[(phase, _PHASES[phase]) for phase in data["phases"]],
        widths=data["widths"],
        memory=data["memory"],
        flame_height=figures.flame_height(data["modules"]),
        data=_embedded(data),
        kernels=bool(data["kernels"]),
        scripts=scripts,
        hashes=[_hash(script) for script in scripts],
        style=_read("page.css"),
    )


def _data(judged: Judged) -> dict[str, Any]:
    report, modules = judged.report, rows.modules(judged)
    timed = report.timing is not None
    plots = {"flame": figures.flame(modules), "memory": figures.memory(modules)}
    if report.limits is not None:
        plots["roofline"] = figures.roofline(report.limits, report.workload.precision, modules)
    return {
        "phases": rows.phases_of(judged),
        "timed": timed,
        "judged": report.limits is not None,
        # What the reader can choose among: how wide modules are, what of memory is shown; the first to begin with.
        "widths": ([("time", "Time")] if timed else []) + [("flops", "Operations"), ("bytes", "Traffic")],
        "memory": [pair for pair in _MEMORY if modules[0][pair[0]]] or [_MEMORY[0]],
        "executes": executed_differs(judged),
        "modules": modules,
        "operators": rows.operators(judged),
        "kernels": rows.kernels(judged),
        "figures": plots,
    }


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON for a script element, which only a "<" could end."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _micro(text: str) -> str:
    """Units with the sign that a terminal may lack."""
    return re.sub(r"(?<=\d )u(?=[sJ]\b)|^u(?=[sJ]$)", "µ", text)


def _hash(script: str) -> str:
    """As a Content-Security-Policy wants it. What a browser reads has its line ends as "\\n"."""
    plain = script.replace("\r\n", "\n").replace("\r", "\n").encode()
    return f"'sha256-{base64.b64encode(hashlib.sha256(plain).digest()).decode()}'"
