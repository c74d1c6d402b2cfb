"""Files of training data: paths and globs resolved, gzip opened, lines decoded; problems named by file and line."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, cast

from engine.errors import EngineError

#: Told how many more bytes of a file, as it lies on the disk, have been read.
Seen = Callable[[int], object]

#: Lines between two reports of progress.
REPORT = 1000


def resolve(paths: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """The files that ``paths`` names: a file or a glob (``*``, ``?``, ``[...]``, ``**``) each, matches sorted.

    Raises :class:`EngineError` where a path is a directory, or neither a file nor a glob that matches one.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise EngineError("no data files are given: name one or more")
    return tuple(file for path in given for file in _matches(str(path)))


def _matches(path: str) -> list[Path]:
    if Path(path).is_dir():
        raise EngineError(f"{path}: is a directory: name the files in it, for example {Path(path) / '*.jsonl'}")
    if Path(path).exists():  # also a file whose name holds brackets
        return [Path(path)]
    if not glob.has_magic(path):
        raise EngineError(f"{path}: no such file (relative names start at {Path.cwd()})")
    found = sorted(file for file in map(Path, glob.glob(path, recursive=True)) if file.is_file())
    if not found:
        raise EngineError(f"{path}: no file matches (relative names start at {Path.cwd()})")
    return found


def lines(path: Path, seen: Seen) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their line ends, and their numbers from 1; a name that ends in ``.gz`` is gzip.

    A line ends with ``\\n`` alone: a form feed or U+2028 within a text is no end of line. A byte order mark is
    dropped. Raises :class:`EngineError` for bytes that are not UTF-8, a damaged gzip file, and a file that cannot be
    read.
    """
    number = done = 0
    try:
        with path.open("rb") as raw, closing(_unzipped(path, raw)) as file:
            for number, line in enumerate(file, start=1):
                yield number, _decoded(path, number, line)
                if number % REPORT == 0:
                    done += _report(seen, raw.tell() - done)
            _report(seen, raw.tell() - done)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise EngineError(f"{path}: line {number + 1}: the gzip file is damaged: {error}") from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror or error}") from error


def _unzipped(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if path.suffix == ".gz" else raw


def _report(seen: Seen, more: int) -> int:
    seen(more)
    return more


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise EngineError(f"{path}: line {number} is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8") from error
