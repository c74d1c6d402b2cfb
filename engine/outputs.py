"""Whether results could be written: asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import EngineError


def check_writable(path: Path | str, where: str, *, makes_directories: bool = False) -> None:
    """Raises EngineError if a file could not be written there.

    Args:
        where: who names it, as the message begins: ``"--json "``, ``"$.job.output: "``.
        makes_directories: whoever writes makes directories that are missing.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise EngineError(f"{where}{path}: is not a file: give the name of one")
    parent = target.parent
    while makes_directories and not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise EngineError(f"{where}{path}: there is no directory {parent}: make it, or give another name")
    if not os.access(parent, os.W_OK):
        raise EngineError(f"{where}{path}: the directory {parent} is not writable")
