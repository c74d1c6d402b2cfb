"""Pre-training by several ranks in one process: a model of its own for each, and an optimizer that exchanges signs, or
one model and the gradient that all ranks together have."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.convergence_data import Corpus
from benchmarks.convergence_loop import PreTraining, Settings
from benchmarks.masked_lm import MaskedLM, Norm, Shape, loss, masked_lm
from benchmarks.steps import WEIGHT_DECAY, wait
from config_schema import SlipstreamError
from engine.training.checkpoint import Stateful
from engine.training.loop import Loop, NoNumber, StepReport
from engine.training.optimizer import build_optimizer
from engine.training.precision import Precision
from engine.training.random_state import RandomState
from engine.training.schedules import build_schedule
from ops.compression import Errors, GradientCollective, Pending, Sent, SimulatedCollective
from ops.optimizers import OneBitAdam, OneBitLamb, ZeroOneAdam
from ops.optimizers.compressed import CompressedOptimizer

#: What a run of 0/1 Adam is to go through, as shares of DeepSpeed's settings for BERT-Large: 118,000 steps, of which
#: the interval between exchanges doubles every 32,678, up to 16.
LOCAL_SHARE, LOCAL_MOST = 32678 / 118000, 16


@dataclass(frozen=True)
class RanksRun(Settings):
    """What is trained by how many ranks, each with ``batch / ranks`` sequences of a step.

    freeze: share of the steps behind which the variance stands, or "auto". clip: the largest norm of the gradient, 0
    for none. eps: as the optimizers have it. one_scale: for the signs of all parameters that are exchanged together,
    whatever the optimizer has. exact: full means in place of signs, so that only what else the optimizer does otherwise
    is left. var_update_scaler: 0/1 Adam's.
    """

    ranks: int = 4
    norm: Norm = "preln"
    freeze: float | Literal["auto"] = 0.2
    clip: float = 1.0
    eps: float = 1e-8
    one_scale: bool = False
    exact: bool = False
    var_update_scaler: int = 16
    shape: Shape = field(default_factory=lambda: Shape(6, 512, 8, dropout=0.0))

    def __post_init__(self) -> None:
        if self.batch % self.ranks:
            raise SlipstreamError(f"--batch {self.batch} is not a multiple of --ranks {self.ranks}")
        if self.precision == "fp16":
            raise SlipstreamError("--precision fp16: each rank would have a loss scale of its own: use bf16 or fp32")
        if self.arm == "zero_one_adam" and self.freeze == "auto":
            raise SlipstreamError("--freeze auto: zero_one_adam needs a share of the steps")

    @property
    def name(self) -> str:
        """Of its files."""
        return "-".join([super().name, f"batch{self.batch}", *variant(asdict(self))]).replace(" ", "")

    @property
    def freeze_step(self) -> int | Literal["auto"]:
        """In steps."""
        return "auto" if self.freeze == "auto" else max(round(self.freeze * self.steps), 1)


def variant(run: Mapping[str, Any]) -> list[str]:
    """What a run (its fields) has otherwise than the benchmark's defaults, where its optimizer exchanges signs."""
    if isinstance(ARMS[run["arm"]].kind, str):
        return []
    names = ("freeze", "one_scale", "exact", "var_update_scaler")
    defaults = {field.name: field.default for field in fields(RanksRun) if field.name in names}
    return [f"{name} {run[name]}" for name, value in defaults.items() if run.get(name, value) != value]


def adam(run: RanksRun) -> dict[str, Any]:
    """What the 1-bit optimizers take beside what all have."""
    return {"freeze_step": run.freeze_step}


