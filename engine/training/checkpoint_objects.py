"""The objects of a training run in a checkpoint: their state taken apart for saving, checked and put together again.

Modules must have the tensors that were saved, by name and shape. An optimizer must be of the same class over
parameters of the same shapes, a scheduler of the same class. Any other object judges its own state.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.errors import CheckpointError
from engine.training.checkpoint_state import Encoder, Path, decode, tensors_in
from engine.training.checkpoint_tensors import Entry, Index, mapped

log = logging.getLogger("slipstream.training")


class Stateful(Protocol):
    """What can be saved: torch's modules, optimizers and schedulers, the loop, and whatever has these two methods.

    With an attribute ``per_rank = True`` each rank's state is saved apart; else all ranks have the same one (or, in
    DTensors, parts of the same one) and rank 0's is saved.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """All that the object needs to go on from here."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Takes :meth:`state_dict`'s result back."""


@runtime_checkable
class Split(Protocol):
    """A :class:`Stateful` whose ranks share one part of their state and have another one each to themselves: a
    compressed optimizer with its errors. It is given back the parts of all ranks of the run that was saved."""

    def split_ranks(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A ``state_dict`` as what all ranks share, and what is this one's own."""

    def join_ranks(self, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What ``load_state_dict`` takes. ``own``: of each rank of that run, in their order; the tensors of it are
        mapped files, to be copied."""


def is_per_rank(item: Stateful) -> bool:
    """Whether each rank's state is saved apart."""
    return bool(getattr(item, "per_rank", False))


def pack(objects: Mapping[str, Stateful], rank: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """State of the objects that ranks share, state of those that are this rank's own (both JSON), and the tensors."""
    encoder = Encoder()
    shared: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, item in objects.items():
        apart: Path = (f"rank-{rank:05d}", name)
        place: Path = apart if is_per_rank(item) else (name,)
        state = item.state_dict()
        if isinstance(item, Split):
            state, mine = item.split_ranks(state)
            own[name] = {"class": type(item).__name__, "state": encoder.encode(mine, apart)}
        found = {"class": type(item).__name__, "state": encoder.encode(dict(state), place)}
        if isinstance(item, nn.Module):
            found["versions"] = encoder.encode(dict(getattr(state, "_metadata", {})), place)
        if isinstance(item, Optimizer):
            found["parameters"] = [list(parameter.shape) for parameter in _parameters(item)]
        (own if is_per_rank(item) else shared)[name] = found
    return shared, own, encoder.tensors


class Restoring:
    """Puts the state of objects together again: names the tensors to read, then hands the states over.

    ``saved`` holds for each object what :func:`pack` wrote, ``per_rank`` what it wrote for each rank. Raises
    :class:`CheckpointError` where an object is not the one that was saved; no object is changed by that.
    """

    def __init__(
        self,
        path: FilePath,
        saved: Mapping[str, Any],
        per_rank: Sequence[Mapping[str, Any]],
        objects: Mapping[str, Stateful],
        index: Index,
    ) -> None:
        self._path, self._index, self._per_rank = path, index, per_rank
        self._copies: list[tuple[Tensor, str]] = []
        self._states: list[tuple[Stateful, Any]] = []
        #: Where to read each tensor to.
        self.targets: dict[str, Tensor] = {}
        for name, item in objects.items():
            self._states.append((item, self._state(name, item, saved[name])))

    def finish(self) -> None:
        """Hands the states to the objects: call when the targets are filled."""
        for tensor, name in self._copies:
            tensor.copy_(self.targets[name])
        for item, state in self._states:
            item.load_state_dict(state)

    def _state(self, name: str, item: Stateful, found: Mapping[str, Any]) -> Any:
        """The object's state, with tensors to be filled: its own ones where they fit, which saves memory."""
        here = tensors_in(item.state_dict())
        likes: dict[int, Tensor] = {}
        if isinstance(item, nn.Module):
            self._check_module(name, here, found["state"])
        if isinstance(item, Optimizer | LRScheduler) and found["class"] != type(item).__name__:
            raise self._error(f"{name} is of class {found['class']} in the checkpoint and {type(item).__name__} here")
        if isinstance(item, Optimizer):
            self._check_optimizer(name, item, found["parameters"])
            likes = dict(enumerate(_parameters(item)))

        def target(tensor: str, path: Path) -> Tensor:
            is_state = len(path) == 3 and path[0] == "state"
            chosen = _target(self._index[tensor], here.get(path), likes.get(path[1]) if is_state else None)
            if tensor in self.targets:
                self._copies.append((chosen, tensor))
            else:
                self.targets[tensor] = chosen
            return chosen

        try:
            state = decode(found["state"], (), target)
            if isinstance(item, nn.Module):
                # load_state_dict looks here for the versions of the modules that wrote the tensors.
                state = OrderedDict(state)
                state._metadata = decode(found["versions"], (), target)  # type: ignore[attr-defined]
            if isinstance(item, Split):
                own = [decode(each[name]["state"], (), self._mapped) for each in self._per_rank]
                return item.join_ranks(state, own)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self._path}: {name} is not as slipstream writes it: {error}") from error
        return state

    def _mapped(self, tensor: str, path: Path) -> Tensor:
        """Read as it is looked at: no rank needs all of what all ranks had."""
        return mapped(self._path, tensor, self._index)

    def _check_module(self, name: str, own: Mapping[Path, Tensor], state: Mapping[str, Any]) -> None:
        here = {path[0]: tensor for path, tensor in own.items() if len(path) == 1}
        saved = {
            key: self._index[node["$tensor"]]
            for key, node in state.items()
            if isinstance(node, dict) and "$tensor" in node
        }
        for key in here:
            if key not in saved:
                raise self._error(f"{name}: the model here has the tensor {key}, the checkpoint has not")
        for key, entry in saved.items():
            if key not in here:
                raise self._error(f"{name}: the checkpoint has the tensor {key}, the model here has not")
            shape = tuple(here[key].shape)
            if entry.shape != shape:
                raise self._error(
                    f"{name}: the tensor {key} has the shape {list(entry.shape)} in the checkpoint and {list(shape)} "
                    "in the model here"
                )
        other = [key for key, entry in saved.items() if entry.dtype != here[key].dtype]
        if other:
            log.warning(
                "%s: %s: %s is %s in the checkpoint and %s here (%d tensors in all): converted",
                *(self._path, name, other[0], saved[other[0]].dtype, here[other[0]].dtype, len(other)),
            )

    def _check_optimizer(self, name: str, optimizer: Optimizer, saved: list[list[int]]) -> None:
        here = [list(parameter.shape) for parameter in _parameters(optimizer)]
        if len(saved) != len(here):
            raise self._error(f"{name} has {len(saved)} parameters in the checkpoint and {len(here)} here")
        for number, (old, new) in enumerate(zip(saved, here, strict=True)):
            if old != new:
                raise self._error(f"{name}: parameter {number} has the shape {old} in the checkpoint and {new} here")

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {message}: it is of another run")


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    """In the order in which an optimizer's state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _target(entry: Entry, own: Tensor | None, like: Tensor | None) -> Tensor:
    """Where to read a tensor to: the object's own one; else one like the parameter whose state it is (an optimizer
    that has made no step has none, and a sharded one must be read in parts); else a new one."""
    if own is not None and tuple(own.shape) == entry.shape and own.dtype == entry.dtype:
        return own.detach()
    if own is not None and isinstance(own, DTensor) and tuple(own.shape) == entry.shape:
        return torch.empty_like(own, dtype=entry.dtype)
    if like is not None and tuple(like.shape) == entry.shape:
        return torch.empty_like(like, dtype=entry.dtype, requires_grad=False)
    return torch.empty(entry.shape, dtype=entry.dtype, device="cpu" if own is None else own.device)
