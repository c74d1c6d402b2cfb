"""Engines with compressed optimizers on one, two and three processes: what is exchanged, skipped, saved and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from config_schema import ConfigError
from engine import Engine
from engine.errors import EngineError
from engine.training.loop import Loop, NoNumber
from engine.training.optimizer import build_optimizer
from ops.compression import Errors, GradientCollective, SimulatedCollective, SingleProcess, for_other_size
from tests.conftest import PYTHONPATH
from tests.engine.training import compressed_ranks
from tests.engine.training.compressed_ranks import CLIP, IN_FULL, KINDS, ROWS, STEPS, batch, engine_of, weights
from tests.engine.training.test_workers import (
    document,
    has_steps,
    is_gone,
    lines,
    prepared,
    start,
    wait_for,
    worker_pids,
)
from tests.engine.training.trained import Stack


def torchrun(case: str, home: Path, processes: int, *more: str) -> list[Any]:
    """What each process found in a case; ``more`` are run after it."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        compressed_ranks.__file__, str(home), case, *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[Any] = json.loads((home / f"{case}-{processes}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compressed")


@pytest.fixture(scope="module")
def found(home: Path) -> list[Any]:
    """What two processes found."""
    return torchrun("all", home, 2)


def plain_loop(kind: str, collective: GradientCollective, model: Stack) -> Tensor:
    """The weights after all steps of a plain loop on one rank."""
    options = {**KINDS[kind], "lr": 0.02, "max_grad_norm": CLIP, "collective": collective}
    optimizer = build_optimizer(model, kind, options)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x in batch(step, collective.rank)["x"].split(ROWS):
            (model(x).square().mean() / 2).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_a_plain_loop(kind: str, home: Path, found: list[Any]) -> None:
    """To the last bit: each rank's own gradients of its own rows, one clipping over all of them."""
    ranks, models, wanted = SimulatedCollective(2, timeout=60).ranks, (Stack(), Stack()), {}

    def run(rank: int) -> None:
        wanted[rank] = plain_loop(kind, ranks[rank], models[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(2):
        assert torch.equal(torch.load(home / f"{kind}-{rank}.pt"), wanted[rank])
    said = [each["steps"][kind] for each in found]
    assert said[0] == said[1], "norms are of all processes"
    assert max(said[0]["norms"]) > CLIP, "something was clipped"
    assert any(said[0]["apart"]) == (kind == "ZeroOneAdam")
    assert not said[0]["apart"][-1], "behind an exchange they are the same to the last bit"


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kind", IN_FULL)
def test_the_warm_up_is_training_in_full(kind: str, drop: bool, found: list[Any]) -> None:
    """Beside DistributedDataParallel with AdamW, and the average of replicas where layers are dropped."""
    losses, norms, layers = found[0]["warm_up"][f"{kind} {drop}"]
    full = found[0]["warm_up"][f"{IN_FULL[kind]} {drop}"]
    assert losses == pytest.approx(full[0], rel=1e-4)
    assert norms == pytest.approx(full[1], rel=1e-4)
    assert layers == full[2]
    assert (sum(layers) < 3 * STEPS) == drop


@pytest.mark.parametrize("kind", IN_FULL)
def test_layers_dropped_computed_again_and_frozen(kind: str, found: list[Any]) -> None:
    """A layer that is left out has no gradient in either process, and its momentum moves on."""
    plain, again = (found[0]["features"][f"{kind} {which}"] for which in (False, True))
    assert plain["alike"]
    assert again == plain
    assert min(plain["layers"]) < 2
    assert all(torch.tensor(plain["losses"]).isfinite())


def test_an_overflow_in_one_process_is_one_in_all(found: list[Any]) -> None:
    said = [each["overflows"] for each in found]
    assert said[0] == said[1]
    assert said[0]["skipped"] == [step in (1, 5) for step in range(8)]
    assert said[0]["scales"] == [256.0, *[128.0] * 4, *[64.0] * 3]
    assert said[0]["alike"]
    assert said[0]["steps"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_is_no_number_stops_all(kind: str, found: list[Any]) -> None:
    said = [each["faults"][kind] for each in found]
    assert said[0] == said[1]
    assert [line[:63] for line in said[0]["said"]] == [
        f"NoNumber: step {step}: the norm of the gradients is no number, in on" for step in (2, 6)
    ]
    assert said[0]["alike"]


def test_models_that_differ_are_told_with_the_rank(found: list[Any]) -> None:
    said = [each["others"] for each in found]
    assert said[0] == said[1]
    for kind in ("OneBitAdam", "AdamW"):
        for name, what in (
            ("shape", "out.weight is [2, 6] float32, trained, and [1, 6] float32, trained there"),
            ("names", "it has more.weight as well"),
            ("frozen", "out.bias is [1] float32, not trained, and [1] float32, trained there"),
            ("dtype", "out.weight is [1, 6] bfloat16, trained, and [1, 6] float32, trained there"),
        ):
            assert said[0][f"{kind} {name}"].startswith(f"the model of rank 1 is not that of rank 0: {what}; build")
    losses = [float(Stack()(batch(0, rank)["x"]).detach().square().mean()) for rank in range(2)]
    assert float(said[0]["loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5), "the weights of the first process"


# ---- other exchanges of gradients ----


def test_gradients_travel_in_bf16(home: Path, found: list[Any]) -> None:
    """The first step's are the sum of both processes' halves, each rounded."""
    weight, bias = torch.load(home / "exchange-bf16-1.pt")[0]
    halves = []
    for rank in range(2):
        model = Stack()
        for x in batch(0, rank)["x"].split(ROWS):
            (model(x).square().mean() / 2).backward()
        inner = model.blocks[1].inner
        halves.append([parameter.grad.bfloat16() / 2 for parameter in (inner.weight, inner.bias)])
    for mine, one, other in zip((weight, bias), *halves, strict=True):
        assert torch.equal(mine, (one + other).float())
    said = found[0]["exchanges"]
    assert said["bf16"]["alike"]
    assert said["bf16"]["losses"] != said["full"]["losses"]
    assert said["bf16"]["losses"] == pytest.approx(said["full"]["losses"], rel=1e-2)
    assert said["again"] == said["full"], "a run leaves nothing behind"


def test_gradients_travel_by_low_rank(home: Path, found: list[Any]) -> None:
    """From its start on: the mean gradient's part along one direction. Biases travel in full."""
    full, low = (torch.load(home / f"exchange-{name}-0.pt") for name in ("full", "low rank"))
    for step in range(3):
        assert torch.equal(full[step][0], low[step][0])
    (whole, bias), (part, its_bias) = full[3], low[3]  # on the same weights: what is missed comes after this step
    assert torch.equal(bias, its_bias)
    assert torch.linalg.matrix_rank(whole, rtol=1e-4) > 1
    assert torch.linalg.matrix_rank(part, rtol=1e-4) == 1
    direction = torch.linalg.svd(part)[0][:, :1]
    torch.testing.assert_close(part, direction @ direction.T @ whole, rtol=1e-4, atol=1e-6)
    for each in found:
        assert each["exchanges"]["low rank"]["alike"]
        assert each["exchanges"]["said"] == [
            "PowerSGD begins anew at step 6: gradients travel in full for 3 steps, and what low rank has missed so far "
            "is not made up for"
        ]


def test_one_process_exchanges_nothing() -> None:
    for how in ("bf16", "PowerSGD"):
        with pytest.raises(EngineError, match=r"\$.training.gradient_exchange: one process exchanges nothing: leave"):
            engine_of("AdamW", training={"gradient_exchange": how}).train_batch(batch(0, 0))


# ---- compression where it pays ----


def test_compression_is_measured_on_real_ranks(found: list[Any]) -> None:
    """Whatever this machine's loopback is like: both ranks found the same times, and did what these say."""
    said = [each["pays"] for each in found]
    assert said[0] == said[1]
    measured = said[0]["measured"]
    assert measured["size"] == 2
    assert min(measured["full"], measured["compressed"]) > 0
    assert said[0]["frozen"] == (measured["compressed"] < measured["full"]) == bool(said[0]["errors"])


@pytest.mark.parametrize("seconds", [2.0, 1.0], ids=["pays", "does not"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_measures_nothing(kind: str, seconds: float, found: list[Any]) -> None:
    """And is the run that never stopped, to the last bit."""
    for each in found:
        assert each["pays"][f"{kind} {seconds}"] == {"frozen": seconds == 2.0, "same": True}


# ---- checkpoints ----


@pytest.fixture(scope="module")
def resumed(home: Path, found: list[Any]) -> dict[str, list[Any]]:
    """Runs that go on from checkpoints of two processes, and of one, on other numbers."""
    return {
        "2-2": torchrun("2-resume", home, 2),
        "2-3": torchrun("2-resume", home, 3),
        "2-1": torchrun("2-resume", home, 1, "save"),
        "1-2": torchrun("1-resume", home, 2),
    }


def errors_in(home: Path, kind: str, name: str, ranks: int) -> list[dict[str, Errors]]:
    """Those that each rank has written."""
    read = [torch.load(home / f"errors-{kind}-{name}-{rank}.pt") for rank in range(ranks)]
    return [{index: Errors(**one) for index, one in each.items()} for each in read]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_run_that_never_stopped(kind: str, home: Path, resumed: dict[str, list[Any]]) -> None:
    for rank, (saved, read) in enumerate(
        zip(errors_in(home, kind, "2", 2), errors_in(home, kind, "2-2", 2), strict=True)
    ):
        assert len(saved) == 2
        assert list(read) == list(saved)
        for index, errors in saved.items():
            assert errors.worker.any()
            assert torch.equal(errors.worker, read[index].worker)
            assert torch.equal(errors.server, read[index].server)
        whole, mine = (torch.load(home / f"end-{kind}-{name}-{rank}.pt") for name in ("2", "2-2"))
        assert torch.equal(mine, whole)
    assert resumed["2-2"][0][kind]["alike"]
    assert resumed["2-2"][0][kind]["warned"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_more_processes_share_what_was_owed(kind: str, home: Path, resumed: dict[str, list[Any]]) -> None:
    saved, read = errors_in(home, kind, "2", 2), errors_in(home, kind, "2-3", 3)
    for index in saved[0]:
        for rank in range(3):
            with pytest.warns(UserWarning, match="errors of 2 ranks go on with 3"):
                wanted = for_other_size([each[index] for each in saved], rank, 3)
            assert torch.equal(read[rank][index].worker, wanted.worker)
            assert torch.equal(read[rank][index].server, wanted.server)
    said = resumed["2-3"][0][kind]
    assert said["warned"] == ["errors of 2 ranks go on with 3: every rank takes their mean, steps differ slightly"]
    assert said["alike"]
    assert all(torch.tensor(said["losses"]).isfinite())


@pytest.mark.parametrize("kind", KINDS)
def test_to_one_process_and_from_one(kind: str, home: Path, resumed: dict[str, list[Any]]) -> None:
    """One process owes nothing; the steps are those of its own rows, and of all rows."""
    assert errors_in(home, kind, "2-1", 1) == [{}]
    assert errors_in(home, kind, "1-2", 2) == [{}, {}]
    assert resumed["2-1"][0][kind]["warned"] == resumed["1-2"][0][kind]["warned"] == []
    assert resumed["1-2"][0][kind]["alike"]
    end = torch.load(home / f"end-{kind}-1-0.pt")
    assert torch.equal(end, plain_loop(kind, SingleProcess(), Stack())), "one process trains as it is"
    first = sum(float(Stack()(batch(0, rank)["x"]).detach().square().mean()) for rank in range(2)) / 2
    assert resumed["1-2"][0][kind]["losses"][0] != first


def test_a_killed_run_is_the_run_that_never_stopped(tmp_path: Path) -> None:
    """kill -9 in the midst of 0/1 Adam's steps alone, then the same command: all losses and figures are the same."""
    prepared(tmp_path)
    given = document(tmp_path, max_steps=40, checkpoint_every=3, evaluate_every=4)
    given["optimizer"] = {"type": "ZeroOneAdam", "lr": 0.01, **KINDS["ZeroOneAdam"]}
    (tmp_path / "train.json").write_text(json.dumps(given), encoding="utf-8")
    run = start(tmp_path, "-m", "engine", "run", "train.json")
    wait_for(partial(has_steps, tmp_path / "run" / "metrics.jsonl", 10), 180)
    (worker,) = worker_pids(run.pid)
    os.kill(run.pid, signal.SIGKILL)
    run.communicate(timeout=60)
    wait_for(partial(is_gone, worker), 10)
    last = start(tmp_path, "-m", "engine", "run", "train.json")
    whole = start(tmp_path, "-m", "engine", "run", "train.json", "--set", f"training.output={tmp_path / 'whole'}")
    for each in (last, whole):
        _, err = each.communicate(timeout=200)
        assert each.returncode == 0, err
    found, wanted = (
        {(line["step"], "loss" in line): line for line in lines(tmp_path / name)} for name in ("run", "whole")
    )
    assert len(wanted) == 40 + 10
    assert found == wanted


# ---- one process, and what is refused ----


def test_one_process() -> None:
    """Nothing is compressed; a gradient that is no number stops it, and an overflow in fp16 skips the step."""
    engine = engine_of("OneBitAdam", training={"clip_norm": None})
    assert engine.train_batch(batch(0, 0)).grad_norm is None
    engine.model.blocks[0].inner.weight.register_hook(lambda grad: grad * torch.nan)
    before = weights(engine.model)
    with pytest.raises(NoNumber, match="step 2: the norm of the gradients is no number"):
        engine.train_batch(batch(1, 0))
    assert torch.equal(before, weights(engine.model))
    engine = engine_of("OneBitAdam", precision="fp16", training={"loss_scale": {"initial": 2.0**60}})
    assert engine.train_batch(batch(0, 0)).skipped
    assert "OneBitAdam" in engine.explain()


def test_weights_that_a_script_changes_count(tmp_path: Path) -> None:
    """Between two exchanges of 0/1 Adam: the workers forget what they have gone alone."""
    prepared(tmp_path)
    given = document(tmp_path, "plain", max_steps=20)
    given["optimizer"] = {"type": "ZeroOneAdam", "lr": 0.01, **KINDS["ZeroOneAdam"]}
    engine = Engine(given)
    ids = torch.randint(5, 40, (8, 10), generator=torch.Generator().manual_seed(0))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    for _ in range(9):
        engine.train_batch(rows)
    optimizer = engine._trainer.loop.progress.optimizer
    assert not optimizer.together  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.fill_(0.01)
    figures = engine.evaluate()
    assert optimizer.together  # type: ignore[attr-defined]
    for parameter in engine.model.parameters():
        assert parameter.detach().unique().tolist() == pytest.approx([0.01]), "no way back leads elsewhere"
    assert engine.evaluate() == figures


def test_what_excludes_each_other_is_told() -> None:
    with pytest.raises(ConfigError, match=r'data_parallel: "shard" and "OneBitAdam" exclude each other: set this to'):
        engine_of("OneBitAdam", training={"data_parallel": "shard"})
    model = Stack()
    with pytest.raises(EngineError, match="own gradients: give OneBitLamb a max_grad_norm"):
        Loop(model, build_optimizer(model, "OneBitLamb"), lambda model, batch: batch, clip_norm=1.0)
