"""The root of every error a user can cause, and the error of a bad configuration.

``SlipstreamError`` lives in the lowest layer so that each package can derive its own: ``KernelError`` in ``ops``,
``CheckpointError`` and ``EngineError`` in ``engine``. The command line prints them as lines without a traceback.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Location: TypeAlias = tuple[str | int, ...]
"""A place in a JSON document: the keys and array indices that lead to it from the top level, ``()``."""

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LONGEST_QUOTE = 80


class SlipstreamError(Exception):
    """An error the user can act on: its message says what is wrong, where, and what to change."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    ``path`` is a JSON path (``$.model.path``), or empty where the whole file is meant; ``message`` says what is wrong
    and what is allowed, in one line.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


@dataclass(frozen=True)
class Finding:
    """A problem whose place is still a location, so that it can be sorted into the order of the document."""

    location: Location
    message: str

    def problem(self) -> Problem:
        """The same with its place as a JSON path."""
        return Problem(json_path(self.location), self.message)


class ConfigError(SlipstreamError):
    """A configuration that cannot be used. Carries every problem found, not only the first."""

    def __init__(self, problems: Sequence[Problem], source: str | None = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        head = f"{source}: " if source else ""
        super().__init__("\n".join(f"{head}{problem}" for problem in self.problems))


def json_path(location: Location) -> str:
    """``("job", "texts", 0)`` as ``$.job.texts[0]``; a key that is not an identifier as ``$["a key"]``."""
    return "$" + "".join(_step(element) for element in location)


def _step(element: str | int) -> str:
    if isinstance(element, int):
        return f"[{element}]"
    return f".{element}" if _PLAIN_KEY.fullmatch(element) else f"[{quote(element)}]"


def quote(text: str) -> str:
    """``text`` as a JSON string fit for one line of a terminal: long texts cut, unprintable characters escaped."""
    shown = text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 3] + "..."
    return json.dumps(shown, ensure_ascii=not shown.isprintable())
