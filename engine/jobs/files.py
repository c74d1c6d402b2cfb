"""The files of a job: texts one a line, results as JSON Lines."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import EngineError
from engine.outputs import check_writable

Write = Callable[[Mapping[str, Any]], None]


def read_lines(path: str, where: str) -> tuple[str, ...]:
    """The lines of a UTF-8 text file that are not blank; ``where`` is the JSON path that names the file."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise EngineError(f"{where}: {path}: no such file (relative names start at {Path.cwd()})") from None
    except OSError as error:
        raise EngineError(f"{where}: {path}: cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EngineError(
            f"{where}: {path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}): save the file as UTF-8"
        ) from error
    # Not splitlines(): a form feed or U+2028 inside a text is no end of line.
    lines = tuple(line.removesuffix("\r") for line in text.split("\n") if line.strip())
    if not lines:
        raise EngineError(f"{where}: {path}: holds no text: write one a line")
    return lines


def check_output(path: str | None) -> None:
    """Raises if results could not be written to ``path``: before the work, not after it."""
    if path is not None:
        check_writable(path, "$.job.output: ")


@contextmanager
def results(path: str | None) -> Iterator[Write]:
    """Gives a function that writes one record as a line of JSON; without a ``path`` it writes nowhere.

    The lines go into a file beside ``path`` that takes its place at the end: whoever reads it finds the old file or all
    of the new one. After an error or an interrupt nothing is left.
    """
    if path is None:
        yield lambda record: None
        return
    check_output(path)
    target = os.path.realpath(path)
    handle, aside = tempfile.mkstemp(dir=os.path.dirname(target), prefix=f".{os.path.basename(target)}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            yield lambda record: print(json.dumps(record, ensure_ascii=False), file=file)
        os.chmod(aside, 0o666 & ~_umask())
        os.replace(aside, target)
    except BaseException:
        os.unlink(aside)
        raise


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
