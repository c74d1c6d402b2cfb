"""Engines that train with compressed optimizers, on each process under torchrun: ``HOME CASE...``."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import Engine
from engine.errors import EngineError
from ops.optimizers.pays import Verdict
from tests.engine.training.trained import Stack, config

#: The optimizers' sections, compressing after a few steps; 0/1 Adam alone for up to four.
KINDS: dict[str, dict[str, Any]] = {
    "OneBitAdam": {"freeze_step": 3, "weight_decay": 0.01},
    "OneBitLamb": {"freeze_step": 3, "weight_decay": 0.01},
    "ZeroOneAdam": {"var_freeze_step": 4, "var_update_scaler": 1, "local_step_scaler": 2, "local_step_clipper": 4},
}
STEPS, ROWS, CLIP = 12, 6, 0.4
#: What of the warm-up is to be the same as with gradients that are averaged in full.
IN_FULL = {"OneBitAdam": "AdamW", "OneBitLamb": "LAMB"}
DROP = {"theta": 0.3, "gamma": 0.5}


def engine_of(kind: str, model: nn.Module | None = None, **sections: Any) -> Engine:
    """An engine of a stack of blocks; ``sections`` replace or extend."""
    base: dict[str, Any] = {"micro_batch_size": ROWS, "accumulation_steps": 2, "clip_norm": CLIP, "max_steps": STEPS}
    optimizer = {"type": kind, "lr": 0.02, **KINDS.get(kind, {"weight_decay": 0.01}), **sections.pop("optimizer", {})}
    training = {**base, **sections.pop("training", {})}
    given = {**config(training=training, **sections), "optimizer": optimizer}
    return Engine(given, model=model or Stack(), loss_function=lambda outputs, batch: outputs.square().mean())


def batch(step: int, rank: int) -> dict[str, Tensor]:
    """A rank's rows of a step: not those of another."""
    return {"x": torch.randn(2 * ROWS, 6, generator=torch.Generator().manual_seed(1000 * step + rank))}


def train(engine: Engine, first: int, last: int) -> list[Any]:
    """The reports of some steps."""
    return [engine.train_batch(batch(step, dist.get_rank())) for step in range(first, last)]


def weights(model: nn.Module) -> Tensor:
    """All of them end to end."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def alike(value: Tensor) -> bool:
    """Whether all ranks have the same bits."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return all(torch.equal(one, value) for one in found)


def steps(home: Path) -> dict[str, Any]:
    """Losses, norms and weights of each optimizer."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        engine = engine_of(kind)
        reports, apart = [], []
        for step in range(STEPS):
            reports += train(engine, step, step + 1)
            apart.append(not alike(weights(engine.model)))
        torch.save([report.loss for report in reports], home / f"losses-{kind}-{dist.get_rank()}.pt")
        torch.save(weights(engine.model), home / f"{kind}-{dist.get_rank()}.pt")
        found[kind] = {"apart": apart, "norms": [report.grad_norm for report in reports]}
    return found


def warm_up(home: Path) -> dict[str, Any]:
    """A warm-up that does not end, beside gradients that are averaged in full; all layers, and with some dropped."""
    found: dict[str, Any] = {}
    for mine, full in IN_FULL.items():
        for drop in (False, True):
            sections = {"progressive_layer_drop": DROP} if drop else {}
            for kind, options in ((mine, {"freeze_step": 1000}), (full, {})):
                reports = train(engine_of(kind, optimizer=options, **sections), 0, STEPS)
                layers = [report.metrics.get("layer_drop/layers", 3.0) for report in reports]
                found[f"{kind} {drop}"] = [[r.loss for r in reports], [r.grad_norm for r in reports], layers]
    return found


def features(home: Path) -> dict[str, Any]:
    """Behind the warm-up with layers dropped, activations computed again and a part frozen: alike in all processes."""
    found: dict[str, Any] = {}
    for kind in IN_FULL:
        for again in (False, True):
            model = Stack()
            frozen = model.blocks[0].norm.requires_grad_(False)
            before = weights(frozen)
            training = {"activation_checkpointing": again, "accumulation_steps": 1, "micro_batch_size": 2 * ROWS}
            engine = engine_of(kind, model, progressive_layer_drop=DROP, training=training)
            reports = train(engine, 0, 2 * STEPS)
            assert torch.equal(before, weights(frozen))
            found[f"{kind} {again}"] = {
                "alike": alike(weights(model)),
                "losses": [report.loss for report in reports],
                "layers": [report.metrics["layer_drop/layers"] for report in reports],
            }
    return found


def break_gradients(model: Any, factor: float) -> list[int]:
    """The second process multiplies a weight's gradient by ``factor`` while the list holds something."""
    now: list[int] = []
    model.blocks[1].inner.weight.register_hook(lambda grad: grad * factor if now and dist.get_rank() == 1 else grad)
    return now


