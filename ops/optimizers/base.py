"""What optimizers with Adam's moments share: checked options, state that survives a checkpoint, batches."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from config_schema.errors import SlipstreamError
from ops.optimizers.batch import BATCH_ELEMENTS, HALF, TRAINABLE, Batch, batches, compute_dtype, ensure_state
from ops.optimizers.moments import ARITHMETIC, Arithmetic

_FOREACH_DEVICES = ("cuda", "xpu")


class OptimizerError(SlipstreamError, ValueError):
    """An option, parameter, gradient or loaded state that the optimizer cannot work with: the message names it."""


class MomentOptimizer(Optimizer, ABC):
    """Base of optimizers with first and second moments. A subclass gives ``defaults`` and writes :meth:`update`.

    The options lr, betas, eps, weight_decay, maximize and foreach are checked here for every group; a subclass adds
    its own in :meth:`check_options`.
    """

    #: Elements that the multi-tensor path takes at a time.
    batch_elements: ClassVar[int] = BATCH_ELEMENTS
    #: Tensors of a parameter's state that have its shape.
    shaped_state: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "master_weight")

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, with options of its own where the optimizer's should not hold.

        Raises :class:`OptimizerError` for an option out of its range or a parameter that cannot be trained; the
        optimizer is then as it was.
        """
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        try:
            self.check_options(self.param_groups[index], "" if index == 0 else f" (group {index})")
            for position, parameter in enumerate(self.param_groups[index]["params"]):
                if parameter.dtype not in TRAINABLE:
                    name = self.name_of(index, position)
                    raise self.error(f"{name} is {parameter.dtype}: fp32, fp64, bf16 and fp16 can be trained")
        except OptimizerError:
            del self.param_groups[index]
            raise

    def check_options(self, options: Mapping[str, Any], where: str) -> None:
        """Raises :class:`OptimizerError` for an option out of its range; ``where`` ends the part that names it."""
        rate, betas = options["lr"], options["betas"]
        if isinstance(rate, Tensor):
            if rate.numel() != 1 or not rate.is_floating_point():
                raise self.error(f"lr{where} is a {rate.dtype} tensor of {rate.numel()} elements: use one float")
            rate = rate.item()
        self.check_number("lr", rate, where)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise self.error(f"betas{where} are {betas!r}: use two numbers")
        for index, beta in enumerate(betas):
            self.check_number(f"betas[{index}]", beta, where, below=1.0)
        self.check_number("eps", options["eps"], where)
        self.check_number("weight_decay", options["weight_decay"], where)
        self.check_choice("maximize", options["maximize"], where, (True, False))
        self.check_choice("foreach", options["foreach"], where, (None, True, False))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        closure: computes the loss and its gradients anew, is called once before the update; its loss is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @abstractmethod
    def update(self) -> None:
        """One step on the gradients that are there. To be written without autograd and out of torch.compile's sight."""

    def check_number(self, name: str, value: object, where: str, below: float = math.inf) -> None:
        """Raises :class:`OptimizerError` unless ``value`` is a number from 0 up to, not including, ``below``."""
        if not isinstance(value, Real) or not 0 <= float(value) < below:
            limit = "of 0 or more" if below == math.inf else f"from 0 up to, not including, {below:g}"
            raise self.error(f"{name}{where} is {value!r}: use a number {limit}")

    def check_choice(self, name: str, value: object, where: str, choices: Sequence[object]) -> None:
        """Raises :class:`OptimizerError` unless ``value`` is one of ``choices`` itself."""
        if not any(value is choice for choice in choices):
            raise self.error(f"{name}{where} is {value!r}: use {' or '.join(map(repr, choices))}")

    def error(self, message: str) -> OptimizerError:
        """An error that begins with the optimizer's name."""
        return OptimizerError(f"{type(self).__name__}: {message}")

    def name_of(self, group: int, position: int) -> str:
        """A parameter in messages and tables: the name it was given with, or ``group.position``."""
        names = self.param_groups[group].get("param_names")
        return str(names[position]) if names else f"{group}.{position}"

    def check_step(self) -> None:
        """Raises :class:`OptimizerError` if some gradient cannot be used. To be called before anything is changed."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise self.error("a step counts on the host and cannot be captured in a CUDA graph")
        for index, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.grad.layout != torch.strided:
                    raise self.error(
                        f"the gradient of {self.name_of(index, position)} is sparse: build its layer with sparse=False"
                    )

    def batches(
        self, group: Mapping[str, Any], limit: int | None = None, counts: bool = True
    ) -> Iterator[tuple[Arithmetic, Batch]]:
        """Counts a step (where ``counts``) for every parameter of ``group`` with a gradient, and gives them in batches,
        each with its arithmetic.

        Parameters without a gradient are left alone, their state too. Empty ones are counted, and in no batch.
        """
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            ensure_state(self.state[parameter], parameter)
            self.state[parameter]["step"].add_(counts)
        states = [self.state[parameter] for parameter in parameters]
        foreach = group["foreach"]
        if foreach is None:
            foreach = all(parameter.device.type in _FOREACH_DEVICES for parameter in parameters)
        if limit is None:
            limit = self.batch_elements if foreach else 0
        for batch in batches(parameters, states, limit):
            yield ARITHMETIC[foreach], batch

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a :meth:`state_dict` back, bit for bit, as copies.

        Moments and master weights keep their own precision beside half parameters (torch's own would round them to the
        parameter's dtype). A state of torch's Adam or AdamW is taken too. Raises :class:`OptimizerError`, with nothing
        changed, if a state's tensor has not its parameter's shape.
        """
        saved: dict[str, Any] = {}

        def remember(_: Optimizer, given: dict[str, Any]) -> None:
            self._check_shapes(given)
            saved.update(given)

        # Both last as long as this call, so that they run next to torch's own casting, between the user's hooks.
        before = self.register_load_state_dict_pre_hook(remember)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(saved), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _saved_states(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
        """Name, parameter and saved state of each parameter that has one."""
        for index, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            for position, (parameter, key) in enumerate(zip(group["params"], saved["params"], strict=False)):
                if key in state_dict["state"]:
                    yield self.name_of(index, position), parameter, state_dict["state"][key]

    def _check_shapes(self, state_dict: Mapping[str, Any]) -> None:
        for name, parameter, saved in self._saved_states(state_dict):
            for key in self.shaped_state:
                if key in saved and saved[key].shape != parameter.shape:
                    shapes = f"{tuple(saved[key].shape)}, the parameter {tuple(parameter.shape)}"
                    raise self.error(f"the saved {key} of {name} is {shapes}")

    def _restore(self, state_dict: Mapping[str, Any]) -> None:
        for _, parameter, saved in self._saved_states(state_dict):
            state = self.state[parameter]
            for key, value in saved.items():
                if key == "step":
                    state[key] = torch.tensor(float(value), dtype=torch.float32)
                elif isinstance(value, Tensor) and value.is_floating_point():
                    state[key] = value.detach().to(parameter.device, compute_dtype(parameter), copy=True)
            if parameter.dtype not in HALF:
                state.pop("master_weight", None)
