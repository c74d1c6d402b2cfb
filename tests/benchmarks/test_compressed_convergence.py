"""Runs of compressed optimizers from end to end at a tiny size, and their tables from curves that are known."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import compressed_convergence as command
from benchmarks import convergence_compare, convergence_loop
from benchmarks.convergence_data import load, prepare
from benchmarks.convergence_ranks import ARMS, RanksRun, RanksTraining, zero_one
from benchmarks.masked_lm import Shape
from config_schema import SlipstreamError
from ops.compression import SimulatedCollective
from ops.optimizers import ZeroOneAdam
from tests.benchmarks import small
from tests.benchmarks.small import call, ticking, write_text

STEPS, RANKS, BATCH = 24, 4, 16
SIZES = ("--layers", "1", "--hidden", "16", "--heads", "2", "--length", "16", "--batch", str(BATCH), "--dropout", "0.1")
QUICK = (*SIZES, "--steps", str(STEPS), "--evaluations", "4", "--lr", "3e-3", "--device", "cpu", "--precision", "fp32")
#: Those that have a baseline.
COMPRESSED = [arm for arm in ARMS if ARMS[arm].baseline != arm]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared text."""
    directory = tmp_path_factory.mktemp("corpus")
    prepare(*write_text(directory), directory / "corpus.safetensors")
    return directory / "corpus.safetensors"


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Trains one arm, and gives what its file holds."""

    def train(arm: str, *arguments: str) -> dict[str, Any]:
        given = ["--arm", arm, "--data", corpus, "--out", tmp_path / "runs", *QUICK, *arguments]
        assert call(command.main, monkeypatch, *given) == 0
        (path,) = (tmp_path / "runs").glob(f"{arm}-*.json")
        found: dict[str, Any] = small.read(path)
        return found

    return train


def losses(found: dict[str, Any]) -> list[list[float]]:
    """Of the held-out text and of training."""
    return [[point["loss"], point["train_loss"]] for point in found["points"]]


def training(corpus: Path, arm: str, **options: Any) -> RanksTraining:
    """A tiny run, to be driven by hand."""
    text = load(corpus, 16)
    shape = Shape(1, 16, 2, 16, len(text.tokenizer), 0.1)
    given: dict[str, Any] = {"batch": BATCH, "shape": shape, "precision": "fp32", "freeze": 0.25, **options}
    return RanksTraining(RanksRun(arm, 3e-3, 1, STEPS, **given), text, torch.device("cpu"))


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_from_end_to_end(arm: str, run: Callable[..., Any]) -> None:
    found = run(arm, "--freeze", "0.25")
    points = found["points"]
    assert found["status"] == "done"
    assert [point["step"] for point in points] == [6, 12, 18, 24]
    assert [point["samples"] for point in points] == [96, 192, 288, 384]
    assert len({point["loss"] for point in points}) == 4
    assert all(0 < point["update"] < point["seconds"] for point in points)


def buckets(corpus: Path, arm: str) -> list[list[int]]:
    """Elements of the parameters with weight decay, and of those without."""
    parameters = list(training(corpus, arm).model.parameters())
    return [[one.numel() for one in parameters if (one.ndim >= 2) is decayed] for decayed in (True, False)]


def most_in_a_chunk(sizes: list[int]) -> int:
    """Parameters that the chunk of a rank meets, element by element; chunks are multiples of 8 elements."""
    of = [index for index, size in enumerate(sizes) for _ in range(size)]
    chunk = 8 * -(-len(of) // (8 * RANKS))
    return max(len(set(of[at : at + chunk])) for at in range(0, len(of), chunk))


@pytest.mark.parametrize("arm", ARMS)
def test_bytes_are_those_of_the_formulas(arm: str, run: Callable[..., Any], corpus: Path) -> None:
    """A ring sends 2 (W - 1) / W of fp32 gradients; signs are W - 1 parts of n / W, a bit each, there and back. Scales
    are 4 bytes each: of all parameters there, back as many as the chunk with the most has; 1-bit LAMB has one a bucket.
    Each step begins with 4 numbers of 8 bytes."""
    found = run(arm, "--freeze", "0.25")["points"][-1]
    groups = buckets(corpus, arm)
    full = 2 * (RANKS - 1) * 4 * sum(map(sum, groups)) // RANKS
    scales = [2 if arm == "onebit_lamb" else len(sizes) + most_in_a_chunk(sizes) for sizes in groups]
    bits = [2 * -(-sum(sizes) // (8 * RANKS)) for sizes in groups]
    signs = (RANKS - 1) * (sum(bits) + 4 * sum(scales))
    facts = STEPS * 2 * (RANKS - 1) * 32 // RANKS
    # 0/1 Adam: the last 16 steps are local, the first 8 of them with an exchange each, the others two by two.
    steps = {"onebit_adam": (6, 18), "onebit_lamb": (6, 18), "zero_one_adam": (8, 12)}
    averaged, exchanges = steps.get(arm, (STEPS, 0))
    assert found["sent_compressed"] == exchanges * signs
    assert found["sent"] == averaged * full + exchanges * signs + (facts if arm in COMPRESSED else 0)


def test_full_means_in_place_of_signs(run: Callable[..., Any], corpus: Path) -> None:
    """Of every step's gradients, then momenta."""
    found = run("onebit_adam", "--freeze", "0.25", "--exact")["points"][-1]
    full = 2 * (RANKS - 1) * 4 * sum(map(sum, buckets(corpus, "onebit_adam"))) // RANKS
    assert found["sent_compressed"] == 0
    assert found["sent"] == STEPS * (full + 2 * (RANKS - 1) * 32 // RANKS)


def test_0_1_adam_s_interval_is_a_choice(run: Callable[..., Any], corpus: Path) -> None:
    """Twice at every step, twice at every second, then at every fourth: 5 of the first 8 steps are full means."""
    found = run("zero_one_adam", "--freeze", "0.25", "--var-update-scaler", "2")["points"][-1]
    full = 2 * (RANKS - 1) * 4 * sum(map(sum, buckets(corpus, "zero_one_adam"))) // RANKS
    facts = STEPS * 2 * (RANKS - 1) * 32 // RANKS
    assert found["sent"] - found["sent_compressed"] == 5 * full + facts


@pytest.mark.parametrize("arm", COMPRESSED)
def test_all_is_alike_up_to_the_signs(arm: str, run: Callable[..., Any]) -> None:
    """Data, masks, dropout, clipping and rates: in the warm-up an arm is its baseline, but for rounding."""
    wanted = losses(run(ARMS[arm].baseline, "--clip", "0.1"))
    never = ("--freeze", "1") if arm != "zero_one_adam" else ("--freeze", "0.84")
    found = losses(run(arm, "--clip", "0.1", *never))
    whole = 3 if arm == "zero_one_adam" else 4  # whose variance is renewed at each of the first 16 steps
    assert whole == 4 or found[3] != pytest.approx(wanted[3], rel=2e-6)
    for mine, other in zip(found[: whole - 1], wanted, strict=False):
        assert mine == pytest.approx(other, rel=2e-6)


def test_each_rank_has_its_own_part_of_the_batch(corpus: Path) -> None:
    """And all have the same weights, also where signs are exchanged; a difference of one bit is told."""
    one = training(corpus, "onebit_adam", batch=BATCH)
    try:
        for _ in range(10):
            one.train_step()
        grads = [next(loop.progress.model.parameters()).grad for loop in one.loops]
        assert all(grad is not None and not torch.equal(grad, grads[0]) for grad in grads[1:])
        one.check_equal()
        assert one.optimizers[0].frozen
        weight = next(one.loops[2].progress.model.parameters())
        with torch.no_grad():
            weight.view(-1)[3] = torch.nextafter(weight.view(-1)[3], torch.tensor(9.0))
        with pytest.raises(SlipstreamError, match=r"step 10: .*word_embeddings.weight of rank 2 is not that of rank 0"):
            one.evaluate()
    finally:
        one.close()


@pytest.mark.parametrize("arm", COMPRESSED)
def test_signs_are_exchanged(arm: str, run: Callable[..., Any]) -> None:
    """Behind the warm-up it is no longer the baseline."""
    wanted = losses(run(ARMS[arm].baseline, "--lr", "0.03"))
    found = losses(run(arm, "--lr", "0.03", "--freeze", "0.25"))
    assert found[0] == pytest.approx(wanted[0], rel=2e-6)
    assert abs(found[-1][0] - wanted[-1][0]) > 1e-4


@pytest.mark.parametrize("arm", ["lamb", "onebit_lamb", "zero_one_adam"])
def test_a_run_that_is_cut_goes_on_as_if_it_was_not(
    arm: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of all ranks, and what was sent, are in the checkpoint; one is made between two exchanges of 0/1 Adam."""
    whole = run(arm, "--freeze", "0.25")
    for path in (tmp_path / "runs").glob("*.json"):
        path.unlink()
    statuses = []
    while not statuses or statuses[-1] != "done":
        monkeypatch.setattr(convergence_loop, "time", ticking())
        found = run(arm, "--freeze", "0.25", "--seconds", "9")  # of a clock that counts steps
        statuses.append(found["status"])
    assert statuses == ["cut", "cut", "done"]
    figures = ("step", "samples", "loss", "train_loss", "sent", "sent_compressed")
    assert [[p[key] for key in figures] for p in found["points"]] == [
        [p[key] for key in figures] for p in whole["points"]
    ]
    assert found["frozen_at"] == whole["frozen_at"] == {"lamb": None, "onebit_lamb": 6, "zero_one_adam": 8}[arm]


@pytest.mark.parametrize("steps", [4, 24, 37, 100, 299, 1000])
@pytest.mark.parametrize("freeze", [0.1, 0.25, 0.9])
def test_0_1_adam_ends_together(steps: int, freeze: float) -> None:
    """Whatever the length of a run."""
    weight = nn.Parameter(torch.ones(3))
    options = zero_one(RanksRun("zero_one_adam", 1e-3, 1, steps, freeze=freeze))
    optimizer = ZeroOneAdam([weight], collective=SimulatedCollective(1).ranks[0], **options)
    alone = 0
    for _ in range(steps):
        weight.grad = torch.ones(3)
        optimizer.step()
        alone += optimizer._alone > 0  # one rank is always together
    assert optimizer._alone == 0
    assert optimizer.frozen
    assert (alone > 0) is (steps >= 24 and freeze < 0.9) or freeze == 0.9


def test_a_gradient_that_is_no_number_is_written_down(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--arm", "onebit_adam", "--data", corpus, "--out", tmp_path, *QUICK, "--lr", "1e38", "--warmup", "0"]
    with pytest.raises(SystemExit, match="2"):
        call(command.main, monkeypatch, *given)
    (path,) = tmp_path.glob("*.json")
    found = small.read(path)
    assert found["status"] == "failed"
    assert found["error"] in capsys.readouterr().err
    assert "onebit_adam, batch 16, 24 steps, lr 1e+38, seed 1: failed" in convergence_compare.summary(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--arm", "lamb", "--batch", "18"), "--batch 18 is not a multiple of --ranks 4"),
        (("--arm", "lamb", "--precision", "fp16"), "--precision fp16"),
        (("--arm", "zero_one_adam", "--freeze", "auto"), "zero_one_adam needs a share of the steps"),
        (("--arm", "lamb", "--freeze", "2"), 'got "2", wanted a share'),
        (("--arm", "lamb", "--plot", "runs"), "give one of --prepare, --arm, --plot"),
        ((), "give one of --prepare, --arm, --plot"),
    ],
)
def test_what_cannot_be_is_told(
    arguments: tuple[str, ...],
    told: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(command.main, monkeypatch, "--data", corpus, *QUICK, *arguments)
    assert told in capsys.readouterr().err


def test_one_scale(run: Callable[..., Any], corpus: Path) -> None:
    """Fewer scales are sent, and the run is told from others."""
    found = run("onebit_adam", "--freeze", "0.25", "--one-scale")
    signs = sum(2 * (RANKS - 1) * (-(-n // (8 * RANKS)) + 4) for n in map(sum, buckets(corpus, "onebit_adam")))
    assert found["points"][-1]["sent_compressed"] == 18 * signs


def test_variants_stand_apart(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", 1, [6.0, 3.0])
    for one_scale, loss in ((False, 3.5), (True, 3.1)):
        write_run(tmp_path, "onebit_adam", 1, [6.0, loss], one_scale=one_scale)
    found = rows(convergence_compare.loss_table(convergence_compare.read(tmp_path)), 2)
    assert found["onebit_adam", "0.001"] == ["1/1", "3.5000", "-", "+0.5000", "?"]
    assert found["onebit_adam", "oTrue"] == ["0.001", "1/1", "3.1000", "-", "+0.1000", "?"]


def test_a_probe_of_compressed_steps(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beyond the end of a short schedule, so that few steps reach the signs."""
    given = [
        "--data",
        corpus,
        "--out",
        tmp_path / "runs",
        *QUICK,
        "--steps",
        "4",
        "--probe",
        "4",
        "--freeze",
        "0.5",
        "--one-scale",
    ]
    for arm in COMPRESSED:
        assert call(command.main, monkeypatch, "--arm", arm, *given) == 0
        assert ", update 0." in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_freezing_where_the_variance_is_stable(run: Callable[..., Any]) -> None:
    """Not within 1 / (1 - beta2) steps."""
    assert run("onebit_adam", "--freeze", "auto")["frozen_at"] is None


def write_run(directory: Path, arm: str, seed: int, ends: list[float], **others: Any) -> None:
    """A run of 400 steps in 4 evaluations, which sends 8 MB a step, 0.25 behind the first evaluation where it
    compresses."""
    given: dict[str, Any] = {"lr": 1e-3, "steps": 400, "batch": 256, "ranks": 4, "status": "done", **others}
    late = 8.0 if arm in ("lamb", "adamw") else 0.25
    points = [
        {
            "step": 100 * at,
            "samples": 25600 * at,
            "seconds": 10.0 * at,
            "loss": loss,
            "update": 0.02,
            "sent": 1e6 * (800 + late * 100 * (at - 1)),
        }
        for at, loss in enumerate(ends, 1)
    ]
    run = {name: given[name] for name in ("lr", "steps", "batch", "ranks", "one_scale") if name in given}
    document = {"run": {"arm": arm, "seed": seed, **run}, "status": given["status"], "device": "GPU; CPU"}
    name = "-".join(map(str, [arm, seed, *run.values()]))
    (directory / f"{name}.json").write_text(json.dumps({**document, "points": points}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """1-bit LAMB within the deviation of LAMB, 1-bit Adam not; AdamW fails at the large batch."""
    for seed, (lamb, signs, adam, other) in enumerate(
        [(3.0, 3.05, 3.1, 3.3), (3.1, 3.12, 3.12, 3.32), (3.2, 3.28, 3.14, 3.34)], 1
    ):
        write_run(tmp_path, "lamb", seed, [6.0, 5.0, 4.0, lamb])
        write_run(tmp_path, "onebit_lamb", seed, [6.0, 5.0, 4.1, signs])
        write_run(tmp_path, "adamw", seed, [6.0, 5.0, 4.0, adam])
        write_run(tmp_path, "onebit_adam", seed, [6.0, 5.0, 4.1, other])
    write_run(tmp_path, "zero_one_adam", 1, [6.0, 5.5], status="cut")
    write_run(tmp_path, "lamb", 1, [6.0, 5.0, 4.0, 3.5], batch=4096)
    write_run(tmp_path, "adamw", 1, [], batch=4096, status="failed")
    write_run(tmp_path, "onebit_lamb", 1, [6.0, 5.0, 4.0, 3.4], batch=4096)
    (tmp_path / "other.json").write_text('{"run": {"arm": "postln"}, "points": [1]}')
    return tmp_path


def rows(text: str, start: int) -> dict[tuple[str, ...], list[str]]:
    """A table's lines by their first words."""
    lines = [line.split() for line in text.splitlines()]
    return {tuple(line[:start]): line[start:] for line in lines if line}


def test_a_loss_is_within_the_deviation_or_not(runs: Path) -> None:
    text = convergence_compare.summary(runs)
    assert max(map(len, text.splitlines())) <= 80
    small_batch, large_batch = convergence_compare.cases(convergence_compare.read(runs)).values()
    found = rows(convergence_compare.loss_table(small_batch), 1)
    deviation = statistics.stdev([3.0, 3.1, 3.2])
    assert found["lamb",] == ["0.001", "3/3", "3.1000", f"{deviation:.4f}"]
    assert found["onebit_lamb",] == ["0.001", "3/3", "3.1500", "0.1179", "+0.0500", "yes"]
    assert found["onebit_adam",] == ["0.001", "3/3", "3.3200", "0.0200", "+0.2000", "no"]
    assert found["zero_one_adam",] == ["0.001", "0/1"]
    found = rows(convergence_compare.loss_table(large_batch), 1)
    assert found["onebit_lamb",] == ["0.001", "1/1", "3.4000", "-", "-0.1000", "?"]
    assert found["adamw",] == ["0.001", "0/1"]
    for line in ("adamw, batch 4096, 400 steps, lr 0.001, seed 1: failed", "zero_one_adam, batch 256, 400 steps"):
        assert line in text


def test_bytes_and_times(runs: Path) -> None:
    small_batch, large_batch = convergence_compare.cases(convergence_compare.read(runs)).values()
    found = rows(convergence_compare.cost_table(small_batch), 1)
    assert found["lamb",] == ["0.001", "3200.0", "100", "20"]
    assert found["onebit_lamb",] == ["0.001", "875.0", "3.66", "100", "20"]
    assert ("adamw",) not in rows(convergence_compare.cost_table(large_batch), 1)


def test_a_directory_without_runs(tmp_path: Path) -> None:
    with pytest.raises(SlipstreamError, match="holds no run of lamb"):
        convergence_compare.read(tmp_path)


def test_a_picture(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    assert call(command.main, monkeypatch, "--plot", runs, "--png", runs / "curves.png") == 0
    assert (runs / "curves.png").read_bytes()[:4] == b"\x89PNG"
