"""Tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from engine.jobs.console import display_width, fit, one_line

WIDTH = 80
GAP = 2
#: tabulate makes a column this much wider than its heading.
HEADING = 2


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int]) -> str:
    """``rows`` under ``headers``, at most WIDTH columns wide: the columns ``texts`` give way, others are numbers."""
    lines = [[one_line(cell) for cell in row] for row in rows]
    columns = zip(headers, *lines, strict=True)
    widths = [max(display_width(header) + HEADING, *map(display_width, column)) for header, *column in columns]
    room = WIDTH - GAP * (len(headers) - 1) - sum(width for at, width in enumerate(widths) if at not in texts)
    for done, at in enumerate(sorted(texts, key=lambda at: widths[at])):
        widths[at] = min(widths[at], room // (len(texts) - done))
        room -= widths[at]
    cells = [[fit(cell, width) for cell, width in zip(row, widths, strict=True)] for row in lines]
    align = ["left" if at in texts else "right" for at in range(len(headers))]
    drawn = tabulate(cells, headers, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in drawn.splitlines())
