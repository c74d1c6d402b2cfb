"""How a model is called with a batch, and where its loss is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import EngineError

#: A user's own loss, of the model's outputs and the batch.
OutputLoss = Callable[[Any, Any], Tensor]


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class Caller:
    """Calls a module with batches.

    A mapping gives keywords, of which the module gets those that its ``forward`` takes (and token types only if it has
    several: GPT-2 would add the embedding of the word 0); a tuple or list gives arguments, a tensor is the argument.
    """

    def __init__(self, module: nn.Module, device: torch.device, loss: OutputLoss | None = None) -> None:
        """``loss`` computes the loss of the outputs; None takes ``outputs.loss``, or outputs that are a scalar."""
        self.device, self.loss = device, loss
        self.outputs: Any = None
        parameters = inspect.signature(module.forward).parameters.values()
        self._names = {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}
        facts = getattr(module, "config", None)
        if facts is not None and (getattr(facts, "type_vocab_size", None) or 0) < 2:
            self._names.discard("token_type_ids")
        self._any = not self._names and any(one.kind == one.VAR_KEYWORD for one in parameters)

    def outputs_of(self, module: nn.Module, batch: Any) -> Any:
        """The module's outputs for a batch on any device."""
        return self._call(module, to_device(batch, self.device))

    def _call(self, module: nn.Module, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            known = {name: value for name, value in batch.items() if self._any or name in self._names}
            if "use_cache" in self._names:
                known.setdefault("use_cache", False)  # keys and values of all layers would be kept, for nothing
            return module(**known)
        if isinstance(batch, tuple | list) and batch and not isinstance(batch[0], str):
            return module(*batch)
        if not isinstance(batch, Tensor):
            raise EngineError(f"a batch is tensors, got {batch!r:.40}: engine.eval() comes before inference on texts")
        return module(batch)

    def loss_of(self, module: nn.Module, batch: Any) -> Tensor:
        """The mean loss, a scalar; :attr:`outputs` are those that it is of, with their ``loss``."""
        batch = to_device(batch, self.device)
        outputs = self._call(module, batch)
        found: Any
        if self.loss is not None:
            found = self.loss(outputs, batch)
        elif isinstance(outputs, Mapping):
            found = outputs.get("loss")
        else:
            found = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = f"one of shape {list(found.shape)}" if isinstance(found, Tensor) else f"{found!r:.40}".split("\n")[0]
            raise EngineError(
                f"{type(module).__name__} has to give a scalar loss, got {got}: put labels into the batch, or give "
                "Engine a loss_function(outputs, batch)"
            )
        found = found.reshape(())
        same = getattr(outputs, "loss", None) is not None and self.loss is None
        self.outputs = outputs if same else SimpleNamespace(loss=found, outputs=outputs)
        checked: Tensor = found
        return checked


def size_of(batch: Any) -> tuple[int, int]:
    """Rows and tokens of a micro-batch; 0 of what it does not tell."""
    named = batch if isinstance(batch, Mapping) else {}
    values = named.values() if named else batch if isinstance(batch, tuple | list) else [batch]
    ids = named.get("input_ids")
    first = ids if ids is not None else next((one for one in values if isinstance(one, Tensor) and one.dim()), None)
    return (0 if first is None else first.shape[0]), (0 if ids is None else ids.numel())


def split(batch: Any, size: int) -> list[Any]:
    """A batch in micro-batches of ``size`` rows, in order; a last smaller one would weigh too much and is refused."""
    rows = _rows(batch)
    if rows % size:
        raise EngineError(f"a batch of {rows} rows is no multiple of micro_batch_size, which is {size}: change one")
    return [_part(batch, slice(at, at + size)) for at in range(0, rows, size)]


def _rows(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    leaves = [batch] if isinstance(batch, Tensor) else list(values)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise EngineError(f"a batch needs tensors of one number of rows, got {sorted(sizes) or 'none'}")
    return sizes.pop()


def _part(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Mapping):
        return {name: _part(value, rows) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_part(value, rows) for value in batch)
    return batch[rows] if isinstance(batch, Tensor) and batch.dim() else batch
