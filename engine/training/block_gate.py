"""A gate around one residual block: while it is set, training passes the block by or scales what the block adds.

The gate stands in the place of the block's ``forward``, so that the block's own hooks (hidden states that Hugging Face
collects, FSDP's gathering) still run, and under ``Module.__call__``, so that no caller has to change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engine.errors import EngineError
from engine.training.residual import Residual, hidden_states, output_of, trace, uncompiled
from engine.training.scaled_product import ScaledProduct, is_product

#: Structures that were traced: blocks that look the same and are called in the same way do the same.
Traces = dict[Any, Residual]


class BlockGate:
    """One block's gate: open (everything runs as without it) unless :meth:`set` and until :meth:`clear`.

    In evaluation mode the gate is open whatever is set. ``passed`` and ``executed`` count the forward calls in training
    mode since :meth:`set` that were left out and that ran.
    """

    def __init__(self, name: str, block: nn.Module, traces: Traces, shared: Collection[int]) -> None:
        """``name`` is for messages, ``traces`` are shared among the gates of a stack, ``shared`` are ids of
        submodules that stand in several blocks."""
        if "forward" in block.__dict__ and isinstance(block.__dict__["forward"], BlockGate):
            raise EngineError(f"{name} already has a layer drop: remove() that one first")
        self.name = name
        self.block = block
        self.executed = self.passed = 0
        self.residual: Residual | None = None
        self._keep: bool | None = None
        self._scale: Tensor | None = None
        self._structure: tuple[tuple[str, type[nn.Module]], ...] = ()
        self._traces = traces
        self._shared = shared
        self._hooks: list[RemovableHandle | ScaledProduct] = []
        self._own = block.__dict__.get("forward")
        self._forward = block.forward
        block.__dict__["forward"] = self

    def set(self, keep: bool, probability: float) -> None:
        """From now on: leave the block out, or run it with its branches divided by the keep ``probability``."""
        self._keep = keep
        self.executed = self.passed = 0
        # A tensor: torch.compile would compile anew for each new number. A new one each time: autograd keeps the old.
        self._scale = torch.tensor(1 / probability, dtype=torch.float64, device="cpu") if probability < 1 else None

    def clear(self) -> None:
        """Opens the gate: the block runs, unscaled."""
        self._keep = self._scale = None

    def remove(self) -> None:
        """Gives the block its own ``forward`` back."""
        self.clear()  # for code that was compiled with the hooks in it
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        if self.block.__dict__.get("forward") is self:
            del self.block.__dict__["forward"]
            if self._own is not None:
                self.block.__dict__["forward"] = self._own

    # torch.compile goes around the gate, whose answer changes from one micro-batch to the next, and into the block.
    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's ``forward``."""
        if self._keep is None or not self.block.training:
            # Not to be compiled before the hooks are there: compiled code takes no notice of hooks that come later.
            forward = torch.compiler.disable(self._forward) if self.residual is None else self._forward
            return forward(*args, **kwargs)
        hidden, residual = self._enter(args, kwargs)
        if not self._keep:
            return residual.passed_through(hidden)
        return self._leave(hidden, self._forward(*args, **kwargs), residual)

    @uncompiled
    def _enter(self, args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Residual]:
        """Counts the call; its hidden states, and what the block does with them."""
        residual = self._trace(args, kwargs)
        self.executed += bool(self._keep)
        self.passed += not self._keep
        return hidden_states(self.name, args, kwargs), residual

    @uncompiled
    def _leave(self, hidden: Tensor, output: Any, residual: Residual) -> Any:
        """The block's output, scaled if its branches were not."""
        new, _ = output_of(self.name, output, hidden)
        if self._scale is None or residual.branches:
            return output
        scaled = torch.lerp(hidden.to(new.dtype), new, float(self._scale))
        return scaled if residual.extras is None else (scaled, *output[1:])

    def _trace(self, args: Any, kwargs: Mapping[str, Any]) -> Residual:
        """What the block does when it is called so; the hooks that scale its branches are there afterwards."""
        if kwargs.get("output_attentions"):
            raise EngineError(f"{self.name} is asked for attentions, which a dropped layer cannot give: turn them off")
        form = (len(args), *[(key, v if v is None or isinstance(v, bool) else type(v)) for key, v in kwargs.items()])
        flags = tuple(value for value in args if value is None or isinstance(value, bool))
        if not self._structure:
            self._structure = tuple((name, type(module)) for name, module in self.block.named_modules())
        key = (form, flags, self._structure)
        if key not in self._traces:
            self._traces[key] = trace(self.name, self.block, self._forward, args, kwargs, self._shared)
        residual = self._traces[key]
        if self.residual is None:
            self._hooks = [self._hook(self.block.get_submodule(name)) for name in residual.branches]
        elif self.residual.branches != residual.branches:
            raise EngineError(
                f"{self.name} adds {residual.rule} in this call and {self.residual.rule} in an earlier one: call it "
                "in one way while training"
            )
        self.residual = residual
        return residual

    def _hook(self, module: nn.Module) -> RemovableHandle | ScaledProduct:
        """Has a submodule's output scaled while the gate says so."""
        if is_product(module):
            return ScaledProduct(module, self)
        return module.register_forward_hook(self._scaled)

    def current(self) -> Tensor | None:
        """What branches are multiplied by, or None."""
        return self._scale if self.block.training else None

    def _scaled(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook on a submodule that returns a branch."""
        scale = self.current()
        if scale is None:
            return None
        if isinstance(output, tuple):
            return (output[0] * scale, *output[1:])
        return output * scale
