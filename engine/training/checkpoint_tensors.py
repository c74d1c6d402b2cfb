"""Tensors in a checkpoint: torch.distributed.checkpoint (DCP) plans who writes what, this file does the writing.

DCP's own file format needs pickle: its ``.metadata`` is unpickled without limits when a checkpoint is opened, and
values that are no tensors are ``torch.load(weights_only=False)``. Here each rank writes its tensors' bytes one after
another into ``tensors-RANK.bin``, and what DCP must know to read them again is JSON, in ``tensors.json``: for each
tensor its dtype, shape and the pieces that it lies in. Reading maps the files and copies just the parts that this
rank needs, whatever number of ranks wrote them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from engine.training.checkpoint_files import FileFacts, new_file, write_json
from engine.training.ranks import Ranks

INDEX = "tensors.json"
_ALIGN = 64
_DTYPES = {str(found).removeprefix("torch."): found for found in vars(torch).values() if isinstance(found, torch.dtype)}


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor, contiguous in ``file`` from byte ``start``; ``offsets`` and ``shape`` say which piece."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Entry:
    """A whole tensor: its pieces cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


Index = Mapping[str, Entry]


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, FileFacts]:
    """Writes tensors and index into ``directory``, and gives the files' facts, on every rank.

    Every rank gives its tensors: a DTensor of which it holds a part, a plain tensor that all ranks have alike under
    one name (written once), or one under a name of its own. Raises ``OSError`` on every rank if one cannot write.
    """
    writer = _Writer(directory, ranks.rank)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _call(save, ranks, dict(tensors), storage_writer=writer, planner=planner)
    return {name: facts for part in ranks.every(lambda: writer.written) for name, facts in part.items()}


def read_tensors(directory: Path, index: Index, targets: dict[str, Tensor], ranks: Ranks) -> None:
    """Fills ``targets``, which have the shapes of the index, each rank its own; dtypes are converted."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    _call(load, ranks, targets, storage_reader=_Reader(directory, index), planner=planner)


def mapped(directory: Path, name: str, index: Index) -> Tensor:
    """A tensor that lies in one piece, over the mapped file: what is not looked at is not read. Raises ``KeyError``
    where there is none of that name."""
    entry = index[name]
    if not entry.chunks:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return _Reader(directory, index).piece(MetadataIndex(name, torch.Size(entry.chunks[0].offsets)))


def _call(function: Callable[..., Any], ranks: Ranks, tensors: dict[str, Tensor], **keywords: Any) -> None:
    """DCP without its remark that there is no process group, and with the error that it wraps."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            function(tensors, process_group=ranks.group, no_dist=ranks.alone, **keywords)
    except CheckpointException as error:
        # A BaseException. One rank's failure is shown to all; it is the same few words on each.
        raise min(error.failures.items())[1][0] from None


def read_index(directory: Path, files: Mapping[str, FileFacts]) -> Index:
    """The index of a checkpoint with these files. Raises ``ValueError``, ``KeyError`` or ``TypeError`` if it is none,
    and so for any piece that does not lie inside its file: what is read later is in bounds."""
    document = json.loads((directory / INDEX).read_bytes())
    return {name: _entry(name, found, files) for name, found in document.items()}


def _entry(name: str, found: Mapping[str, Any], files: Mapping[str, FileFacts]) -> Entry:
    chunks = tuple(Chunk(tuple(c["offsets"]), tuple(c["shape"]), c["file"], c["start"]) for c in found["chunks"])
    entry = Entry(_DTYPES[found["dtype"]], tuple(found["shape"]), chunks)
    for chunk in chunks:
        size = math.prod(chunk.shape) * entry.dtype.itemsize
        inside = chunk.start >= 0 and chunk.start + size <= files[chunk.file].size
        corner = zip(chunk.offsets, chunk.shape, entry.shape, strict=True)
        if not inside or any(start < 0 or length < 0 or start + length > whole for start, length, whole in corner):
            raise ValueError(f"{INDEX}: a piece of {name} lies outside")
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(entry.shape):
        raise ValueError(f"{INDEX}: the pieces of {name} do not make it up")
    return entry


class _Writer(StorageWriter):
    """DCP's calls, in its order: each rank writes one file, then the coordinator the index."""

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        self.written: dict[str, FileFacts] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The directory is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's pieces, one at a time through host memory."""
        name = f"tensors-{self._rank:05d}.bin"
        results = []
        with new_file(self._directory / name) as file:
            for item in plan.items:
                file.write(bytes(-file.size % _ALIGN))
                chunk = _chunk(item, name, file.size)
                data = _bytes(planner.resolve_data(item))
                file.write(data)
                results.append(WriteResult(index=item.index, size_in_bytes=len(data), storage_data=chunk))
        self.written[name] = file.facts
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the index: on the coordinator, when all pieces are on the disk."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for result in (result for part in results for result in part):
            if math.prod(result.storage_data.shape):  # a rank may hold an empty part of a short tensor
                chunks[result.index.fqn].append(result.storage_data)
        document = {
            name: {
                "dtype": str(found.properties.dtype).removeprefix("torch."),
                "shape": list(found.size),
                "chunks": [vars(chunk) for chunk in chunks[name]],
            }
            for name, found in metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }
        self.written[INDEX] = write_json(self._directory / INDEX, document)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A directory; DCP asks only where it chooses the writer."""
        return True


def _chunk(item: WriteItem, file: str, start: int) -> Chunk:
    assert item.tensor_data is not None, "only tensors are saved"
    return Chunk(tuple(item.tensor_data.chunk.offsets), tuple(item.tensor_data.chunk.sizes), file, start)


def _bytes(tensor: Any) -> memoryview:
    """The elements in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class _Reader(StorageReader):
    """DCP's calls, in its order: the index in DCP's words, then the parts that this rank asked for."""

    def __init__(self, directory: Path, index: Index) -> None:
        self._directory, self._index = directory, index
        self._maps: dict[str, mmap.mmap] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What DCP needs to plan."""
        return Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in entry.chunks],
                )
                for name, entry in self._index.items()
            },
            storage_data=None,
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The index is all there is to know."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies each part from the mapped files to where it belongs."""
        for item in plan.items:
            found = self.piece(item.storage_index)
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                found = found.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(found)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def piece(self, index: MetadataIndex) -> Tensor:
        """A piece as a tensor over the mapped file."""
        entry = self._index[index.fqn]
        offsets = index.offset if index.offset is not None else (0,) * len(entry.shape)
        chunk = next(chunk for chunk in entry.chunks if chunk.offsets == tuple(offsets))
        if chunk.file not in self._maps:
            with (self._directory / chunk.file).open("rb") as file:
                # Copy-on-write: torch has no read-only tensors.
                self._maps[chunk.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(
            self._maps[chunk.file], dtype=entry.dtype, count=math.prod(chunk.shape), offset=chunk.start
        )
        return flat.reshape(chunk.shape)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """A directory; DCP asks only where it chooses the reader."""
        return True
