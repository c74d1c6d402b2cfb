"""What a run leaves behind of each step: a line of JSON, and TensorBoard's events on request."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from engine.errors import EngineError

log = logging.getLogger("slipstream.training")


class MetricsLog:
    """Appends ``{"step": n, name: number, ...}`` a line to a file; numbers that are none (NaN, infinity) become null.

    A run that resumes at step n cuts off what an earlier one wrote behind it, so that every step stands there once.
    """

    def __init__(self, path: Path, *, tensorboard: Path | None = None, resume_step: int = 0) -> None:
        """``tensorboard`` is a directory for event files. Raises :class:`EngineError` if a file cannot be written, or
        if TensorBoard is not installed."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cut(resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise EngineError(f"{path}: metrics cannot be written there ({error.strerror})") from None
        self._events: Any = None
        if tensorboard is not None:
            if find_spec("tensorboard") is None:
                self._file.close()
                raise EngineError("TensorBoard is not installed: pip install tensorboard, or leave its directory out")
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(tensorboard), purge_step=resume_step + 1)

    def _cut(self, resume_step: int) -> None:
        """Keeps the lines up to ``resume_step``, not one that a crash cut short. Written aside, renamed."""
        if not self.path.exists():
            return
        lines = self.path.read_text("utf-8").splitlines()
        steps = [_step_of(line) for line in lines]
        kept = [line for line, step in zip(lines, steps, strict=True) if step is not None and step <= resume_step]
        if len(kept) == len(lines):
            return
        gone = len(lines) - len(kept)
        log.info("%s: %d lines of an earlier run behind step %d are cut off", self.path, gone, resume_step)
        aside = self.path.with_name(self.path.name + ".partial")
        aside.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        aside.replace(self.path)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One line. Raises :class:`EngineError` if the disk is full."""
        numbers = {name: value if value is None or math.isfinite(value) else None for name, value in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        except OSError as error:
            raise EngineError(f"{self.path}: metrics cannot be written ({error.strerror})") from None
        if self._events is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Once; further calls do nothing."""
        self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _step_of(line: str) -> int | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    return step if isinstance(step, int) else None
