"""A linear layer whose output is scaled: by way of its weight, where that is less to compute."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch.nn.functional as F
from torch import Tensor, nn

#: Scaling the output passes over rows x outputs elements, twice with the backward pass; scaling the weight over
#: inputs x outputs, and starts two more kernels. It pays from so many times as many rows as inputs.
FEWEST = 4


class Scaling(Protocol):
    """What a layer's output is multiplied by."""

    def current(self) -> Tensor | None:
        """A scalar tensor, or None while nothing is scaled."""


class _Scaled:
    """Stands before the class of a linear layer. A class and not a ``forward`` of each module's own: torch.compile
    takes modules of one class for alike, and would compile each of the others for itself."""

    scaling: Scaling
    transposed: bool
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``x``: [..., inputs]; the output [..., outputs]."""
        scale = self.scaling.current()
        if scale is None or x.numel() < FEWEST * x.shape[-1] ** 2:
            output: Tensor = super().forward(x)  # type: ignore[misc]
            return output if scale is None else output * scale
        weight, bias = self.weight * scale, None if self.bias is None else self.bias * scale
        return F.linear(x, weight.T if self.transposed else weight, bias)


_classes: dict[Any, Any] = {}


def _scaled(kind: Any) -> Any:
    if kind not in _classes:
        attributes = {"__module__": __name__, "transposed": not issubclass(kind, nn.Linear)}
        _classes[kind] = type(kind.__name__, (_Scaled, kind), attributes)
    return _classes[kind]


def is_product(module: nn.Module) -> bool:
    """Whether :class:`ScaledProduct` can scale it, or does: ``nn.Linear`` itself, or GPT-2's ``Conv1D``, the same with
    its weight transposed; and nobody else has put a ``forward`` of his own there."""
    kind = type(module)
    conv1d = f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D"
    return (kind is nn.Linear or conv1d or isinstance(module, _Scaled)) and "forward" not in module.__dict__


class ScaledProduct:
    """Has the output of a linear layer multiplied by what ``scaling`` says, until :meth:`remove`."""

    def __init__(self, module: nn.Module, scaling: Scaling) -> None:
        self._module = cast(Any, module)
        self._kind: Any = type(module)
        self._module.scaling = scaling
        self._module.__class__ = _scaled(self._kind)

    def remove(self) -> None:
        """Gives the layer its own class back, unless it has got another one since (FSDP's): that stays, with the
        scaling, which then says None."""
        if type(self._module) is _scaled(self._kind):
            self._module.__class__ = self._kind
            del self._module.scaling