def zero_one(run: RanksRun) -> dict[str, Any]:
    """DeepSpeed's settings for BERT, scaled to the length of the run. The last step is one of an exchange: the interval
    doubles, and the local steps begin, a multiple of the longest interval before it."""
    assert run.freeze_step != "auto"
    most = LOCAL_MOST
    while most > 1 and LOCAL_SHARE * run.steps < most:
        most //= 2
    local = max((run.steps - run.freeze_step) // most * most, most)
    return {
        "var_freeze_step": max(run.steps - local, 1),
        "var_update_scaler": run.var_update_scaler,
        "local_step_scaler": max(round(LOCAL_SHARE * run.steps / most), 1) * most,
        "local_step_clipper": most,
        "bias_correction": True,
    }


@dataclass(frozen=True)
class Arm:
    """kind: the optimizer's class, or the name of one that knows nothing of ranks. baseline: the arm it is to be
    compared with."""

    kind: type[CompressedOptimizer] | str
    baseline: str
    options: Callable[[RanksRun], dict[str, Any]] = lambda _: {}


ARMS: Mapping[str, Arm] = {
    "lamb": Arm("LAMB", "lamb"),
    "onebit_lamb": Arm(OneBitLamb, "lamb", adam),
    "adamw": Arm("AdamW", "adamw"),
    "onebit_adam": Arm(OneBitAdam, "adamw", adam),
    "zero_one_adam": Arm(ZeroOneAdam, "adamw", zero_one),
}


def optimizer_of(model: nn.Module, run: RanksRun, collective: GradientCollective | None) -> Optimizer:
    """The arm's. Weight decay leaves out biases and norm weights in all of them."""
    arm = ARMS[run.arm]
    common: dict[str, Any] = {"lr": run.lr, "weight_decay": WEIGHT_DECAY, "eps": run.eps}
    if isinstance(arm.kind, str):
        return build_optimizer(model, arm.kind, common)
    named = list(model.named_parameters())
    groups = [
        {"params": [(name, parameter) for name, parameter in named if parameter.ndim >= 2]},
        {"params": [(name, parameter) for name, parameter in named if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    kind: Any = arm.kind
    found = kind(groups, collective=collective, max_grad_norm=run.clip, **common, **arm.options(run))
    if run.one_scale:
        found.scale_each = False
    optimizer: Optimizer = found
    return optimizer


class Exact:
    """A collective whose compressed mean is a full one."""

    def __init__(self, inner: GradientCollective) -> None:
        self._inner, self.rank, self.size, self.sent = inner, inner.rank, inner.size, inner.sent

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """As it is."""
        return self._inner.mean(tensors)

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """The mean; ``errors`` stay nothing."""
        return self._inner.mean([buffer])


class RanksTraining(PreTraining):
    """A run that is going on: ``ranks`` loops of one micro-batch a step each, or one of ``ranks`` micro-batches."""

    def __init__(self, run: RanksRun, corpus: Corpus, device: torch.device) -> None:
        super().__init__(run, corpus, device)
        self._ranks = run.ranks
        self.compressed = not isinstance(ARMS[run.arm].kind, str)
        first = masked_lm(run.norm, run.shape, run.seed).to(device)
        models = [first, *(copy.deepcopy(first) for _ in range(run.ranks - 1))] if self.compressed else [first]
        exchange, losses = SimulatedCollective(run.ranks), SimulatedCollective(run.ranks)
        self.loops = [
            self._loop(run, model, exchange.ranks[rank], losses.ranks[rank]) for rank, model in enumerate(models)
        ]
        self.sent: Sent = exchange.ranks[0].sent
        self._gradient = sum(parameter.numel() * parameter.element_size() for parameter in first.parameters())
        self._pool = ThreadPoolExecutor(len(models), "rank")

    def _loop(self, run: RanksRun, model: MaskedLM, collective: GradientCollective, losses: GradientCollective) -> Loop:
        optimizer = optimizer_of(model, run, Exact(collective) if run.exact else collective)

        def mean(values: Tensor) -> Tensor:
            if self.compressed:
                losses.mean([values]).wait()
            return values

        return Loop(
            model,
            optimizer,
            loss,
            schedule=build_schedule("linear", optimizer, int(run.warmup * run.steps), run.steps),
            precision=Precision(run.precision, self.device.type),
            clip_norm=None if self.compressed else run.clip or None,
            accumulation=1 if self.compressed else run.ranks,
            reduce=mean,
        )

    @property
    def model(self) -> MaskedLM:
        """The first rank's."""
        model = self.loops[0].progress.model
        assert isinstance(model, MaskedLM)
        return model

    @property
    def step(self) -> int:
        """Steps done."""
        return self.loops[0].progress.step

    @property
    def optimizers(self) -> list[Any]:
        """Of each rank, or the one there is."""
        return [loop.progress.optimizer for loop in self.loops]

    @property
    def settled(self) -> bool:
        """Whether all ranks have the same weights: 0/1 Adam's part between two exchanges."""
        return bool(getattr(self.optimizers[0], "together", True))

    def objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds."""
        found: dict[str, Stateful] = {"batches": self.batches, "curve": self.curve, "random": RandomState()}
        for rank, loop in enumerate(self.loops):
            found |= {
                f"model{rank}": loop.progress.model,
                f"optimizer{rank}": _Whole(loop.progress.optimizer),
                f"loop{rank}": loop,
            }
        return {**found, "sent": _Counts(self.sent)}

    def advance(self, batch: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """One step; the curve keeps the seconds of the optimizers with their exchange.

        Forward and backward passes run rank by rank, so that all arms draw the same dropout.
        """
        parts = {name: value.chunk(self._ranks) for name, value in batch.items()}
        for rank in range(self._ranks):
            loop = self.loops[rank % len(self.loops)]
            loop.backward(loop.forward({name: own[rank] for name, own in parts.items()}))
        wait(self.device)  # as the optimizers do at once
        start = time.perf_counter()
        reports = self._together()
        wait(self.device)
        if not self.compressed:
            self.sent.count_full(self._gradient, self._ranks)
        return reports[0].loss, {"update": time.perf_counter() - start}

    def _together(self) -> Sequence[StepReport]:
        """The step of all ranks, each in a thread of its own, because each waits for the others."""
        asked: list[Future[StepReport | None]] = [self._pool.submit(loop.step) for loop in self.loops]
        done, _ = wait_for(asked, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        if any(getattr(optimizer, "skipped", False) for optimizer in self.optimizers):
            raise NoNumber(f"step {self.step}: a gradient is infinite or NaN: lower the learning rate")
        return [report for future in asked if (report := future.result()) is not None]

    def evaluate(self) -> float:
        """The held-out loss of the weights, which must be the same on all ranks to the last bit."""
        self.check_equal()
        return super().evaluate()

    def check_equal(self) -> None:
        """Raises :class:`SlipstreamError` where a weight differs between two ranks."""
        first = dict(self.model.named_parameters())
        for rank, loop in enumerate(self.loops):
            for name, parameter in loop.progress.model.named_parameters():
                if not torch.equal(parameter, first[name]):
                    apart = float((parameter - first[name]).detach().abs().max())
                    raise SlipstreamError(
                        f"step {self.step}: {name} of rank {rank} is not that of rank 0: up to {apart:.3g} apart"
                    )

    def facts(self) -> dict[str, float]:
        """Bytes that a rank has sent, of which signs with their scales."""
        return {"sent": self.sent.full + self.sent.compressed, "sent_compressed": self.sent.compressed}

    def about(self) -> dict[str, object]:
        """When the variance was frozen, and what the optimizer was given."""
        optimizer = self.optimizers[0]
        options = {key: value for key, value in optimizer.defaults.items() if isinstance(value, int | float | str)}
        frozen = optimizer.compression_state()["frozen_at"] if self.compressed else None
        return {"frozen_at": frozen, "options": options, "gradient_bytes": self._gradient}

    def close(self) -> None:
        """Ends the background threads."""
        super().close()
        self._pool.shutdown()


class _Whole:
    """An optimizer with its errors in a checkpoint: virtual ranks are in one process, which would take one's errors for
    those of all."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)


class _Counts:
    """:class:`Sent` in a checkpoint."""

    def __init__(self, sent: Sent) -> None:
        self._sent = sent

    def state_dict(self) -> dict[str, int]:
        return {"full": self._sent.full, "compressed": self._sent.compressed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._sent.full, self._sent.compressed = state["full"], state["compressed"]
