"""Checkpoints in several files: an index names the file of each tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.checkpoint.files import file_inside, read_json_object
from engine.checkpoint.sources import FileSource, TensorFile
from engine.errors import CheckpointError

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(?P<suffix>safetensors|bin)")
"""How Hugging Face names a shard: ``model-00001-of-00003.safetensors``."""


def open_sharded(index: Path, open_file: Callable[[Path], TensorFile]) -> FileSource:
    """The tensors that the index ``model.safetensors.index.json`` (or of ``.bin``) lists.

    Tensors that a shard holds and the index does not list are offered too, as Hugging Face loads them. Raises
    ``CheckpointError`` for a broken index, a name that leaves the directory, shards that are missing (all at once), and
    tensors that are not in the shard the index names.
    """
    weight_map = _weight_map(index)
    shards = {name: file_inside(index.parent, name, str(index)) for name in dict.fromkeys(weight_map.values())}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: names {len(shards)} files, {len(missing)} of them missing: {listed(missing)}; fetch them again"
        )
    files = {name: open_file(path) for name, path in shards.items()}
    held = {name: frozenset(file.names()) for name, file in files.items()}
    lost = [f"{tensor} (not in {name})" for tensor, name in weight_map.items() if tensor not in held[name]]
    if lost:
        raise CheckpointError(f"{index}: maps {len(lost)} tensors to files that do not hold them: {listed(lost)}")
    holders = {tensor: files[name] for tensor, name in weight_map.items()}
    for file in files.values():
        for tensor in file.names():
            holder = holders.setdefault(tensor, file)
            if holder is not file and tensor not in weight_map:
                raise CheckpointError(f"{index}: does not say which of {holder.label} and {file.label} holds {tensor}")
    return FileSource(holders)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be an object of tensor names and file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: weight_map: {tensor}: must be a file name, is {name!r}")
    return weight_map


def missing_numbers(names: Iterable[str]) -> list[str]:
    """The shards that names like ``model-00001-of-00003.safetensors`` promise and that are not among ``names``."""
    present = frozenset(names)
    wanted: dict[str, None] = {}
    for match in filter(None, map(SHARD_NAME.fullmatch, sorted(present))):
        count = min(int(match["count"]), 10_000)
        for number in range(1, count + 1):
            wanted[f"{match['stem']}-{number:05d}-of-{match['count']}.{match['suffix']}"] = None
    return [name for name in wanted if name not in present]


def listed(items: list[str], limit: int = 10) -> str:
    """The first ``limit`` items and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
