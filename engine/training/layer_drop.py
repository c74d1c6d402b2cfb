"""Progressive layer drop (PLD, arXiv 2010.13369): residual blocks are left out at random, most of them late and deep.

Keep probability of layer ``l`` of ``L`` (1 is the first) after ``t`` optimizer steps (equations 5 and 6 of the paper):

    theta(t) = (1 - theta) exp(-gamma t) + theta          p_l(t) = 1 - (l / L) (1 - theta(t))

One gate ``G ~ Bernoulli(p_l)`` a layer and micro-batch. A kept block's residual branches are divided by ``p_l``, the
Switchable Transformer block of the paper, ``h = x + (G/p) A(N(x)); y = h + (G/p) F(N(h))``; in a post-norm block they
are divided before the sum that is normalised. Where the branches cannot be told apart
(:mod:`engine.training.residual`) the block is divided as a whole, ``y = x + (G/p) (block(x) - x)``, whose mean over
the gate is ``block(x)`` exactly. (The mean of the paper's form is not quite that of two branches in sequence: what
``F`` makes of ``A`` is multiplied by ``1/p`` on average.)

A dropped block runs neither forward nor backward and gives its hidden states on as they are; its parameters get no
gradient.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from engine.errors import EngineError
from engine.training.block_gate import BlockGate, Traces
from engine.training.block_stack import BlockStack, find_stack
from engine.training.feature import Feature, Progress

log = logging.getLogger("slipstream.training")


class Schedule:
    """The keep probabilities by time and depth."""

    def __init__(self, theta: float, gamma: float | None = None, total_steps: int | None = None) -> None:
        """``theta``: the value that theta(t) falls to from 1, in (0, 1]. How fast: ``gamma`` > 0 a step, or
        ``total_steps`` T of the run, for the paper's ``gamma = 100 / T``; exactly one of them.

        Raises:
            EngineError: a value out of range; the message starts with its key.
        """
        self.theta = _number("theta", theta)
        if not 0 < self.theta <= 1:
            raise EngineError(f"theta is {theta}: it must be greater than 0 and at most 1")
        if (gamma is None) == (total_steps is None):
            raise EngineError("gamma or total_steps: give one of them, and not both")
        if total_steps is not None:
            if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
                raise EngineError(f"total_steps is {total_steps}: it must be a whole number of at least 1")
            gamma = 100 / total_steps
        self.gamma = _number("gamma", gamma)
        if not 0 < self.gamma < math.inf:
            raise EngineError(f"gamma is {gamma}: it must be greater than 0 and finite")

    def theta_at(self, step: int) -> float:
        """theta(t) after ``step`` optimizer steps: 1 at first, ``theta`` in the end."""
        return (1 - self.theta) * math.exp(-self.gamma * step) + self.theta

    def keep_probabilities(self, step: int, layers: int) -> tuple[float, ...]:
        """p_l(t) of layers 1 to ``layers`` after ``step`` optimizer steps."""
        falling = 1 - self.theta_at(step)
        return tuple(1 - layer / layers * falling for layer in range(1, layers + 1))


def draw_gates(probabilities: Sequence[float], seed: int, step: int, micro_batch: int) -> tuple[bool, ...]:
    """One gate a layer, True to keep it with its probability.

    The arguments decide the gates, on each rank, in a run that was resumed, and whatever else draws random numbers:
    they come from a generator of their own on the CPU.
    """
    digest = hashlib.blake2b(f"{seed} {step} {micro_batch}".encode(), digest_size=4).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))  # the generator takes 32 bits
    drawn = torch.rand(len(probabilities), generator=generator, dtype=torch.float64, device="cpu")
    return tuple(value < p for value, p in zip(drawn.tolist(), probabilities, strict=True))


class LayerDrop(Feature):
    """The training feature. Metrics of a step: ``theta``; ``layers``, the mean number of layers that ran for a
    micro-batch; ``expected``, the mean that the formula gives.
    """

    name: ClassVar[str] = "layer_drop"

    def __init__(
        self,
        theta: float = 0.5,
        gamma: float | None = None,
        total_steps: int | None = None,
        paths: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        """``theta``, ``gamma``, ``total_steps``: see :class:`Schedule`. ``paths``: of the stack, see
        :func:`engine.training.block_stack.find_stack`; None finds it. ``seed``: of the gates, the same on every
        rank."""
        self.schedule = Schedule(theta, gamma, total_steps)
        self.seed = seed
        self.executed = 0  # layers run forward in training, since the first step
        self.micro_batches = 0
        self._paths = paths
        self._stack: BlockStack | None = None
        self._gates: tuple[BlockGate, ...] = ()
        self._asked: RemovableHandle | None = None
        self._probabilities: tuple[float, ...] = ()
        self._theta = 1.0
        self._at_start = (0, 0)
        self._told = False

    @property
    def stack(self) -> BlockStack:
        """The blocks that are dropped; there is none before :meth:`setup`."""
        if self._stack is None:
            raise EngineError("layer_drop has no stack yet: setup() finds it")
        return self._stack

    def describe(self) -> str:
        """Which blocks are dropped and, once a micro-batch has shown it, what is scaled in them."""
        rules = dict.fromkeys(gate.residual.rule for gate in self._gates if gate.residual)
        return f"layer_drop: {self.stack}" + (f", scaled: {'; '.join(rules)}" if rules else "")

    def setup(self, progress: Progress) -> None:
        """Finds the stack and puts a gate on each block. Raises :class:`EngineError` where there is none."""
        self.remove()
        stack = find_stack(progress.model, self._paths)
        traces: Traces = {}
        shared = _shared_modules(stack.blocks)
        gates: list[BlockGate] = []
        try:
            for name, block in zip(stack.names, stack.blocks, strict=True):
                gates.append(BlockGate(name, block, traces, shared))
        except EngineError:
            for gate in gates:
                gate.remove()
            raise
        self._stack, self._gates, self._told = stack, tuple(gates), False
        self._asked = progress.model.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
        log.info("%s", self.describe())

    def remove(self) -> None:
        """Takes the gates off: the model is as it was before :meth:`setup`."""
        for gate in self._gates:
            gate.remove()
        if self._asked is not None:
            self._asked.remove()
        self._stack, self._gates, self._asked = None, (), None

    def step_start(self, progress: Progress) -> None:
        """The step's probabilities."""
        self._open()
        self._theta = self.schedule.theta_at(progress.step)
        self._probabilities = self.schedule.keep_probabilities(progress.step, len(self._gates))
        self._at_start = (self.executed, self.micro_batches)

    @contextmanager
    def forward_context(self, progress: Progress) -> Iterator[None]:
        """Sets the micro-batch's gates. They stay until its backward pass has ended, which may run blocks again."""
        keep = draw_gates(self._probabilities, self.seed, progress.step, progress.micro_batch)
        for gate, kept, probability in zip(self._gates, keep, self._probabilities, strict=True):
            gate.set(kept, probability)
        try:
            yield
        except BaseException:
            self._open()
            raise
        self._count()  # now: a recomputation in the backward pass runs the blocks again

    def backward_end(self, progress: Progress) -> None:
        """Opens the gates."""
        self._open()

    def step_end(self, progress: Progress) -> Mapping[str, float]:
        """The metrics of the step that has just been counted."""
        executed, micro_batches = self.executed - self._at_start[0], self.micro_batches - self._at_start[1]
        return {"theta": self._theta, "layers": executed / micro_batches, "expected": sum(self._probabilities)}

    def state_dict(self) -> dict[str, Any]:
        """The counts. The gates have no state: the step, the micro-batch and the seed decide them."""
        return {"layers": len(self._gates), "executed": self.executed, "micro_batches": self.micro_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the counts back. Raises where the checkpoint is of another number of layers."""
        if self._gates and state["layers"] != len(self._gates):
            raise EngineError(
                f"the checkpoint's layer_drop has {state['layers']} layers, "
                f"this model has {len(self._gates)} in {self.stack}"
            )
        self.executed, self.micro_batches = state["executed"], state["micro_batches"]

    def _open(self) -> None:
        for gate in self._gates:
            gate.clear()

    def _count(self) -> None:
        unused = [gate.name for gate in self._gates if not gate.executed + gate.passed]
        if unused:
            raise EngineError(
                f"the model ran without {', '.join(unused)}, so layer_drop applies to nothing there: name the stack "
                "that it runs by its path (a model compiled and run before needs torch.compiler.reset())"
            )
        self.executed += sum(gate.executed for gate in self._gates)
        self.micro_batches += 1
        if not self._told:
            self._told = True
            log.info("%s", self.describe())


def _refuse_attentions(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    """The hook before the model's forward: Hugging Face collects attentions from within the blocks."""
    asked = kwargs.get("output_attentions", getattr(getattr(model, "config", None), "output_attentions", False))
    if model.training and asked is True:
        raise EngineError("layer_drop: a dropped layer has no attentions to give: set output_attentions to false")


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise EngineError(f"{key} is {value!r}: it must be a number")
    return float(value)


def _shared_modules(blocks: Sequence[nn.Module]) -> frozenset[int]:
    """Ids of modules that stand in more than one block: a hook on one would act in all of them."""
    times = Counter(id(module) for block in blocks for module in block.modules())
    return frozenset(key for key, count in times.items() if count > 1)
