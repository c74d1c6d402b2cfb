"""One step of slipstream's training loop beside a loop written by hand, with the same options and the same batches.

    python -m benchmarks.train_step --json train_step.json
    python -m benchmarks.train_step --models gpt2 --precisions bf16 --accumulation 1 --rounds 20
    python -m benchmarks.train_step --toy --limit-seconds 20                     # to try the command

Models are Hugging Face's with random weights and dropout, and compute their loss themselves; ids are random. Both
loops: fused AdamW with weight decay on matrices only, gradients clipped to a norm of 1, a linear schedule, the loss
read after every step. A third loop never reads its loss, so that nothing waits for the device: no bar, but what a
reading costs. Times are of whole steps, a round of each loop in turn. Peak memory is that of processes of their own
(some 15 s each, beyond --limit-seconds): on a GPU what torch has allocated, on a CPU what the process holds beyond what
it held before it built the model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import SHAPES
from benchmarks.steps import (
    CLIP_NORM,
    WEIGHT_DECAY,
    adamw_loop,
    add_options,
    device_in_words,
    device_of,
    free,
    in_turn,
    say,
    wait,
)
from config_schema import SlipstreamError
from engine.bench import options, report
from engine.jobs.tables import table
from engine.outputs import check_writable
from engine.training.data.samples import IGNORED
from engine.training.precision import Mode

MODELS: tuple[str, ...] = ("bert-base", "gpt2")
PRECISIONS: tuple[Mode, ...] = ("bf16", "fp32")
OURS, PLAIN, UNREAD = "slipstream", "by hand", "by hand, loss unread"
#: A step may take, and hold, so many times what the loop written by hand does.
TIME_BAR, MEMORY_BAR = 1.03, 1.02
#: Steps' batches that a run goes around; steps to warm up, and those that a process takes whose memory is measured.
POOL, WARM, MEMORY_STEPS = 4, 3, 3
#: Length of the schedules, which no run reaches.
LONG, WARMUP, RATE = 1_000_000, 100, 1e-4


@dataclass(frozen=True)
class Case:
    """What is measured: ``batch`` sequences of ``length`` tokens a micro-batch, ``accumulation`` of them a step."""

    model: str
    precision: Mode
    accumulation: int
    batch: int
    length: int
    device: str
    toy: bool = False

    def __str__(self) -> str:
        size = f"{self.batch} sequences of {self.length} tokens"
        return f"{self.model}, {self.precision}, {self.accumulation} micro-batch(es) a step, {size} each"


def build(case: Case) -> nn.Module:
    """The model with random weights, on its device, in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    small: dict[str, Any] = {}
    if case.toy and case.model == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 200}
    elif case.toy:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 200}
    config = AutoConfig.from_pretrained(SHAPES / case.model, **small)
    config.use_cache = False
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if case.model == "gpt2" else AutoModelForMaskedLM
    model: nn.Module = kind.from_config(config).to(case.device)
    return model.train()


def batches(case: Case, vocabulary: int) -> list[list[dict[str, Tensor]]]:
    """The micro-batches of POOL steps, on the device."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.length)

    def one() -> dict[str, Tensor]:
        ids = torch.randint(5, vocabulary, shape, generator=generator)
        asked = torch.rand(shape, generator=generator) < 0.15
        asked[:, 0] = True  # the mean over no label is no number
        labels = ids if case.model == "gpt2" else ids.masked_fill(~asked, IGNORED)
        return {"input_ids": ids.to(case.device), "labels": labels.to(case.device)}

    return [[one() for _ in range(case.accumulation)] for _ in range(POOL)]


#: One step over its micro-batches; gives the mean loss, or nothing where it is not read.
Step = Callable[[Sequence[dict[str, Tensor]]], float | None]


def ours(case: Case, model: nn.Module) -> Step:
    """slipstream's loop."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch).loss
        return found

    device = torch.device(case.device)
    loop = adamw_loop(model, loss, precision=case.precision, device=device, lr=RATE, steps=LONG, warmup=WARMUP)
    return lambda micro_batches: loop.train_batch(micro_batches).loss


