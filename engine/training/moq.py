"""Quantize-aware training in which weights lose bits as it goes on (MoQ, after DeepSpeed's ``quantize_training``).

From a micro-batch's forward pass to the end of its backward pass the parameters hold rounded weights; otherwise they
hold the weights themselves, which alone the optimizer, checkpoints and ``save_pretrained`` see. The gradient at the
rounded weights is thus applied to the others: the straight-through estimator, exactly, as in DeepSpeed, which rounded
the fp16 copy of fp32 weights. A parameter stays the same object, under the same name, so that neither the model's code
nor what else acts on it (replicas, layer drop, compiled graphs) takes notice.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from config_schema.quantize_training import QuantizeTraining
from engine.errors import EngineError
from engine.training.block_stack import BlockStack, find_stack, has_stack
from engine.training.curvature import Curvature
from engine.training.feature import Feature, Progress
from engine.training.moq_weights import SECTION, RoundedWeight, find_weights
from ops.quantization import LARGEST_FACTOR, BitSchedule, QuantizedTensor, Stage, factor_of

log = logging.getLogger("slipstream.training")


class MoQ(Feature):
    """The training feature. Metrics of a step: ``bits``, the mean over all rounded weights, and ``bits/LAYER``, over
    those of a block or of a module outside of the blocks; ``kept``, the mean share of weights that is not rounded."""

    name: ClassVar[str] = "quantize_training"

    def __init__(
        self,
        chosen: QuantizeTraining,
        length: Callable[[], int | None] = lambda: None,
        curvature: Curvature | None = None,
    ) -> None:
        """``length``: optimizer steps of the training, None where that is not known. ``curvature`` stretches periods
        by eigenvalues; without it none is."""
        self.chosen, self.curvature, self._length = chosen, curvature, length
        self.weights: tuple[RoundedWeight, ...] = ()
        self.stages: list[Stage] = []
        self.eigenvalues: dict[str, float] = {}  # of each block, as a share of the largest, when they were last asked
        self._progress: Progress | None = None
        self._lost: set[int] = set()  # weights that have lost a bit and wait for the factor of the next one
        self._kept: list[float] = []
        self._prepared: dict[int, Tensor] = {}  # by weight, for the current step
        self._masters: dict[int, Tensor] = {}  # what parameters held that hold rounded weights now

        self._until_backward_end = ExitStack()

    # ---- hooks ----

    def setup(self, progress: Progress) -> None:
        """Finds the weights. Raises :class:`EngineError` where there are none, or where bits cannot fall in time."""
        stack = self._stack(progress)
        self.weights = find_weights(progress.model, self.chosen, stack)
        for schedule in dict.fromkeys(weight.schedule for weight in self.weights):
            self._check_length(schedule)
        if self.curvature is not None and not any(weight.block is not None for weight in self.weights):
            raise EngineError(f"{SECTION}.eigenvalue: no weight of the blocks {stack} is rounded")
        self.stages = [weight.schedule.first() for weight in self.weights]
        self._progress = progress
        log.info("%s", self.describe())

    def describe(self) -> str:
        """What is rounded."""
        elements = sum(weight.parameter.numel() for weight in self.weights)
        bits = {(w.schedule.start_bits, w.schedule.target_bits) for w in self.weights}
        said = ", ".join(f"{start} to {target}" for start, target in sorted(bits, reverse=True))
        return f"quantize_training: {len(self.weights)} weights ({elements:,} elements), bits {said}"

    def step_start(self, progress: Progress) -> None:
        """Takes bits that are due, and rounds the weights for the step."""
        self._restore()
        for at, weight in enumerate(self.weights):
            stage = weight.schedule.advance(self.stages[at], progress.step)
            if stage is not self.stages[at] and self._has_factor(weight, stage):
                self._lost.add(at)
            self.stages[at] = stage
        self._kept = [w.schedule.kept(s, progress.step) for w, s in zip(self.weights, self.stages, strict=True)]
        self._prepared = self._rounded(self._kept, self._noise(progress.step))

    @contextmanager
    def forward_context(self, progress: Progress) -> Iterator[None]:
        """Puts the rounded weights in. They stay until the backward pass has ended, which may compute blocks again."""
        self._put(self._prepared)
        if self._lost:  # of attention's kernels the only one with a second derivative
            self._until_backward_end.enter_context(sdpa_kernel(SDPBackend.MATH))
        try:
            yield
        except BaseException:
            self._restore()
            raise

    def loss(self, progress: Progress, loss: Tensor) -> Tensor:
        """Asks for eigenvalues with the first micro-batch of a step in which a bit was lost and others are to be."""
        if self._lost:
            self._stretch(loss)
        return loss

    def backward_end(self, progress: Progress) -> None:
        """Gives the parameters their own weights back."""
        self._restore()

    def optimizer_step_start(self, progress: Progress) -> None:
        """The rounded weights are of no more use."""
        self._prepared = {}

    def step_end(self, progress: Progress) -> Mapping[str, float]:
        """The metrics of the step that has just been counted."""
        sizes = [weight.parameter.numel() for weight in self.weights]
        layers: dict[str, list[int]] = {}
        for at, weight in enumerate(self.weights):
            layers.setdefault(weight.layer, []).append(at)
        bits = [stage.bits for stage in self.stages]
        found = {"bits": _mean(bits, sizes, range(len(sizes))), "kept": _mean(self._kept, sizes, range(len(sizes)))}
        return found | {f"bits/{layer}": _mean(bits, sizes, among) for layer, among in layers.items()}

    def step_failed(self, progress: Progress) -> None:
        """Gives the parameters their own weights back."""
        self._restore()
        self._prepared = {}

    def state_dict(self) -> dict[str, Any]:
        """Each weight's stage, and the eigenvalues. Rounding has no other state: seed and step decide its noise."""
        return {
            "weights": [weight.name for weight in self.weights],
            "bits": [stage.bits for stage in self.stages],
            "since": [stage.since for stage in self.stages],
            "periods": [stage.period for stage in self.stages],
            "eigenvalues": dict(self.eigenvalues),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the stages back. Raises where the checkpoint rounds other weights."""
        saved, own = list(state["weights"]), [weight.name for weight in self.weights]
        if saved != own:
            other = sorted(set(saved) ^ set(own)) or own
            raise EngineError(
                f"the checkpoint's quantize_training rounds other weights than this run ({len(saved)} and {len(own)}; "
                f"{other[0]}): say the same in $.quantize_training"
            )
        rows = zip(state["bits"], state["since"], state["periods"], strict=True)
        self.stages = [Stage(bits, since, period) for bits, since, period in rows]
        self.eigenvalues = dict(state["eigenvalues"])

    # ---- what is served ----

    @contextmanager
    def served(self) -> Iterator[None]:
        """Parameters hold what inference would serve: all rounded to nearest at their present bits, nothing mixed in;
        before the schedule's offset the weights themselves. For evaluation between steps."""
        progress = self._progress
        begun = progress is not None and progress.step >= self.chosen.schedule_offset
        inside = bool(self._masters)  # a step's rounded weights stay
        if begun and not inside:
            self._put(self._rounded([0.0] * len(self.weights), None))
        try:
            yield
        finally:
            if not inside:
                self._restore()

    def quantized(self) -> dict[str, QuantizedTensor]:
        """The rounded weights as they are served, by the names of their parameters: each dequantizes to exactly what
        :meth:`served` computes with. Raises :class:`ops.quantization.QuantizationError` above 8 bits."""
        return {f"{w.name}.weight": w.quantized(s.bits) for w, s in zip(self.weights, self.stages, strict=True)}

    # ---- parts ----

    def _stack(self, progress: Progress) -> BlockStack | None:
        """The blocks: named in the log, and needed for eigenvalues."""
        wanted = self.chosen.eigenvalue
        if self.curvature is not None or has_stack(progress.model):
            return find_stack(progress.model, None if wanted is None else wanted.layer_name)
        return None

    def _check_length(self, schedule: BitSchedule) -> None:
        """The last forward pass is that after ``length - 1`` steps."""
        target, needed, length = schedule.target_bits, schedule.reached() + 1, self._length()
        if length is None:
            log.warning(
                "%s: %d bits need %d optimizer steps; how many there will be is not known", SECTION, target, needed
            )
            return
        if needed > length:
            raise EngineError(
                f"{SECTION}: from {schedule.start_bits} to {target} bits takes {needed} optimizer steps, and the "
                f"training has {length}: lower quantize_period (now {schedule.period}), schedule_offset or "
                "start_bits, or train longer"
            )
        most = schedule.reached(LARGEST_FACTOR) + 1
        if self.curvature is not None and most > length:
            log.warning(
                "%s: a block that always has the largest eigenvalue needs %d optimizer steps to %d bits, and the "
                "training has %d: it will end with more bits",
                SECTION,
                most,
                target,
                length,
            )

    def _noise(self, step: int) -> Callable[[torch.device], torch.Generator | None]:
        """The generators of a step, one a device: the same on all ranks and in a run that was resumed."""
        if self.chosen.rounding == "nearest":
            return lambda device: None
        digest = hashlib.blake2b(f"moq {self.chosen.seed} {step}".encode(), digest_size=4).digest()
        seed, made = int.from_bytes(digest, "little"), dict[torch.device, torch.Generator]()

        def generator(device: torch.device) -> torch.Generator:
            if device not in made:
                made[device] = torch.Generator(device).manual_seed(seed)
            return made[device]

        return generator

    def _rounded(
        self, kept: Sequence[float], noise: Callable[[torch.device], torch.Generator | None] | None
    ) -> dict[int, Tensor]:
        """What the parameters are to hold, where that is not their own."""
        found = {}
        for at, (weight, share) in enumerate(zip(self.weights, kept, strict=True)):
            if share == 1:
                continue
            generator = None if noise is None else noise(weight.parameter.device)
            rounded = weight.rounded(self.stages[at].bits, generator)
            found[at] = torch.lerp(rounded, weight.parameter.detach(), share) if share else rounded
        return found

    def _put(self, rounded: Mapping[int, Tensor]) -> None:
        for at, tensor in rounded.items():
            parameter = self.weights[at].parameter
            self._masters.setdefault(at, parameter.data)
            parameter.data = tensor

    def _restore(self) -> None:
        for at, tensor in self._masters.items():
            self.weights[at].parameter.data = tensor
        self._masters = {}
        self._until_backward_end.close()

    def _has_factor(self, weight: RoundedWeight, stage: Stage) -> bool:
        """Whether eigenvalues have a say in when the next bit goes."""
        return self.curvature is not None and weight.block is not None and stage.bits > weight.schedule.target_bits

    def _stretch(self, loss: Tensor) -> None:
        """Finds the eigenvalues at the rounded weights, and the next periods of blocks that have just lost a bit."""
        assert self.curvature is not None
        blocks: dict[str, list[Tensor]] = {}
        for weight in self.weights:
            if weight.block is not None:
                blocks.setdefault(weight.layer, []).append(weight.parameter)
        shares = self.curvature.shares(loss, list(blocks.values()))
        self.eigenvalues = dict(zip(blocks, shares, strict=True))
        for at in self._lost:
            weight = self.weights[at]
            factor = factor_of(self.eigenvalues[weight.layer])
            self.stages[at] = weight.schedule.stretched(self.stages[at], factor)
        self._lost = set()
        log.info("eigenvalues: %s", ", ".join(f"{name} {share:.3g}" for name, share in self.eigenvalues.items()))


def _mean(values: Sequence[float], sizes: Sequence[int], among: Sequence[int]) -> float:
    return sum(values[at] * sizes[at] for at in among) / sum(sizes[at] for at in among)
