"""A live model or state dictionary as a weight source."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from engine.checkpoint.sources import take_rows
from engine.errors import CheckpointError

_versions = itertools.count(1)
"""One count for all live sources, so that no two of them, and none on disk (0), have a version in common."""


class StateDictSource:
    """The tensors of a ``state_dict`` or of a module, read as they are at that moment; nothing is copied.

    A module is looked up anew each time, so parameters that are replaced (``model.head.weight = ...``,
    ``p.data = ...``, ``model.to(...)``) are seen. A tensor that goes by several names (tied weights) is offered under
    each of them. Non-persistent buffers and extra state that is no tensor are left out, as in a saved checkpoint.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | nn.Module, label: str = "live model") -> None:
        self._tensors = tensors
        self._label = label
        self._fingerprint = self._look()
        self._version = next(_versions)

    @property
    def version(self) -> int:
        """Changes when names, addresses, shapes, dtypes or devices changed, or autograd counted a write in place.

        Not seen, because PyTorch does not count it: writes through ``tensor.data`` or ``tensor.numpy()``, by custom
        kernels that take the address, to tensors made under ``torch.inference_mode``, and memory freed and
        given out again at the same address between two looks. Call :meth:`mark_changed` after these.
        """
        fingerprint = self._look()
        if fingerprint != self._fingerprint:
            self._fingerprint = fingerprint
            self.mark_changed()
        return self._version

    def mark_changed(self) -> None:
        """Say that tensors changed in a way :attr:`version` cannot see."""
        self._version = next(_versions)

    def names(self) -> Collection[str]:
        """Every tensor's name, in the order of the state dictionary."""
        return self._state().keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape. Raises ``KeyError`` for a name that is not there."""
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._tensor(name).dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The live tensor or rows of it, detached, on its device (:meth:`ops.weights.WeightSource.read`)."""
        tensor = self._tensor(name)
        if tensor.is_meta:
            raise CheckpointError(f"{self.locate(name)}: on the meta device, without values: load the weights first")
        return take_rows(tensor.detach(), rows)

    def locate(self, name: str) -> str:
        """``live model: TENSOR``."""
        return f"{self._label}: {name}"

    def _state(self) -> dict[str, Tensor]:
        tensors = self._tensors
        state = tensors.state_dict(keep_vars=True) if isinstance(tensors, nn.Module) else tensors
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}

    def _tensor(self, name: str) -> Tensor:
        """One tensor without walking the whole module; names that a state-dict hook made take the long way."""
        if isinstance(self._tensors, nn.Module):
            owner: object = self._tensors
            for part in name.split("."):
                owner = getattr(owner, part, None)
            if isinstance(owner, nn.Parameter):
                return owner
        return self._state()[name]

    def _look(self) -> tuple[tuple[object, ...], ...]:
        return tuple(
            (name, _address(value), _writes(value), value.shape, value.stride(), value.dtype, value.device)
            for name, value in self._state().items()
        )


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _writes(tensor: Tensor) -> int:
    """How many writes in place autograd counted; inference tensors have no count."""
    return 0 if tensor.is_inference() else tensor._version
