"""Reading small files strictly, keeping to one directory, and telling what a file is that is not weights."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from engine.errors import CheckpointError

JSON_LIMIT = 100_000_000
"""Bytes of JSON read from a stranger at most: the limit the safetensors library sets for its header."""


class _RepeatedKey(ValueError):
    pass


def parse_json(data: bytes, where: str) -> Any:
    """``data`` as strict JSON: UTF-8, no repeated keys, no NaN. Raises ``CheckpointError`` headed by ``where``."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text (byte {error.start}){_hint(data)}") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{where}: not JSON: {error.msg} ({at}){_hint(data)}") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: not usable JSON: nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not usable JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _RepeatedKey(f"the key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file ``path``. Raises ``CheckpointError`` with line and column."""
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size:,} bytes are too many for a JSON file (limit {JSON_LIMIT:,})")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {_json_kind(value)}")
    return value


def _json_kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def what_it_is(head: bytes) -> str | None:
    """What a file is that begins with ``head`` (64 bytes are enough) and is no safetensors file, with the remedy."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return (
            "a Git LFS pointer, not the file itself: run `git lfs install && git lfs pull` in that clone, "
            "or download it with `hf download`"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page, not weights (a download that saved an error page?): download the file again"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive, as torch.save writes: name it pytorch_model.bin if that holds weights"
    if head.startswith(b"GGUF"):
        return "a GGUF file: name it with gguf_file"
    if head.startswith(b"\x80"):
        return "a Python pickle, which is not read as safetensors: name it pytorch_model.bin if torch.save wrote it"
    return None


def read_head(path: Path, count: int = 64) -> bytes:
    """The first ``count`` bytes of ``path``. Raises ``CheckpointError`` if it is empty or cannot be opened."""
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not head:
        raise CheckpointError(f"{path}: empty (0 bytes): the download or the save was cut off; fetch it again")
    return head


def file_inside(directory: Path, relative: str, named_by: str) -> Path:
    """``directory / relative``, once it is certain that it does not lead out of ``directory``.

    Symbolic links are followed. The one way out that is allowed is the hub cache's own layout, where
    ``models--org--name/snapshots/<commit>/file`` links to ``models--org--name/blobs/<hash>``. The file need not exist.
    ``named_by`` heads the error: the file or the setting that gave the name.
    """
    flavours = PurePosixPath(relative), PureWindowsPath(relative)
    leaves = any(pure.anchor or ".." in pure.parts for pure in flavours)
    if leaves or not relative or "\0" in relative:
        raise CheckpointError(f"{named_by}: {relative!r} leads out of the checkpoint's directory; not followed")
    path = directory / relative
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be followed (a loop of symbolic links?): {error}") from error
    if not any(target.is_relative_to(root) for root in _roots(directory.resolve())):
        raise CheckpointError(
            f"{path}: a symbolic link to {target}, outside of the checkpoint's directory; not followed. "
            "Copy the file into the directory"
        )
    return path


def _roots(directory: Path) -> tuple[Path, ...]:
    """Where the files of ``directory`` (resolved) may lie."""
    repository = directory.parent.parent
    if directory.parent.name == "snapshots" and repository.name.startswith("models--"):
        return directory, repository / "blobs"
    return (directory,)


def _hint(data: bytes) -> str:
    kind = what_it_is(data[:64])
    return f"; it is {kind}" if kind else ""