def overflows(home: Path) -> dict[str, Any]:
    """A gradient that overflows in fp16 on one rank, in the warm-up and behind it."""
    engine = engine_of("OneBitAdam", precision="fp16", training={"loss_scale": {"initial": 256.0}})
    now = break_gradients(engine.model, torch.inf)
    skipped, scales = [], []
    for step in range(8):
        now[:] = [step] if step in (1, 5) else []
        before = weights(engine.model)
        skipped.append(train(engine, step, step + 1)[0].skipped)
        scales.append(engine._trainer.loop.precision.scale)
        assert torch.equal(before, weights(engine.model)) == skipped[-1]
    return {"skipped": skipped, "scales": scales, "alike": alike(weights(engine.model)), "steps": engine.global_step}


def faults(home: Path) -> dict[str, Any]:
    """A gradient that is no number on one rank, though the losses are; in the warm-up and behind it."""
    found = {}
    for kind in KINDS:
        engine = engine_of(kind)
        now = break_gradients(engine.model, torch.nan)
        said = []
        for step in range(8):
            now[:] = [step] if step in (1, 6) else []
            before = weights(engine.model)
            try:
                train(engine, step, step + 1)
            except EngineError as error:
                said.append(f"{type(error).__name__}: {error}")
                assert torch.equal(before, weights(engine.model))
        engine._trainer.meet()
        found[kind] = {"said": said, "alike": alike(weights(engine.model)), "steps": engine.global_step}
    return found


def others(home: Path) -> dict[str, Any]:
    """What is said of models that differ, also to others than compressed optimizers; weights that differ are shared."""

    def wider(model: nn.Module) -> None:
        model.out = nn.Linear(6, 2)

    def more(model: nn.Module) -> None:
        model.more = nn.Linear(1, 1)

    changes: dict[str, Callable[[nn.Module], Any]] = {
        "shape": wider,
        "names": more,
        "frozen": lambda model: model.out.bias.requires_grad_(False),
        "dtype": lambda model: model.out.bfloat16(),
    }
    found = {}
    for name, change in changes.items():
        for kind in ("OneBitAdam", "AdamW"):
            model = Stack()
            if dist.get_rank() == 1:
                change(model)
            try:
                train(engine_of(kind, model), 0, 1)
            except EngineError as error:
                found[f"{kind} {name}"] = str(error)
    model = Stack()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += dist.get_rank()
    found["loss"] = str(train(engine_of("OneBitAdam", model), 0, 1)[0].loss)
    return found


def errors_of(engine: Engine) -> dict[str, Any]:
    """Of this rank's bucket."""
    kept = engine._trainer.loop.progress.optimizer._errors  # type: ignore[attr-defined]
    return {str(index): one.state_dict() for index, one in kept.items()}


def save(home: Path) -> dict[str, Any]:
    """Checkpoints in the midst of compression, then the steps behind them. One process has its own directory."""
    world = dist.get_world_size()
    for kind in KINDS:
        engine = engine_of(kind)
        train(engine, 0, 9)
        engine.save_checkpoint(home / f"{kind}-{world}")
        torch.save(errors_of(engine), home / f"errors-{kind}-{world}-{dist.get_rank()}.pt")
        train(engine, 9, STEPS)
        engine.save_checkpoint(home / f"{kind}-{world}-end")  # 0/1 Adam meets here
        torch.save(weights(engine.model), home / f"end-{kind}-{world}-{dist.get_rank()}.pt")
    return {}


