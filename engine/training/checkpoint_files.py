"""A directory of checkpoints on the disk: names, manifests, what is whole, and writing that survives a crash.

A checkpoint is a directory that took its name by a rename once everything in it was flushed; its manifest, written
last, lists each file with size and checksum.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import CheckpointError

#: The version of the layout of a checkpoint's files. Readers refuse a newer one.
FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"save-(\d{6,})-step-(\d{8,})")
_SAVING, _REMOVING = ".saving-", ".removing-"
_PIECE = 1 << 24


class Damaged(Exception):
    """Why a directory is no whole checkpoint: the message names the file."""


@dataclass(frozen=True)
class FileFacts:
    """size: bytes; crc32: checksum of all of them (zlib)."""

    size: int
    crc32: int


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint's directory. ``save`` counts the saves into the parent directory, so it orders them in time even
    where training went back to an earlier ``step``."""

    save: int
    step: int
    path: Path

    @classmethod
    def named(cls, parent: Path, save: int, step: int) -> Saved:
        """The one with the directory's name for these two numbers."""
        return cls(save, step, parent / f"save-{save:06d}-step-{step:08d}")


class NewFile:
    """A file that is written once from start to end: counts bytes and their checksum, and flushes to the disk."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size = 0
        self._crc32 = 0

    def write(self, data: bytes | memoryview) -> None:
        """Appends. ``data`` is one contiguous run of bytes."""
        self._file.write(data)
        self.size += len(data)
        self._crc32 = zlib.crc32(data, self._crc32)

    @property
    def facts(self) -> FileFacts:
        """Of what was written so far."""
        return FileFacts(self.size, self._crc32)


@contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """A :class:`NewFile` at ``path``, where nothing may be yet; on the disk when the block ends without an error."""
    with path.open("xb") as file:
        yield NewFile(file)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, document: Any) -> FileFacts:
    """Writes ``document`` to the new file ``path``."""
    with new_file(path) as file:
        file.write(_canonical(document))
        return file.facts


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Listing and checking


def list_saved(parent: Path) -> list[Saved]:
    """The checkpoints in ``parent`` by name, in the order in which they were saved; no look inside. A directory that
    is not there has none. Raises :class:`CheckpointError` if it is none or cannot be read."""
    try:
        names = [entry.name for entry in os.scandir(parent)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent}: checkpoints cannot be looked for here: {error.strerror}") from error
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return sorted(Saved(int(match[1]), int(match[2]), parent / match[0]) for match in matches)


def check(saved: Saved, deep: bool) -> Mapping[str, FileFacts]:
    """The files of a whole checkpoint. Raises :class:`Damaged` if something is missing or has another size, or, with
    ``deep``, which reads everything once, another checksum; :class:`CheckpointError` if its format is newer."""
    files = _read_manifest(saved)
    for name, facts in files.items():
        try:
            size = (saved.path / name).stat().st_size
            if size != facts.size:
                raise Damaged(f"{name} has {size:,} bytes instead of {facts.size:,}")
            if deep and _crc32(saved.path / name) != facts.crc32:
                raise Damaged(f"the checksum of {name} is wrong")
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from error
    return files


def is_whole(saved: Saved) -> bool:
    """Whether all files are there with their sizes."""
    try:
        check(saved, deep=False)
    except Damaged:
        return False
    return True


def write_manifest(directory: Path, step: int, files: Mapping[str, FileFacts]) -> None:
    """Writes the file that makes a directory a checkpoint: last, when the others are on the disk."""
    body = {"format": FORMAT, "step": step, "files": {name: asdict(facts) for name, facts in sorted(files.items())}}
    write_json(directory / MANIFEST, {**body, "crc32": zlib.crc32(_canonical(body))})


def _read_manifest(saved: Saved) -> dict[str, FileFacts]:
    """The files that the manifest lists."""
    try:
        document = json.loads((saved.path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise Damaged(f"{MANIFEST} is no JSON") from error
    version = document.get("format") if isinstance(document, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise CheckpointError(
            f"{saved.path}: is in format {version}, and this version of slipstream reads up to format {FORMAT}: "
            "use the version that wrote it, or a newer one"
        )
    if version != FORMAT or document.pop("crc32", None) != zlib.crc32(_canonical(document)):
        raise Damaged(f"the checksum of {MANIFEST} is wrong")
    try:
        step, files = document["step"], {name: FileFacts(**facts) for name, facts in document["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is not as slipstream writes it") from error
    if step != saved.step:
        raise Damaged(f"{MANIFEST} is of step {step}")
    if any(os.path.basename(name) != name for name in files):
        raise Damaged(f"{MANIFEST} names files elsewhere")
    return files


def _crc32(path: Path) -> int:
    found = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            found = zlib.crc32(piece, found)
    return found


def _canonical(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


# Writing aside, taking the name, removing


def open_aside(parent: Path, step: int) -> tuple[Path, Saved]:
    """Makes an empty directory to write into and says which checkpoint it shall become. What earlier crashes left is
    removed first. ``parent`` is made if need be."""
    parent.mkdir(parents=True, exist_ok=True)
    for entry in list(os.scandir(parent)):
        if entry.name.startswith((_SAVING, _REMOVING)):
            shutil.rmtree(entry.path)
    last = max((saved.save for saved in list_saved(parent)), default=0)
    target = Saved.named(parent, last + 1, step)
    aside = parent / f"{_SAVING}{target.path.name}"
    aside.mkdir()
    return aside, target


def take_name(aside: Path, target: Saved) -> None:
    """Turns a finished directory into the checkpoint: names first, then one rename."""
    sync_directory(aside)
    if target.path.exists():  # a rename over an empty directory would succeed
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(target.path))
    aside.rename(target.path)
    sync_directory(target.path.parent)


def prune(parent: Path, keep: int, warn: Callable[[str], None]) -> None:
    """Removes what is older than the last ``keep`` whole checkpoints. One that cannot be removed is a warning."""
    whole = 0
    for saved in reversed(list_saved(parent)):
        if whole < keep:
            whole += is_whole(saved)
            continue
        try:
            # Under its name it is whole or gone, also if this process dies half-way.
            gone = saved.path.rename(parent / f"{_REMOVING}{saved.path.name}")
            shutil.rmtree(gone)
        except OSError as error:
            warn(f"{saved.path}: an old checkpoint cannot be removed: {error.strerror}")
