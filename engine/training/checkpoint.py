"""Checkpoints that survive a crash and let a run go on exactly: see docs/checkpoints.md for the files.

A checkpoint is written into a directory aside, flushed and renamed. Nothing in it is pickled, so that restoring one
runs no code that came with it.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.errors import CheckpointError, EngineError
from engine.training.checkpoint_files import (
    Damaged,
    FileFacts,
    Saved,
    check,
    is_whole,
    list_saved,
    open_aside,
    prune,
    take_name,
    write_json,
    write_manifest,
)
from engine.training.checkpoint_objects import Restoring, Stateful, is_per_rank, pack
from engine.training.checkpoint_tensors import Index, read_index, read_tensors, write_tensors
from engine.training.ranks import Ranks, ranks

log = logging.getLogger("slipstream.training")
_STATE = "state.json"

__all__ = ["Checkpoints", "Stateful"]


class Checkpoints:
    """The checkpoints of one run, in one directory; the last ``keep`` whole ones stay.

    Under a process group (``group``, or the default one if there is one) every rank makes the same calls, and the
    directory must be one that all ranks see.
    """

    def __init__(self, directory: Path | str, keep: int = 3, group: dist.ProcessGroup | None = None) -> None:
        if keep < 1:
            raise EngineError(f"keep is {keep}: at least one checkpoint must stay")
        self.directory = Path(directory)
        self.keep = keep
        self._group = group

    # Saving

    def save(self, step: int, objects: Mapping[str, Stateful]) -> Path:
        """Writes the state of ``objects`` after optimizer step ``step``, and gives the checkpoint's directory.

        Raises :class:`EngineError` if it cannot be written; the checkpoints that were there still are, and nothing
        else is left. Changes no state and draws no random number.
        """
        start, team = time.perf_counter(), ranks(self._group)
        # Before anything is written: what cannot be saved is told here.
        shared, own, tensors = team.each(lambda: pack(objects, team.rank))
        state = {"ranks": team.size, "shared": shared, "per_rank": team.every(lambda: own)}
        aside: Path | None = None
        try:
            aside, target = team.first(lambda: open_aside(self.directory, step))
            files = write_tensors(aside, tensors, team)
            size = team.first(lambda: self._finish(aside, target, state, files))
        except BaseException as error:
            if aside is not None and team.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._not_saved(step, error) from error
            raise
        team.first(lambda: prune(self.directory, self.keep, log.warning))
        if team.rank == 0:
            log.info("saved step %d: %s, %s", step, target.path, _cost(size, start))
        return target.path

    def _finish(self, aside: Path, target: Saved, state: Any, files: Mapping[str, FileFacts]) -> int:
        """Writes what rank 0 writes when all tensors are there, and gives the checkpoint its name. Returns bytes."""
        files = {**files, _STATE: write_json(aside / _STATE, state)}
        write_manifest(aside, target.step, files)
        take_name(aside, target)
        return sum(facts.size for facts in files.values())

    def _not_saved(self, step: int, error: OSError) -> EngineError:
        steps = self._steps()
        last = f"the checkpoint of step {steps[-1]} is still there" if steps else "there is no earlier one"
        return EngineError(
            f"{self.directory}: the checkpoint of step {step} cannot be written: {error.strerror or error} "
            f"({error.filename or 'while writing'}); {last}: make room, or name another directory"
        )

    # Looking

    def steps(self) -> tuple[int, ...]:
        """The steps of the whole checkpoints, in the order in which they were saved. Looks at sizes, not at contents.
        Raises :class:`CheckpointError` if the directory cannot be read; one that is not there has no checkpoint."""
        return ranks(self._group).first(self._steps)

    def latest(self) -> int | None:
        """The step of the last checkpoint that is whole, or None. Reads everything once; each damaged one that is
        passed over is a warning."""
        found = ranks(self._group).first(lambda: self._newest(list_saved(self.directory)))
        return None if found is None else found[0].step

    def _steps(self) -> tuple[int, ...]:
        return tuple(saved.step for saved in list_saved(self.directory) if is_whole(saved))

    def _newest(self, candidates: list[Saved]) -> tuple[Saved, Mapping[str, FileFacts]] | None:
        for saved in reversed(candidates):
            try:
                return saved, check(saved, deep=True)
            except Damaged as reason:
                log.warning("%s: is damaged and passed over: %s", saved.path, reason)
        return None

    # Restoring

    def restore(self, objects: Mapping[str, Stateful], step: int | None = None) -> int:
        """Gives ``objects`` the state of the last whole checkpoint, or of the last one of ``step``; returns its step.

        Objects that were saved and are not asked for are left alone. Raises :class:`CheckpointError` if there is no
        such checkpoint or it is of another run (the first tensor that differs is named): nothing has changed then.
        """
        start, team = time.perf_counter(), ranks(self._group)
        saved, files = team.first(lambda: self._chosen(step))
        restoring, index = team.each(lambda: self._prepare(saved, files, objects, team))
        read_tensors(saved.path, index, restoring.targets, team)
        restoring.finish()
        if team.rank == 0:
            size = sum(facts.size for facts in files.values())
            log.info("restored step %d: %s, %s", saved.step, saved.path, _cost(size, start))
        return saved.step

    def _chosen(self, step: int | None) -> tuple[Saved, Mapping[str, FileFacts]]:
        if not self.directory.exists():
            raise CheckpointError(f"{self.directory}: no such directory, so there is no checkpoint to go on from")
        there = list_saved(self.directory)
        found = self._newest([saved for saved in there if step in (None, saved.step)])
        if found is not None:
            return found
        whole = ", ".join(map(str, self._steps()))
        if step is not None:
            raise CheckpointError(
                f"{self.directory}: has no whole checkpoint of step {step}: "
                + (f"there are those of steps {whole}" if whole else "there is none at all")
            )
        if list_saved(self.directory.resolve().parent) and (self.directory / _STATE).exists():
            raise CheckpointError(f"{self.directory}: is one checkpoint: name the directory that it lies in")
        what = f"{len(there)} checkpoints, all damaged" if there else "no checkpoint"
        raise CheckpointError(f"{self.directory}: holds {what}")

    def _prepare(
        self, saved: Saved, files: Mapping[str, FileFacts], objects: Mapping[str, Stateful], team: Ranks
    ) -> tuple[Restoring, Index]:
        """Checks everything that can be checked before anything changes."""
        try:
            index = read_index(saved.path, files)
            document = json.loads((saved.path / _STATE).read_bytes())
            shared, per_rank = document["shared"], document["per_rank"]
        except OSError as error:
            raise CheckpointError(f"{saved.path}: cannot be read: {error.strerror} ({error.filename})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{saved.path}: is not as slipstream writes it: {error}") from error
        own = per_rank[team.rank] if team.rank < len(per_rank) else None
        wanted = dict(objects)
        for name, item in objects.items():
            if is_per_rank(item) and own is None:
                log.warning("%s: has no %s of rank %d: it keeps what it has", saved.path, name, team.rank)
                del wanted[name]
            elif name not in ((own or {}) if is_per_rank(item) else shared):
                raise CheckpointError(f"{saved.path}: has no {name}: it is of another run")
        each = {name: (own if own and is_per_rank(item) else shared)[name] for name, item in wanted.items()}
        return Restoring(saved.path, each, per_rank, wanted, index), index


def _cost(size: int, start: float) -> str:
    return f"{size / 1e6:,.1f} MB in {time.perf_counter() - start:.2f} s"