def resume(home: Path, of: int) -> dict[str, Any]:
    """Goes on from the checkpoints of ``of`` processes."""
    world, found = dist.get_world_size(), {}
    for kind in KINDS:
        engine = engine_of(kind)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert engine.load_checkpoint(home / f"{kind}-{of}") == 9
        torch.save(errors_of(engine), home / f"errors-{kind}-{of}-{world}-{dist.get_rank()}.pt")
        losses = [report.loss for report in train(engine, 9, STEPS)]
        engine.save_checkpoint(home / f"{kind}-{of}-{world}-end")
        torch.save(weights(engine.model), home / f"end-{kind}-{of}-{world}-{dist.get_rank()}.pt")
        warned = [str(each.message) for each in said if "errors of" in str(each.message)]
        found[kind] = {"losses": losses, "warned": warned, "alike": alike(weights(engine.model))}
    return found


def exchanges(home: Path) -> dict[str, Any]:
    """Gradients that travel in bf16, by low rank, and in full: each step's, of a weight and a bias, and losses."""
    found: dict[str, Any] = {}
    hows = {"full": "full", "bf16": "bf16", "low rank": "PowerSGD", "again": "full"}
    for name, how in hows.items():
        training: dict[str, Any] = {"gradient_exchange": how, "clip_norm": None}
        if how == "PowerSGD":
            training["power_sgd"] = {"start_step": 3}
        engine = engine_of("AdamW", training=training)
        losses, kept = [], []
        for step in range(6):
            losses.append(train(engine, step, step + 1)[0].loss)
            inner = engine.model.blocks[1].inner
            kept.append((inner.weight.grad.clone(), inner.bias.grad.clone()))
        if name == "low rank":
            engine.save_checkpoint(home / "low_rank")
            with LogCapture() as said:
                again = engine_of("AdamW", training=training)
                again.load_checkpoint(home / "low_rank")
                train(again, 6, 8)
            found["said"] = said.lines
        torch.save(kept, home / f"exchange-{name}-{dist.get_rank()}.pt")
        found[name] = {"losses": losses, "alike": alike(weights(engine.model))}
    return found


def pays(home: Path) -> dict[str, Any]:
    """Compression that is measured: as it is here, then as it is said; checkpoints keep what was found."""
    optimizer = {"compression": "auto"}
    engine = engine_of("OneBitLamb", optimizer=optimizer)
    train(engine, 0, 5)
    made: Any = engine._trainer.loop.progress.optimizer
    found: dict[str, Any] = {"measured": asdict(made.verdict), "frozen": made.frozen, "errors": len(made._errors)}
    for kind in KINDS:
        for seconds in (2.0, 1.0):
            path = home / f"pays-{kind}-{seconds}"
            with mock.patch("ops.optimizers.pays.measure", lambda _, full=seconds: Verdict(full, 1.5, 2)):
                engine = engine_of(kind, optimizer=optimizer)
                train(engine, 0, 7)
                engine.save_checkpoint(path)
                losses = [report.loss for report in train(engine, 7, STEPS)]
                engine._trainer.meet()
            again = engine_of(kind, optimizer=optimizer)
            with mock.patch("ops.optimizers.pays.measure", side_effect=AssertionError("it was measured")):
                again.load_checkpoint(path)
                its = [report.loss for report in train(again, 7, STEPS)]
                again._trainer.meet()
            found[f"{kind} {seconds}"] = {
                "frozen": again._trainer.loop.progress.optimizer.frozen,  # type: ignore[attr-defined]
                "same": its == losses and torch.equal(weights(again.model), weights(engine.model)),
            }
    return found


class LogCapture(logging.Handler):
    """What training says."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> LogCapture:
        logging.getLogger("slipstream.training").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("slipstream.training").removeHandler(self)


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": steps, "warm_up": warm_up, "features": features, "overflows": overflows, "faults": faults,
    "others": others, "exchanges": exchanges, "pays": pays, "save": save,
}  # fmt: skip


def main(home: Path, *cases: str) -> None:
    """Cases, or all of them; what each rank found is in a file of JSON."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    for case in cases:
        of = case.removesuffix("-resume")
        names = list(CASES) if case == "all" else [case]
        found = resume(home, int(of)) if of != case else {name: CASES[name](home) for name in names}
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, found)
        if dist.get_rank() == 0:
            (home / f"{case}-{dist.get_world_size()}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    dist.destroy_process_group()
