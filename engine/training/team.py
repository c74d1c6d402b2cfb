"""Who makes the calls of a training engine that all its processes must make.

:class:`Launched`: each process makes them itself, one alone or those that torchrun started. :class:`Started`: the
engine has started the others, and they make each call that is made here.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.training.build import TrainingPlan
from engine.training.failures import failing_together, naming_the_silent
from engine.training.loop import StepReport
from engine.training.parallel import fingerprint
from engine.training.trainer import Trainer
from engine.training.workers import Workers, end_others

if TYPE_CHECKING:
    from engine.training_engine import TrainingEngine

T = TypeVar("T")
Guard = Callable[[], AbstractContextManager[None]]

_TORCHRUN = "the other processes do not run your script: start all of them with torchrun"


class Team(Protocol):
    """The processes of a training engine."""

    @property
    def guard(self) -> Guard:
        """What stands around a run, so that a failing process takes the others down."""

    def call(self, name: str, run: Callable[[], T], **arguments: Any) -> T:
        """``run`` here, which is the engine's method ``name`` with plain ``arguments``; gives its result."""

    def train_batch(self, batch: Any) -> StepReport:
        """An optimizer step on a batch."""

    def assert_here(self, what: str, remedy: str = "") -> None:
        """Raises :class:`EngineError` where ``what`` the script does would have to be done by others too."""


class Launched:
    """Each process makes the calls itself."""

    def __init__(self, trainer: Trainer, guard: Guard = failing_together, naming: Guard = naming_the_silent) -> None:
        self.guard, self._naming = guard, naming
        self._trainer = trainer

    def call(self, name: str, run: Callable[[], T], **arguments: Any) -> T:
        """Runs it."""
        end_others()
        with self._naming():
            return run()

    def train_batch(self, batch: Any) -> StepReport:
        """An optimizer step on this process's part of a batch."""
        end_others()
        with self._naming():
            return self._trainer.train_batch(batch)

    def assert_here(self, what: str, remedy: str = "") -> None:
        """All is done here."""
        end_others()


class Started:
    """Starts the other processes with the first call that needs them, and makes them take part in each."""

    guard = nullcontext  # who fails is seen from here, in all calls alike

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._directory = os.getcwd()
        self._workers: Workers | None = None
        # Looked for once: to walk the modules at every step takes a millisecond.
        self._tensors = (*trainer.model.parameters(), *trainer.model.buffers())
        self._kinds, self._versions = _kinds(self._tensors), _versions(self._tensors)
        self._built = fingerprint(trainer.model)

    def call(self, name: str, run: Callable[[], T], **arguments: Any) -> T:
        """Runs it here and in the workers. Raises :class:`EngineError` where one of them fails or has failed."""
        return self._run(name, run, arguments)

    def train_batch(self, batch: Any) -> StepReport:
        """An optimizer step on the batch of all processes, each of which gets as many of its micro-batches."""
        trainer, size = self._trainer, self._trainer.sizes.world
        parts = trainer.micro_batches(batch, size)
        bodies = [_sent(parts[rank::size]) for rank in range(1, size)]  # as the micro-batches of fit() lie in the data
        return self._run("train_batch", lambda: trainer.loop.train_batch(parts[::size]), {}, bodies)

    def assert_here(self, what: str, remedy: str = "") -> None:
        """It cannot be."""
        size = self._trainer.sizes.world
        raise EngineError(f"{what}: $.training.processes is {size}, and {_TORCHRUN}{remedy}")

    def _run(self, name: str, run: Callable[[], T], arguments: Mapping[str, Any], bodies: Sequence[bytes] = ()) -> T:
        workers, changed = self._ready(), self._changed()

        def own() -> T:
            if changed:
                self._trainer.share()
            return run()

        line = {"call": name, "arguments": dict(arguments), "cwd": os.getcwd(), "share": changed}
        try:
            with self._threads():
                return workers.run(line, own, bodies)
        finally:
            self._versions = _versions(self._tensors)

    def _ready(self) -> Workers:
        """The workers, started if they have not been."""
        if self._workers is not None and self._workers.over:
            raise EngineError(
                f"this engine's processes have ended ({self._workers.over.splitlines()[0]}): build it anew; fit() goes "
                "on from the last checkpoint"
            )
        if self._workers is None:
            trainer = self._trainer
            cuda = trainer.device.type == "cuda"
            if cuda:
                torch.cuda.set_device(trainer.device)
            setup = {
                "config": trainer.config.to_dict(),
                "model": self._built,
                "timeout": trainer.settings.exchange_timeout,
                "arithmetic": {**arithmetic(), "threads": self._share_of_threads()},
            }
            self._workers = Workers(trainer.sizes.world, "nccl" if cuda else "gloo", self._directory, setup)
            trainer.means.check = self._workers.check
            weakref.finalize(self, self._workers.end, "the engine is gone")  # also where the interpreter ends
        return self._workers

    def _changed(self) -> bool:
        """Whether the script has changed weights itself since the last call. What it may not change is told."""
        if self._trainer.sharded:
            return False
        if _kinds(self._tensors) != self._kinds:
            self.assert_here("the model has changed since the engine was built (its dtypes, or requires_grad)")
        return _versions(self._tensors) != self._versions

    def _share_of_threads(self) -> int:
        """On a CPU the processes share its cores."""
        threads = torch.get_num_threads()
        return threads if self._trainer.device.type == "cuda" else max(threads // self._trainer.sizes.world, 1)

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self._share_of_threads())
        try:
            yield
        finally:
            torch.set_num_threads(before)


def team_of(trainer: Trainer) -> Team:
    """The team that the plan of ``trainer`` asks for."""
    return Started(trainer) if trainer.plan.starts else Launched(trainer)


def assert_mirrored(plan: TrainingPlan, **given: Any) -> None:
    """Raises :class:`EngineError` where an engine whose plan starts its workers is ``given`` what they would lack."""
    found = [f"{name}=" for name, value in given.items() if value is not None]
    if plan.starts and found:
        raise EngineError(f"{', '.join(found)}: $.training.processes is {plan.world}, and {_TORCHRUN}")


def follow(engine: TrainingEngine, wanted: str) -> None:
    """Makes ``engine`` one of a worker, whose calls are those of the first process. ``wanted`` is the fingerprint of
    the model there."""
    trainer = engine._trainer
    if fingerprint(trainer.model) != wanted:
        raise EngineError("the model that the configuration gives here is another one than in the first process")
    engine._team = Launched(trainer, nullcontext, nullcontext)


def arithmetic() -> dict[str, Any]:
    """How torch computes here, where a script may have said so."""
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def compute_as(wanted: Mapping[str, Any]) -> None:
    """As another process's :func:`arithmetic` says."""
    torch.set_num_threads(wanted["threads"])
    torch.set_float32_matmul_precision(wanted["matmul"])
    torch.use_deterministic_algorithms(wanted["deterministic"])


def received(body: bytes) -> list[Any]:
    """Micro-batches, as :func:`_sent` sent them."""
    found: list[Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return found


def _sent(parts: list[Any]) -> bytes:
    file = io.BytesIO()
    torch.save([_plain(part) for part in parts], file)
    return file.getvalue()


def _plain(value: Any) -> Any:
    """``value`` in what can be sent. A tensor is copied: of a part of one torch would save the whole."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise EngineError(f"a batch for several processes holds tensors, numbers and texts, got {type(value).__name__}")


def _kinds(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, bool]]:
    return [(tensor.dtype, tensor.requires_grad) for tensor in tensors]


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """What changes where somebody writes into a tensor."""
    return [tensor._version for tensor in tensors]
