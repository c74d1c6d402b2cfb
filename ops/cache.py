"""Where what was found out or compiled once is kept, and how it is written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """``$SLIPSTREAM_CACHE``, or ``~/.cache/slipstream``."""
    base = os.environ.get("SLIPSTREAM_CACHE")
    return Path(base) if base else Path.home() / ".cache" / "slipstream"


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file aside and renames it, so that a reader sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
