"""OneBitAdam, OneBitLamb and ZeroOneAdam beside DeepSpeed's: the loss of every step, on two ranks, for several seeds.

    python -m benchmarks.onebit_against_deepspeed                                  # CPU, Gloo, fp32
    python -m benchmarks.onebit_against_deepspeed --device cuda --dtype fp16       # 2 GPUs, NCCL, CuPy

The models are those of DeepSpeed's own tests (linear layers, cross entropy; 50 random samples with random labels), at
a rate at which 100 steps learn something. Both start from the same weights; a seed is an order of the samples, one a
rank and step, the same for both. The loss is that on all 50, before each step, the mean of the two ranks.

``10`` is the tests' model, ``64 x 4`` has four layers of 64, and each optimizer is as one uses it: DeepSpeed exchanges
each parameter with a scale of its own (in fp16 and for LAMB all together), padded with zeros that count in the scale;
ours exchanges all together, with a scale for each parameter (for LAMB one). ``alike``: sizes that need no padding, and
ours given each parameter in a group of its own where DeepSpeed exchanges it alone, and one scale where DeepSpeed has
one: the arithmetic is then the same, step for step.

benchmarks/deepspeed_onebit.py says what runs DeepSpeed on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks import deepspeed_onebit
from benchmarks.measure import parser, report
from ops.compression import TorchCollective
from ops.optimizers import OneBitAdam, OneBitLamb, ZeroOneAdam

RANKS, SAMPLES = 2, 50
#: Of 0/1 Adam at each interval; so many steps have exact means at first.
VARIANCE_UPDATES = 4
Losses = Sequence[Sequence[float]]
#: Losses are called equal where they differ by less, of fp32 and fp16.
EQUAL = {"fp32": 1e-6, "fp16": 2e-3}
KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "OneBitAdam": OneBitAdam,
    "OneBitLamb": OneBitLamb,
    "ZeroOneAdam": ZeroOneAdam,
}


@dataclass
class Case:
    """A model, its learning rates, and whether ours exchanges what DeepSpeed exchanges."""

    hidden: int
    layers: int
    rates: dict[str, float]
    alike: bool = False


RATES = {"OneBitAdam": 1e-2, "OneBitLamb": 1e-2, "ZeroOneAdam": 1e-2}
#: Four layers at one sample a rank diverge at higher ones, DeepSpeed's too.
LOW_RATES = {"OneBitAdam": 3e-4, "OneBitLamb": 1e-2, "ZeroOneAdam": 1e-4}
CASES = {
    "10": Case(10, 1, RATES),
    "16, alike": Case(16, 1, RATES, alike=True),
    "64 x 4": Case(64, 4, LOW_RATES),
    "64 x 4, alike": Case(64, 4, LOW_RATES, alike=True),
}


class SimpleModel(nn.Module):
    """Linear layers, with a residual path where there are several; gives the loss."""

    def __init__(self, hidden: int, layers: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [samples, hidden], y int64 [samples]; the mean loss, fp32."""
        first, *others = self.linears
        x = first(x)
        for linear in others:
            x = x + linear(x)
        return nn.functional.cross_entropy(x.float(), y)


@dataclass
class Plan:
    """What every rank is told."""

    device: str
    dtype: str
    steps: int
    warmup: int
    seeds: int
    store: str
    result: str


class Ours:
    """A model with one of our optimizers: what :class:`deepspeed_onebit.Trainer` is for DeepSpeed."""

    def __init__(self, model: nn.Module, kind: str, options: dict[str, Any], apart: bool, one_scale: bool) -> None:
        self.model = model
        groups = [{"params": [each]} for each in model.parameters()] if apart else model.parameters()
        self._optimizer: Any = KINDS[kind](groups, collective=TorchCollective(), **options)
        if one_scale:
            self._optimizer.scale_each = False

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on this rank's samples."""
        self._optimizer.zero_grad()
        self.model(x, y).backward()
        self._optimizer.step()


