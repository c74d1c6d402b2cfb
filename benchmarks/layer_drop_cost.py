"""What progressive layer drop saves of a BERT-base pre-training step, beside the most that it can save.

    python -m benchmarks.layer_drop_cost --json layer_drop_cost.json
    python -m benchmarks.layer_drop_cost --lengths 128,512 --modes eager,compile --norm preln
    python -m benchmarks.layer_drop_cost --toy                                   # to try the command

Hugging Face's BERT-base with random weights and dropout, random ids, fused AdamW, clipping. The masked language model's
head sees the masked positions only, in every arm. theta is held at 0.5: layer l of L is kept with probability
1 - l/L * 0.5, (3L - 1)/4 layers in the mean, 8.75 of 12. Arms in turn: no layer, half of them, all, all with drop.

Share: what the layers take of a step (forward, backward, optimizer), from a straight line through the times of the
first three. Ceiling: that share times the share of layers that are dropped. A step's time depends on how many layers
its gates kept; so that luck neither helps nor hurts, the time with layer drop is that of a straight line through
its steps, at the number of layers that the formula expects. What was measured without it is printed beside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.masked_lm import Norm, Shape, loss, masked_lm, random_batch
from benchmarks.steps import Marks, adamw_loop, add_options, device_in_words, device_of, free, in_turn, say, wait
from config_schema import SlipstreamError
from engine.bench import options, report
from engine.jobs.tables import table
from engine.outputs import check_writable
from engine.training.layer_drop import LayerDrop, Schedule
from engine.training.precision import Mode

THETA = 0.5
#: A gamma by which theta(t) has fallen to THETA after one step.
AT_ONCE = 1e6
#: At least so much of the ceiling; at least so much less time a sample; executed layers may be off by so much.
CEILING_BAR, TIME_GOAL, LAYERS_BAR = 0.90, 0.24, 0.01
#: Steps before a measurement (the first keeps all layers, and looks at what the blocks do), and batches to go around.
WARM, POOL = 8, 4
#: The batch is doubled while samples a second grow by this factor, and the memory that is foreseen is below this share.
GROWTH, MEMORY = 1.03, 0.75
#: Steps that took longer than so many times the median of their kind were held up by something else, and left out.
STALL = 1.5
MODES = ("eager", "compile")


class Step(NamedTuple):
    """One step: its time, and the layers that ran in it."""

    seconds: float
    layers: float


@dataclass(frozen=True)
class Case:
    """What is measured. batch: sequences of a step."""

    norm: Norm
    shape: Shape
    batch: int
    precision: Mode
    mode: str
    device: str

    def __str__(self) -> str:
        size = f"{self.batch} sequences of {self.shape.length} tokens"
        return f"{self.norm} BERT, {self.precision}, {self.mode}, {size}"


class Arm:
    """A model of ``layers`` layers with its loop."""

    def __init__(self, case: Case, layers: int, drop: bool) -> None:
        self._device = torch.device(case.device)
        self._layers = layers
        shape = replace(case.shape, layers=layers)
        model = masked_lm(case.norm, shape).to(self._device)
        if case.mode == "compile":
            model.compile()
        features = (LayerDrop(THETA, gamma=AT_ONCE),) if drop else ()
        given: dict[str, Any] = {"precision": case.precision, "device": self._device, "features": features}
        self._loop = adamw_loop(model, loss, **given, lr=1e-4, steps=1_000_000, warmup=1000)
        pool = [random_batch(shape, case.batch, self._device, seed) for seed in range(POOL)]
        self._batches = itertools.cycle(pool)

    def steps(self, count: int) -> list[Step]:
        """So many steps."""
        marks, layers = Marks(self._device), []
        wait(self._device)
        marks.mark()
        for _ in range(count):
            metrics = self._loop.train_batch([next(self._batches)]).metrics
            marks.mark()
            layers.append(metrics.get("layer_drop/layers", float(self._layers)))
        return [Step(*step) for step in zip(marks.seconds(), layers, strict=True)]


def largest_batch(case: Case, steps: int = 6) -> tuple[int, list[tuple[int, float]]]:
    """The batch that fills the GPU, and (batch, samples a second) of those that were tried: doubled until samples a
    second hardly grow or there would be too little memory left for the other arms."""
    tried: list[tuple[int, float]] = []
    total = torch.cuda.get_device_properties(case.device).total_memory
    batch = 16
    while True:
        torch.cuda.reset_peak_memory_stats()
        arm = Arm(replace(case, batch=batch), case.shape.layers, False)
        arm.steps(WARM)
        seconds = statistics.median(step.seconds for step in arm.steps(steps))
        tried.append((batch, batch / seconds))
        say(f"{batch} sequences: {batch / seconds:.0f} a second")
        peak = torch.cuda.max_memory_allocated()
        del arm
        free()
        if len(tried) > 1 and tried[-1][1] < GROWTH * tried[-2][1]:
            return max(tried, key=lambda one: one[1])[0], tried
        if 2 * peak > MEMORY * total:
            return batch, tried
        batch *= 2


def without_stalls(steps: Sequence[Step]) -> list[Step]:
    """The steps that nothing else held up."""
    medians = {
        layers: statistics.median(step.seconds for step in steps if step.layers == layers)
        for layers in {step.layers for step in steps}
    }
    return [step for step in steps if step.seconds <= STALL * medians[step.layers]]


def line(points: Sequence[Step]) -> tuple[float, float]:
    """Seconds without layers, and seconds a layer, of the straight line with the least squares."""
    slope, start = np.polyfit([point.layers for point in points], [point.seconds for point in points], 1)
    return float(start), float(slope)


@dataclass(frozen=True)
class Result:
    """The figures of a case.

    seconds:  mean time of a step without layer drop, by its number of layers.
    dropped:  with it: mean as measured; adjusted: at ``expected`` layers.
    executed: layers that ran, mean over ``steps`` steps. expected: of the formula.
    share:    of the layers in the step with all of them.
    """

    seconds: dict[int, float]
    dropped: float
    adjusted: float
    executed: float
    expected: float
    share: float
    steps: int

    @property
    def layers(self) -> int:
        """All of them."""
        return max(self.seconds)

    @property
    def ceiling(self) -> float:
        """The most that can be saved, as a share of the step."""
        return (1 - self.expected / self.layers) * self.share

    @property
    def saved(self) -> float:
        """What is saved, as a share of the step."""
        return 1 - self.adjusted / self.seconds[self.layers]


def evaluate(fixed: dict[int, list[Step]], dropped: Sequence[Step]) -> Result:
    """The figures, from the steps of the models without layer drop, by their number of layers, and of that with it."""
    layers = max(fixed)
    kept = {count: without_stalls(steps) for count, steps in fixed.items()}
    means = {count: statistics.fmean(step.seconds for step in steps) for count, steps in kept.items()}
    start, slope = line([Step(seconds, count) for count, seconds in means.items()])
    own = without_stalls(dropped)
    expected = sum(Schedule(THETA, gamma=AT_ONCE).keep_probabilities(1, layers))
    own_start, own_slope = line(own)
    return Result(
        seconds=means,
        dropped=statistics.fmean(step.seconds for step in own),
        adjusted=own_start + own_slope * expected,
        executed=statistics.fmean(step.layers for step in dropped),
        expected=expected,
        share=slope * layers / (start + slope * layers),
        steps=len(dropped),
    )


def measure(case: Case, rounds: int, steps: int, factor: int, deadline: float) -> tuple[Result, dict[str, list[Step]]]:
    """The figures, and every step: ``rounds`` of ``steps`` steps of each arm, ``factor`` times as many with layer
    drop, whose steps differ."""
    counts = (0, case.shape.layers // 2, case.shape.layers)
    arms = {f"{count} layers": Arm(case, count, False) for count in counts}
    arms["layer drop"] = Arm(case, case.shape.layers, True)
    for name, arm in arms.items():
        say(f"{case}: {name} warms up")
        arm.steps(WARM)
    many = {name: steps * (factor if name == "layer drop" else 1) for name in arms}
    found = in_turn({name: partial(arm.steps, many[name]) for name, arm in arms.items()}, rounds, deadline, str(case))
    flat = {name: [step for part in parts for step in part] for name, parts in found.items()}
    return evaluate({count: flat[f"{count} layers"] for count in counts}, flat["layer drop"]), flat


def text_of(case: Case, result: Result) -> str:
    """The table and the verdicts, in at most 80 columns."""
    rows = [(f"{count} layers", seconds, float(count)) for count, seconds in result.seconds.items()]
    rows.append((f"{result.layers} layers, layer drop", result.dropped, result.executed))
    rows.append((f"the same at {result.expected:.4g} layers", result.adjusted, result.expected))
    cells = [[name, f"{1000 * s:.4g}", f"{count:.4g}", f"{case.batch / s:.5g}"] for name, s, count in rows]
    off = result.executed / result.expected - 1
    noise = math.sqrt(_variance(result.layers) / result.steps) / result.expected
    reached = result.saved / result.ceiling
    raw = 1 - result.dropped / result.seconds[result.layers]
    return "\n".join(
        [
            str(case),
            table(["arm", "ms a step", "layers", "samples/s"], cells, texts=[0]),
            f"the layers' share of the step: {result.share:.1%}",
            f"ceiling: {1 - result.expected / result.layers:.1%} of it, {result.ceiling:.1%}",
            f"saved: {result.saved:.1%} of the time a sample (as measured {raw:.1%}; goal {TIME_GOAL:.0%}): "
            f"{_verdict(result.saved >= TIME_GOAL)}",
            f"of the ceiling: {reached:.1%} (bar {CEILING_BAR:.0%}): {_verdict(reached >= CEILING_BAR)}",
            f"layers executed: {result.executed:.3f} of {result.expected:.3f} expected, {off:+.2%} (bar 1%; "
            f"luck: {noise:.2%}): {_verdict(abs(off) <= LAYERS_BAR)}",
        ]
    )


def _variance(layers: int) -> float:
    """Of the number of layers that a step keeps."""
    return sum(p * (1 - p) for p in Schedule(THETA, gamma=AT_ONCE).keep_probabilities(1, layers))


def _verdict(right: bool) -> str:
    return "ok" if right else "MISSED"


def cases(chosen: argparse.Namespace) -> list[Case]:
    """Every case that is asked for; where no batch is given, that of a GPU is searched."""
    device = device_of(chosen.device)
    found = []
    for length, mode in itertools.product(chosen.lengths, chosen.modes):
        shape = Shape(length=length)
        case = Case(chosen.norm, shape, chosen.batch or 8, chosen.precision, mode, str(device))
        if chosen.toy:
            case = replace(case, shape=Shape(4, 32, 2, 16, 200), batch=2)
        elif chosen.batch is None and device.type == "cuda":
            say(f"{case}: the batch is searched")
            case = replace(case, batch=largest_batch(case)[0])
        found.append(case)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lengths", metavar="N,N", type=options.counts, default=(128,), help="tokens (128)")
    parser.add_argument("--norm", choices=["postln", "preln"], default="postln", help="where norms stand (postln)")
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp16"], default="bf16", help="(bf16)")
    parser.add_argument("--modes", type=options.names(MODES, "mode"), default=MODES[:1], help="eager,compile (eager)")
    parser.add_argument("--batch", metavar="N", type=options.count, help="sequences (searched; on a CPU 8)")
    parser.add_argument("--rounds", metavar="N", type=options.count, default=25, help="of each arm in turn (25)")
    parser.add_argument("--steps", metavar="N", type=options.count, default=4, help="steps a round (4)")
    parser.add_argument(
        "--factor", metavar="N", type=options.count, default=8, help="times as many steps with layer drop (8)"
    )
    parser.add_argument("--toy", action="store_true", help="a model of four small layers, to try the command")
    add_options(parser)
    return parser


def main() -> int:
    """Measures and prints case by case; the JSON file is written anew after each."""
    parser = _parser()
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.limit_seconds
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
        device = device_in_words(device_of(chosen.device))
        print(device, flush=True)
        wanted = cases(chosen)
        records: list[dict[str, Any]] = []
        for at, case in enumerate(wanted):
            until = time.monotonic() + (deadline - time.monotonic()) / (len(wanted) - at)
            result, steps = measure(case, chosen.rounds, chosen.steps, chosen.factor, until)
            free()
            print(f"\n{text_of(case, result)}", flush=True)
            figures = {"ceiling": result.ceiling, "saved": result.saved}
            records.append({**asdict(case), **asdict(result), **figures, "every_step": steps})
            if chosen.json is not None:
                write(chosen.json, device, records)
    except SlipstreamError as error:
        parser.error(str(error))
    return 0


def write(path: Path, device: str, records: Sequence[dict[str, Any]]) -> None:
    """Writes the cases with all of their steps."""
    document = {
        "title": "progressive layer drop: what a step costs",
        "machine": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cases": list(records),
    }
    report.write(path, json.dumps(document).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
