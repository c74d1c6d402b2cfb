"""Tables of 100 columns: numbers keep their width, the names give way, in their middle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest

from tabulate import tabulate
from wcwidth import wcswidth, wcwidth

WIDTH = 100
_GAP = 2
_ELLIPSIS = "..."
#: Stands for a space while tabulate draws, which takes spaces off; no text has it, as it is not for printing.
_HARD = "\ue000"
_BRANCHES = re.compile(r"[│├└─ ]*")


def display_width(text: str) -> int:
    """Columns of a terminal; signs that are not for printing have none."""
    width = wcswidth(text)
    return width if width >= 0 else sum(max(0, wcwidth(sign)) for sign in text)


def one_line(text: str) -> str:
    """The text with a space for whatever would break a line or steer a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def elide(text: str, width: int) -> str:
    """At most ``width`` columns: the middle goes, as beginnings and ends tell names apart. Branches of a tree that
    stand before the name stay, where there is room."""
    line = one_line(text)
    if display_width(line) <= width:
        return line
    branches = _BRANCHES.match(line)
    kept = branches.group() if branches and len(branches.group()) < width // 2 else ""
    line, room = line[len(kept) :], width - len(kept) - len(_ELLIPSIS)
    if room <= 0:
        return _cut(kept + line, max(width, 0))
    head = _cut(line, room // 2)
    tail = _cut(line[::-1], room - display_width(head))[::-1]
    return kept + head + _ELLIPSIS + tail


def _cut(text: str, width: int) -> str:
    taken = 0
    for at, sign in enumerate(text):
        taken += max(0, wcwidth(sign))
        if taken > width:
            return text[:at]
    return text


def fill(sentence: str, first: str = "", rest: str = "") -> str:
    """The sentence's words in lines of at most ``WIDTH`` columns, the first after ``first``, the others after ``rest``.
    A word that is longer than a line is elided."""
    lines, line = [], first
    begun = False
    for word in one_line(sentence).split():
        if begun and display_width(line) + 1 + display_width(word) > WIDTH:
            lines.append(line)
            line, begun = rest, False
        line += (" " if begun else "") + elide(word, WIDTH - display_width(line))
        begun = True
    return "\n".join([*lines, line])


def grid(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> str:
    """``rows`` under ``headers``, at most ``WIDTH`` columns wide: the columns ``texts`` are names and share what the
    others, which are numbers and stand at the right, leave. A header may have several lines."""
    columns = list(zip(headers, *rows, strict=True))
    widths = [max([*map(display_width, header.split("\n")), *map(display_width, cells)]) for header, *cells in columns]
    room = WIDTH - _GAP * (len(headers) - 1) - sum(width for at, width in enumerate(widths) if at not in texts)
    for done, at in enumerate(sorted(texts, key=lambda at: widths[at])):
        widths[at] = min(widths[at], room // (len(texts) - done))
        room -= widths[at]
    cells = [[elide(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    # Headings are rows of our own: tabulate would make their columns two wider than they are.
    above = [list(line) for line in zip_longest(*(header.split("\n") for header in headers), fillvalue="")]
    lines = [[cell.replace(" ", _HARD) for cell in row] for row in [*above, ["-" * width for width in widths], *cells]]
    align = ["left" if at in texts else "right" for at in range(len(headers))]
    drawn = tabulate(lines, tablefmt="plain", colalign=align, disable_numparse=True)
    return "\n".join(line.replace(_HARD, " ").rstrip() for line in drawn.splitlines())