def options_of(plan: Plan, case: Case, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours and DeepSpeed's for the same: DeepSpeed corrects no bias, and its 0/1 Adam freezes one step later than it is
    told. Intervals of 0/1 Adam double after 4 updates of the variance and after 16 steps behind it."""
    both = {"lr": case.rates[kind], "weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
    freeze = "freeze_step"
    if kind == "ZeroOneAdam":
        freeze = "var_freeze_step"
        both |= {"var_update_scaler": VARIANCE_UPDATES, "local_step_scaler": 16, "local_step_clipper": 4}
    ours = {**both, freeze: plan.warmup, "bias_correction": False}
    return ours, {**both, freeze: plan.warmup - (kind == "ZeroOneAdam")}


def order(seed: int, steps: int) -> Tensor:
    """The samples of each step and rank: int64 [steps, ranks]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    epochs = -(-steps * RANKS // SAMPLES)
    dealt = torch.cat([torch.randperm(SAMPLES, generator=generator) for _ in range(epochs)])
    return dealt[: steps * RANKS].view(steps, RANKS)


def train(trainer: Any, x: Tensor, y: Tensor, chosen: Tensor, rank: int) -> list[float]:
    """The loss before each step and behind the last one."""
    losses = []
    for step in [*chosen[:, rank].tolist(), None]:
        with torch.no_grad():
            loss = trainer.model(x, y).double()
        dist.all_reduce(loss)
        losses.append(float(loss) / RANKS)
        if step is not None:
            trainer.step(x[step : step + 1], y[step : step + 1])
    return losses


def run(rank: int, plan: Plan, deepspeed: Any, case: Case, kind: str) -> dict[str, list[list[float]]]:
    """The losses of all seeds."""
    half, device = plan.dtype == "fp16", torch.device(plan.device, rank if plan.device == "cuda" else None)
    kinds = torch.float16 if half else torch.float32
    data = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, case.hidden, generator=data).to(device, kinds)
    y = torch.randint(case.hidden, (SAMPLES,), generator=data).to(device)

    def model() -> nn.Module:
        torch.manual_seed(2)
        return SimpleModel(case.hidden, case.layers).to(device)

    apart = case.alike and not half and kind != "OneBitLamb"
    one_scale = case.alike and half
    our_options, their_options = options_of(plan, case, kind)
    found: dict[str, list[list[float]]] = {"ours": [], "DeepSpeed": []}
    for seed in range(plan.seeds):
        chosen = order(seed, plan.steps)
        ours = Ours(model().to(kinds), kind, our_options, apart, one_scale)
        found["ours"].append(train(ours, x, y, chosen, rank))
        with redirect_stdout(StringIO()):  # DeepSpeed prints from each rank
            theirs = deepspeed_onebit.Trainer(deepspeed, model(), kind, their_options, half)
            theirs.begin(x[:1], y[:1])
            found["DeepSpeed"].append(train(theirs, x, y, chosen, rank))
    return found


def rank_main(rank: int, plan: Plan) -> None:
    """One rank of all runs. Rank 0 writes the losses."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    if plan.device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    given: dict[str, Any] = {"rank": rank, "world_size": RANKS, "timeout": timedelta(minutes=5)}
    dist.init_process_group("nccl" if plan.device == "cuda" else "gloo", init_method=f"file://{plan.store}", **given)
    deepspeed = deepspeed_onebit.start(plan.device)
    found = {}
    for case in CASES:
        for kind in KINDS:
            found[f"{case}|{kind}"] = run(rank, plan, deepspeed, CASES[case], kind)
            if rank == 0:
                print(f"... {case}: {kind}", file=sys.stderr, flush=True)
    if rank == 0:
        Path(plan.result).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def compared(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], warmup: int, near: float
) -> dict[str, Any]:
    """One row of losses [seeds][steps + 1]. The first ``warmup + 1`` are of steps with exact means."""
    a, b = torch.tensor(ours, dtype=torch.float64), torch.tensor(theirs, dtype=torch.float64)
    apart = (a - b).abs()
    far = (~(apart <= near)).any(0).nonzero()  # NaN is far as well
    means = (a.mean(0) - b.mean(0))[warmup + 1 :]
    between = b.std(0)[warmup + 1 :]
    return {
        "equal steps": int(far[0]) if len(far) else a.shape[1],
        "warm-up": float(apart[:, : warmup + 1].max()),
        "then": float(apart[:, warmup + 1 :].max()),
        "of means": float(means.abs().mean()),
        "seeds": float(between.mean()),
        "start": float(b[:, 0].mean()),
        "end": float(a[:, -1].mean()),
        "DeepSpeed's": float(b[:, -1].mean()),
    }


def main() -> int:
    """The command."""
    options = parser(__doc__ or "")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--dtype", choices=EQUAL, default="fp32", help="fp16: both keep fp32 master weights")
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--warmup", type=int, default=24, help="steps before v is frozen; a multiple of 4")
    options.add_argument("--seeds", type=int, default=5)
    given = options.parse_args()
    if lacking := deepspeed_onebit.missing(given.device):
        options.exit(2, f"error: {lacking}\n")
    if given.device == "cuda" and torch.cuda.device_count() < RANKS:
        options.exit(2, f"error: {torch.cuda.device_count()} GPUs, wanted {RANKS}: use --device cpu\n")
    if given.seeds < 2 or given.warmup % 4 or not 4 <= given.warmup < given.steps:
        options.exit(2, "error: use 2 --seeds or more, and a --warmup that is a multiple of 4 and less than --steps\n")
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            given.device, given.dtype, given.steps, given.warmup, given.seeds, f"{folder}/store", f"{folder}/losses"
        )
        mp.spawn(rank_main, (plan,), nprocs=RANKS)
        found = json.loads(Path(plan.result).read_text())
    rows = []
    for name, losses in found.items():
        case, kind = name.split("|")
        exact = VARIANCE_UPDATES if kind == "ZeroOneAdam" else given.warmup
        row = compared(losses["ours"], losses["DeepSpeed"], exact, EQUAL[given.dtype])
        rows.append({"model": case, "optimizer": kind, **row})
    beside = f"{given.seeds} seeds, DeepSpeed {deepspeed_onebit.VERSION}"
    title = f"{given.steps} steps on {RANKS} ranks, {given.dtype}, {beside}"
    report(title, rows, given.json, losses=found, device=given.device, warmup=given.warmup)
    return 0


if __name__ == "__main__":
    sys.exit(main())
