"""Results to stdout, progress to stderr: what is piped on holds results alone."""

from __future__ import annotations

import os
import shutil
import time
import unicodedata
from typing import TextIO

#: Seconds between two updates of the progress line.
REFRESH = 0.1

#: A model may emit control characters, with which a text could steer the terminal that shows it.
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Console:
    """Writes results to ``out`` as they come and keeps one live progress line on ``err``, if that is a terminal.

    Where both are terminals and a line of text is unfinished, the progress stands one row below it: the cursor is
    saved, the row is written, the cursor is put back (the DEC sequences ESC 7 and ESC 8, which terminals know).
    """

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self.out, self.err = out, err
        self._live = err.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._shown = out.isatty()
        self._column = 0
        self._drawn = ""
        self._next = 0.0

    def write(self, text: str) -> None:
        """Shows a piece of a result at once."""
        if not text:
            return
        self._erase()
        _, newline, tail = text.rpartition("\n")
        # Before the text goes out: an interrupt right behind it must find that a line is unfinished.
        self._column = display_width(tail) + (0 if newline else self._column)
        self.out.write(text.translate(CONTROLS) if self._shown else text)
        self.out.flush()

    def line(self, text: str = "") -> None:
        """Shows a whole line of a result."""
        self.write(f"{text}\n")

    def end_line(self) -> None:
        """Ends the line of text if it is unfinished."""
        if self._column:
            self.write("\n")

    def status(self, text: str) -> None:
        """Redraws the progress line: after each result, between results at most ten times a second."""
        now = time.monotonic()
        if not self._live or (self._drawn and now < self._next):
            return
        self._next = now + REFRESH
        columns = shutil.get_terminal_size().columns
        text = fit(text, columns - 1)
        below = self._shown and self._column > 0
        if below and self._column % columns in (0, columns - 1):
            return  # at the margin a terminal holds back a line break, which saving the cursor could lose
        if below:
            # ESC D makes sure of a row below, scrolling if the cursor is on the last one.
            self._draw("\x1bD\x1b[A\x1b7\x1b[B\r\x1b[K" + text + "\x1b8", "\x1b7\x1b[B\r\x1b[K\x1b8")
        else:
            self._draw("\r\x1b[K" + text, "\r\x1b[K")

    def note(self, text: str) -> None:
        """Leaves a line on stderr: what was done, how fast."""
        self.close()
        print(text, file=self.err, flush=True)

    def close(self) -> None:
        """Takes the progress line away and leaves the cursor at the start of a line."""
        self._erase()
        if self._column:
            self.out.write("\n")
            self.out.flush()
            self._column = 0

    def _draw(self, sequence: str, eraser: str) -> None:
        self.err.write(sequence)
        self.err.flush()
        self._drawn = eraser

    def _erase(self) -> None:
        if self._drawn:
            self._draw(self._drawn, "")


def display_width(text: str) -> int:
    """Columns that ``text`` takes on a terminal: wide characters take two, combining ones none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)


def one_line(text: str) -> str:
    """``text`` on one line: control characters, line breaks and runs of spaces are one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def fit(text: str, width: int) -> str:
    """``text`` on one line of at most ``width`` columns, cut with dots."""
    line = one_line(text)
    if display_width(line) <= width:
        return line
    while line and display_width(line) > max(width - 3, 0):
        line = line[:-1]
    return line.rstrip() + "..."[:width]