def by_hand(case: Case, model: nn.Module, read: bool) -> Step:
    """What a user of PyTorch and Hugging Face writes."""
    from transformers import get_linear_schedule_with_warmup

    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, LONG)
    device_type = torch.device(case.device).type

    def step(micro_batches: Sequence[dict[str, Tensor]]) -> float | None:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=case.device)
        for batch in micro_batches:
            with torch.autocast(device_type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
                loss = model(**batch).loss
            (loss / len(micro_batches)).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        return total.item() / len(micro_batches) if read else None

    return step


RUNS: dict[str, Callable[[Case, nn.Module], Step]] = {
    OURS: ours,
    PLAIN: lambda case, model: by_hand(case, model, True),
    UNREAD: lambda case, model: by_hand(case, model, False),
}


class Running:
    """A loop with its model, that goes around its batches."""

    def __init__(self, name: str, case: Case) -> None:
        model: Any = build(case)
        self._device = torch.device(case.device)
        self._step = RUNS[name](case, model)
        self._batches = itertools.cycle(batches(case, int(model.config.vocab_size)))

    def losses(self, steps: int) -> list[float | None]:
        """The losses of so many steps."""
        torch.manual_seed(2)  # dropout, the same in every run
        return [self._step(next(self._batches)) for _ in range(steps)]

    def seconds(self, steps: int) -> float:
        """Mean time of a step."""
        wait(self._device)
        start = time.perf_counter()
        for _ in range(steps):
            self._step(next(self._batches))
        wait(self._device)
        return (time.perf_counter() - start) / steps


def peak_memory(name: str, case: Case) -> int:
    """Bytes, in this process, which must have done nothing else."""
    device = torch.device(case.device)
    Running(name, replace(case, toy=True, batch=1, length=8)).losses(1)  # loads all that is to be loaded
    before = _status("VmRSS")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    Running(name, case).losses(MEMORY_STEPS)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes, of this process now (VmRSS) or at most (VmHWM). Not ``getrusage``: its peak counts what the parent held
    when it started this process."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def peak_memory_apart(name: str, case: Case) -> int:
    """:func:`peak_memory` in a process of its own."""
    threads = torch.get_num_threads()
    asked = json.dumps({"run": name, "threads": threads, **asdict(case)})
    command = [sys.executable, "-m", "benchmarks.train_step", "--memory-of", asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlipstreamError(f"{name}: the process whose memory is measured failed: {done.stderr.strip()[-400:]}")
    return int(done.stdout.split()[-1])


@dataclass(frozen=True)
class Row:
    """A run of a case. seconds: a step's, of each round. memory: bytes, of each process, if it was measured. loss: of
    the last warm step; None where it is not read."""

    case: Case
    run: str
    seconds: list[float]
    memory: list[int]
    loss: float | None


def measure(case: Case, chosen: argparse.Namespace, deadline: float) -> list[Row]:
    """The rows of a case. Raises if the loops do not compute the same losses, which would not be the same work."""
    say(str(case))
    running = {name: Running(name, case) for name in RUNS}
    losses = {name: run.losses(WARM) for name, run in running.items()}
    for mine, theirs in zip(losses[OURS], losses[PLAIN], strict=True):
        if mine is None or theirs is None or abs(mine - theirs) > 1e-3 * abs(theirs):
            raise SlipstreamError(f"{case}: the losses differ: {losses[OURS]} and by hand {losses[PLAIN]}")
    found = in_turn(
        {name: partial(run.seconds, chosen.steps) for name, run in running.items()},
        chosen.rounds,
        deadline,
        str(case),
    )
    running.clear()
    free()
    memory: dict[str, list[int]] = {name: [] for name in RUNS}
    for name in (OURS, PLAIN) * chosen.processes:
        say(f"{case}: memory of {name}")
        memory[name].append(peak_memory_apart(name, case))
    return [Row(case, name, found[name], memory[name], losses[name][-1]) for name in RUNS]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Ours to the loop by hand: ``time``, the median of the ratios within a round; ``memory``, that of the medians."""
    by_run = {row.run: row for row in rows}
    mine, theirs = by_run[OURS], by_run[PLAIN]
    time_ratio = statistics.median(a / b for a, b in zip(mine.seconds, theirs.seconds, strict=True))
    if not mine.memory:
        return {"time": time_ratio}
    return {"time": time_ratio, "memory": statistics.median(mine.memory) / statistics.median(theirs.memory)}


def text_of(rows: Sequence[Row]) -> str:
    """The table of a case and its verdicts, in at most 80 columns."""
    cells = []
    for row in rows:
        ms = [1000 * value for value in row.seconds]
        peak = f"{statistics.median(row.memory) / 2**20:.1f}" if row.memory else "-"
        cells.append([row.run, f"{statistics.median(ms):.4g} ({min(ms):.4g} to {max(ms):.4g})", peak])
    bars = {"time": TIME_BAR, "memory": MEMORY_BAR}
    verdicts = [
        f"{what}: {ratio:.4f} of the loop by hand (bar {bars[what]}): {'ok' if ratio <= bars[what] else 'MISSED'}"
        for what, ratio in ratios(rows).items()
    ]
    drawn = table(["loop", "ms a step", "peak MiB"], cells, texts=[0])
    return "\n".join([str(rows[0].case), drawn, *verdicts])


def cases(chosen: argparse.Namespace) -> list[Case]:
    """Every case that is asked for."""
    device = device_of(chosen.device)
    gpu = device.type == "cuda"
    sizes = {"bert-base": (32, 128) if gpu else (2, 128), "gpt2": (8, 512) if gpu else (1, 128)}
    found = []
    for model, precision, accumulation in itertools.product(chosen.models, chosen.precisions, chosen.accumulation):
        batch, length = sizes[model]
        case = Case(model, precision, accumulation, chosen.batch or batch, chosen.length or length, str(device))
        found.append(replace(case, toy=True, batch=2, length=16) if chosen.toy else case)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", type=options.names(MODELS, "model"), default=MODELS, help="(bert-base,gpt2)")
    parser.add_argument(
        "--precisions", type=options.names(PRECISIONS, "precision"), default=PRECISIONS, help="(bf16,fp32)"
    )
    parser.add_argument("--accumulation", metavar="N,N", type=options.counts, default=(1, 2), help="(1,2)")
    parser.add_argument("--batch", metavar="N", type=options.count, help="sequences a micro-batch (32 and 8; CPU 2, 1)")
    parser.add_argument("--length", metavar="N", type=options.count, help="tokens (128 and 512; on a CPU 128)")
    parser.add_argument("--rounds", metavar="N", type=options.count, default=10, help="of each loop in turn (10)")
    parser.add_argument("--steps", metavar="N", type=options.count, help="steps a round (10; on a CPU 3)")
    parser.add_argument("--processes", metavar="N", type=int, default=1, help="to measure memory, of each loop (1)")
    parser.add_argument("--toy", action="store_true", help="models of two layers, to try the command")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    add_options(parser)
    return parser


def main() -> int:
    """Measures and prints case by case; the JSON file is written anew after each."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.memory_of is not None:
        asked = json.loads(chosen.memory_of)
        torch.set_num_threads(asked.pop("threads"))
        print(peak_memory(asked.pop("run"), Case(**asked)))
        return 0
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    wanted = cases(chosen)
    chosen.steps = chosen.steps or (3 if wanted[0].device == "cpu" else 10)
    device = device_in_words(torch.device(wanted[0].device))
    deadline = time.monotonic() + chosen.limit_seconds
    rows: list[Row] = []
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
        print(device, flush=True)
        for at, case in enumerate(wanted):
            left = deadline - time.monotonic()
            rows += (mine := measure(case, chosen, time.monotonic() + left / (len(wanted) - at)))
            print(f"\n{text_of(mine)}", flush=True)
            if chosen.json is not None:
                write(chosen.json, device, rows)
    except SlipstreamError as error:
        parser.error(str(error))
    return 0


def write(path: Path, device: str, rows: Sequence[Row]) -> None:
    """Writes all rows with their case's ratios."""
    by_case = {row.case: [other for other in rows if other.case == row.case] for row in rows}
    document = {
        "title": "a training step, beside a loop written by hand",
        "machine": device,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [{**asdict(row), "ratios": ratios(by_case[row.case])} for row in rows],
    }
    report.write(path, json.dumps(document, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
