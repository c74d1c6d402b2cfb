"""Mixed precision: what a forward pass computes in, and the loss scale that keeps fp16 gradients above zero."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.errors import EngineError

Mode = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling: the scale grows after ``growth_interval`` steps without overflow, an overflow cuts it."""

    initial: float = 2.0**16
    growth_interval: int = 2000
    growth_factor: float = 2.0
    backoff_factor: float = 0.5


class Precision:
    """Weights, gradients and optimizer stay in fp32; bf16 and fp16 are what products are computed in (autocast)."""

    def __init__(self, mode: Mode = "fp32", device_type: str = "cpu", scale: LossScale | None = None) -> None:
        """``scale`` is for fp16; elsewhere there is nothing to scale, and giving one raises :class:`EngineError`."""
        if scale is not None and mode != "fp16":
            raise EngineError(f'a loss scale has no effect in {mode}: leave it out, or set the precision to "fp16"')
        self.mode, self.device_type = mode, device_type
        chosen = scale or LossScale()
        self._scaler = torch.amp.GradScaler(
            device_type,
            init_scale=chosen.initial,
            growth_factor=chosen.growth_factor,
            backoff_factor=chosen.backoff_factor,
            growth_interval=chosen.growth_interval,
            enabled=mode == "fp16",
        )

    def assert_trains(self, model: nn.Module) -> None:
        """Raises :class:`EngineError` if a trained weight is not in fp32 where that is needed: small updates of an fp16
        weight would be rounded away, and its gradient cannot be unscaled."""
        for name, parameter in model.named_parameters():
            if self.mode == "fp16" and parameter.requires_grad and parameter.dtype != torch.float32:
                raise EngineError(
                    f"{name} is {parameter.dtype}: training in fp16 keeps weights in fp32, load the model in float32"
                )

    def forward(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        if self.mode == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.mode == "bf16" else torch.float16
        return torch.autocast(self.device_type, dtype=dtype)

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call ``backward`` on."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Optimizer) -> None:
        """Once a step, when its gradients are complete: brings them back to their own size."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer) -> bool:
        """Changes the weights unless a gradient is infinite or NaN in fp16, and moves the scale. Whether it did."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    @property
    def scale(self) -> float:
        """What losses are multiplied by now; 1 but in fp16."""
        return float(self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """The scale and the steps since its last change; empty but in fp16."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back. Raises :class:`EngineError` if the two differ in precision."""
        if bool(state) != (self.mode == "fp16"):
            raise EngineError(f"the checkpoint {'has' if state else 'lacks'} a loss scale, this run is in {self.mode}")
        if state:
            self._scaler.load_state_dict(dict(state))
