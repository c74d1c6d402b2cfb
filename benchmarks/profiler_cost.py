"""What the profiler's timing pass costs, and how much of a step it accounts for.

    python -m benchmarks.profiler_cost --json profiler_cost.json
    python -m benchmarks.profiler_cost --device cpu --only training --rounds 5 --threads 2
    python -m benchmarks.profiler_cost --toy                                     # to try the command

Models have random weights. Training: Hugging Face's BERT-base and a loop written by hand (forward, backward, clipping,
fused AdamW, the loss read), 64 sequences of 128 tokens in bf16 on a GPU, 8 in fp32 on a CPU. Inference: slipstream's
own runtime, on a GPU in CUDA graphs: an encoder's pass (BERT-base, 1 x 128) and a decoder's generation (GPT-2, a prompt
of 32 tokens and 32 more). Plain and timed steps run in turn.

Cost: the timed step to the plain one, medians. Busy: what modules, communication and the time between modules add up
to, of the timed step; between: what no module has of it. Apart: seconds that a timed step takes beyond itself, to start
and stop recording and to read the records.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.models import SHAPES
from benchmarks.steps import add_options, device_in_words, device_of, free, say
from benchmarks.train_step import Case, batches, build, by_hand
from config_schema import SlipstreamError, load_config
from engine import build as connector
from engine.bench import options, report
from engine.engine import Engine
from engine.jobs.tables import table
from engine.outputs import check_writable
from profiler.timer import Timer

SUBJECTS = ("training", "encoder", "decoder")
#: A timed step of training may take so many times the plain one; so much of a step may be unaccounted for.
COST_BAR, ACCOUNTED_BAR = 1.25, 0.05
WARM = 3
PROMPT, NEW = 32, 32


@dataclass(frozen=True)
class Row:
    """A subject. plain, timed: seconds of a step, medians. apart: seconds a timed step takes beyond. The others are
    parts of the timed step; kernels: of it, operators on a CPU."""

    subject: str
    plain: float
    timed: float
    busy: float
    idle: float
    between: float
    kernels: int
    apart: float

    @property
    def cost(self) -> float:
        """Of the timed step to the plain one."""
        return self.timed / self.plain

    @property
    def accounted(self) -> float:
        """What was attributed, or idle, of the timed step."""
        return (self.busy + self.idle) / self.timed


def training(device: torch.device, toy: bool) -> tuple[nn.Module, Callable[[], object]]:
    """BERT-base and its step."""
    gpu = device.type == "cuda"
    batch, length = (2, 16) if toy else (64 if gpu else 8, 128)
    case = Case("bert-base", "bf16" if gpu else "fp32", 1, batch, length, str(device), toy)
    model: Any = build(case)
    step, given = by_hand(case, model, True), batches(case, int(model.config.vocab_size))[0]
    return model, lambda: step(given)


def runtime(name: str, device: torch.device, toy: bool) -> tuple[None, Callable[[], object]]:
    """A pass, or a generation, of slipstream's runtime."""
    precision = "fp16" if device.type == "cuda" else "fp32"
    config = {"model": {"path": str(SHAPES / name)}, "precision": precision, "device": str(device)}
    model = build(Case(name, "fp32", 1, 1, PROMPT, "cpu", toy)).eval()
    engine = Engine(connector.plan(load_config(config), model=model))
    length = PROMPT if name == "gpt2" or toy else 128
    ids = torch.randint(5, 200, (1, length), generator=torch.Generator().manual_seed(1))
    if name == "bert-base":
        on_device = ids.to(device)
        return None, lambda: engine(on_device)
    rows = ids.tolist()
    return None, lambda: engine.generate(rows, max_new_tokens=NEW, do_sample=False, ignore_eos=True)


def measure(subject: str, device: torch.device, toy: bool, rounds: int, deadline: float) -> Row:
    """Plain and timed steps in turn, until ``deadline`` at most."""
    say(subject)
    if subject == "training":
        model, step = training(device, toy)
    else:
        model, step = runtime("bert-base" if subject == "encoder" else "gpt2", device, toy)
    for _ in range(WARM):
        step()
    timer = Timer(model, device)
    with timer.rehearsal():
        step()
    apart = 0.0
    for done in range(1, rounds + 1):
        with timer.plain():
            step()
        start = time.perf_counter()
        with timer.step():
            begun = time.perf_counter()
            step()
            ended = time.perf_counter()
        apart = (begun - start) + (time.perf_counter() - ended)
        if time.monotonic() > deadline:
            say(f"{subject}: the time is up after {done} of {rounds} rounds")
            break
    found = timer.timing(WARM + 1)
    kernels = sum(found.own(name).calls for name in found.modules)
    plain, timed, between = found.plain_seconds, found.step_seconds, found.own("").seconds
    return Row(subject, plain, timed, found.busy_seconds, found.idle_seconds, between, kernels, apart)


def text_of(rows: list[Row]) -> str:
    """The table and its verdicts, in at most 80 columns."""
    headers = ["step", "plain ms", "timed ms", "cost", "busy", "idle", "between", "apart s"]
    cells = [
        [
            row.subject,
            f"{row.plain * 1e3:.4g}",
            f"{row.timed * 1e3:.4g}",
            f"{row.cost:.3f}",
            f"{row.busy / row.timed:.1%}",
            f"{row.idle / row.timed:.1%}",
            f"{row.between / row.timed:.1%}",
            f"{row.apart:.2g}",
        ]
        for row in rows
    ]
    verdicts = [
        f"{row.subject}: busy and idle are {row.accounted:.1%} of the step (bar {ACCOUNTED_BAR:.0%} off): "
        f"{_verdict(abs(row.accounted - 1), ACCOUNTED_BAR)}"
        for row in rows
    ]
    verdicts += [
        f"training: {row.cost:.3f} of the plain step (bar {COST_BAR}): {_verdict(row.cost, COST_BAR)}"
        for row in rows
        if row.subject == "training"
    ]
    return "\n".join([table(headers, cells, texts=[0]), *verdicts])


def _verdict(value: float, bar: float) -> str:
    return "ok" if value <= bar else "MISSED"


def main() -> int:
    """Measures and prints; the JSON file holds every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--only", type=options.names(SUBJECTS, "step"), default=SUBJECTS, help="(training,encoder,decoder)"
    )
    parser.add_argument("--rounds", metavar="N", type=options.count, default=10, help="plain and timed steps (10)")
    parser.add_argument("--toy", action="store_true", help="models of two layers, to try the command")
    add_options(parser)
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device = device_of(chosen.device)
    begin, rows = time.monotonic(), []
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
        print(device_in_words(device), flush=True)
        for at, subject in enumerate(chosen.only, 1):
            deadline = begin + chosen.limit_seconds * at / len(chosen.only)
            rows.append(measure(subject, device, chosen.toy, chosen.rounds, deadline))
            free()
            if chosen.json is not None:
                write(chosen.json, device, rows)
    except SlipstreamError as error:
        parser.error(str(error))
    print(text_of(rows))
    return 0


def write(path: Path, device: torch.device, rows: list[Row]) -> None:
    """Writes all rows."""
    document = {
        "title": "what the profiler's timing pass costs",
        "machine": device_in_words(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [{**asdict(row), "cost": row.cost, "accounted": row.accounted} for row in rows],
    }
    report.write(path, json.dumps(document, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
