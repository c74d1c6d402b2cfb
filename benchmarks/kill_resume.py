"""Kills a training run at random moments, resumes it, and compares every loss with those of a run left in peace.

    python -m benchmarks.kill_resume --kills 200

The run is small but has all that an exact resume needs: dropout, AdamW, a schedule, a feature with state that draws
from NumPy and ``random``, data with a position. Each start is a process of its own that gets ``SIGKILL``; all it knows
of the one before lies in the checkpoints. Losses are compared bit by bit, and so are the final weights. The exit code
is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch._dynamo  # the optimizer's first step would import it, in every process anew
from torch import Tensor, nn

from engine.training.checkpoint import Checkpoints, Stateful
from engine.training.feature import Feature, Progress
from engine.training.loop import Loop
from engine.training.random_state import RandomState


@dataclass(frozen=True)
class Run:
    """A training run. steps: its length; every: steps between checkpoints; keep: how many stay; without: name of an
    object that is left out of the checkpoints, to see the comparison fail."""

    steps: int = 40
    every: int = 3
    keep: int = 2
    without: str = ""


class Data:
    """Batches from a generator of its own, and how many came."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(7)
        self.position = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """Inputs [8, 6] and targets [8, 1], float32."""
        self.position += 1
        inputs = torch.randn(8, 6, generator=self._generator)
        return inputs, inputs.sum(1, keepdim=True).sin()

    def state_dict(self) -> dict[str, Any]:
        """Position and generator."""
        return {"position": self.position, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back."""
        self.position = state["position"]
        self._generator.set_state(state["generator"])


class Noise(Feature):
    """Scales each loss by what it remembers of the earlier ones and by random numbers."""

    name: ClassVar[str] = "noise"

    def __init__(self) -> None:
        self._mean, self._seen = torch.zeros(()), {"losses": 0}

    def loss(self, progress: Progress, loss: Tensor) -> Tensor:
        """The loss, about as large as it was."""
        self._mean = 0.9 * self._mean + 0.1 * loss.detach()
        self._seen["losses"] += 1
        jitter = random.random() + float(np.random.rand()) + 1 / self._seen["losses"]
        return loss * (1 + 0.1 * torch.tanh(self._mean) + 0.01 * jitter)

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return {"mean": self._mean, "seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back."""
        self._mean, self._seen = state["mean"], dict(state["seen"])


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    difference: Tensor = model(batch[0]) - batch[1]
    return difference.square().mean()


def train(directory: Path, log: Path, run: Run) -> None:
    """Trains to the end from the last checkpoint in ``directory``, or from scratch. Appends a line ``STEP LOSS`` to
    ``log`` after each step and ``end HASH`` of the weights."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
    model, data = nn.Sequential(*layers), Data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=run.steps + 1)
    loop = Loop(model, optimizer, squared, (Noise(),), schedule=schedule)
    objects: dict[str, Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "loop": loop,
        "data": data,
        "random": RandomState(),
    }
    objects.pop(run.without, None)
    checkpoints = Checkpoints(directory, keep=run.keep)
    done = 0 if checkpoints.latest() is None else checkpoints.restore(objects)
    with log.open("a", buffering=1) as file:
        while done < run.steps:
            report = loop.train_batch([data.batch(), data.batch()])
            done += 1
            file.write(f"{done} {report.loss.hex()}\n")
            if done % run.every == 0:
                checkpoints.save(done, objects)
        weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        file.write(f"end {hashlib.sha256(weights).hexdigest()}\n")


def start(directory: Path, log: Path, run: Run) -> int:
    """:func:`train` in a new process, whose id is returned. This process must have computed nothing with torch: a
    forked process has none of its threads."""
    child = os.fork()
    if child:
        return child
    try:
        train(directory, log, run)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finish(child: int) -> None:
    """Waits for a process that nobody kills. Raises if it failed."""
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the training process failed: see its traceback above")


def lines(log: Path) -> list[tuple[str, str]]:
    """Step and loss of each line. A last line without its end is left out: the process died as it wrote."""
    text = log.read_text() if log.exists() else ""
    return [(line.split()[0], line.split()[1]) for line in text.split("\n")[:-1]]


@dataclass
class Count:
    """What happened. kills: all of them; saving: those that left a checkpoint half-written; runs: ends reached;
    losses: lines compared; different: descriptions of what was not as in the run left in peace."""

    kills: int
    saving: int
    runs: int
    losses: int
    different: list[str]
    seconds: float

    def __str__(self) -> str:
        verdict = f"{len(self.different)} DIFFER ({self.different[0]})" if self.different else "all bit-identical"
        return (
            f"kill_resume: {self.kills} kills ({self.saving} during a save), {self.runs} runs to the end, "
            f"{self.losses} losses and weights compared: {verdict}; {self.seconds:.1f} s"
        )


def kill_loop(kills: int, run: Run, root: Path, seed: int = 0) -> Count:
    """Trains again and again in ``root`` until ``kills`` processes were killed, and once more to the end."""
    began, moments = time.perf_counter(), random.Random(seed)
    finish(start(root / "peace", root / "peace.log", run))
    whole = time.perf_counter() - began
    expected = dict(lines(root / "peace.log"))
    count = Count(0, 0, 0, 0, [], 0.0)
    while True:
        directory, log = root / f"run-{count.runs}", root / f"run-{count.runs}.log"
        _one_run(kills, count, whole, moments, directory, log, run)
        found = lines(log)
        count.runs, count.losses = count.runs + 1, count.losses + len(found)
        count.different += [
            f"step {step}: {value} instead of {expected[step]}" for step, value in found if expected[step] != value
        ]
        if {step for step, _ in found} != set(expected):
            count.different.append(f"{log}: steps are missing")
        if count.kills >= kills:
            count.seconds = time.perf_counter() - began
            return count


def _one_run(
    kills: int, count: Count, whole: float, moments: random.Random, directory: Path, log: Path, run: Run
) -> None:
    """Starts and kills until a process reaches the end."""
    last = 0
    while count.kills < kills:
        child = start(directory, log, run)
        time.sleep(moments.uniform(0, whole / 2))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return
        count.kills += 1
        count.saving += directory.exists() and any(entry.name.startswith(".saving-") for entry in directory.iterdir())
        now = Checkpoints(directory).latest() or 0
        if now < last:
            count.different.append(f"{directory}: the last checkpoint was of step {last} and is of step {now}")
        last = now
    finish(start(directory, log, run))


def main() -> int:
    """Measures and prints the summary."""
    parser = argparse.ArgumentParser(
        description="kill and resume", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="processes to kill")
    parser.add_argument("--steps", type=int, default=Run.steps, help="length of a run")
    parser.add_argument("--every", type=int, default=Run.every, help="steps between checkpoints")
    parser.add_argument("--keep", type=int, default=Run.keep, help="checkpoints that stay")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--without", default="", help="leave this object out of the checkpoints, to see the check fail")
    options = parser.parse_args()
    run = Run(options.steps, options.every, options.keep, options.without)
    with tempfile.TemporaryDirectory() as root:
        count = kill_loop(options.kills, run, Path(root), options.seed)
    print(count)
    return 1 if count.different else 0


if __name__ == "__main__":
    sys.exit(main())
