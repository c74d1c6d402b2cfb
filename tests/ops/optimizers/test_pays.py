"""Compression that is measured first: what is timed, who decides, what stays of it. Speeds are faked by a clock that an
exchange advances, each rank's its own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ops.compression import Errors, GradientCollective, Pending, SingleProcess
from ops.optimizers import OneBitAdam, OptimizerError, ZeroOneAdam
from ops.optimizers.compressed import CompressedOptimizer
from ops.optimizers.pays import MeasuredOptimizer, Verdict, measure
from tests.ops.optimizers.test_compressed import KINDS, together

#: Nothing that is exchanged beside gradients has as many elements.
FEW = 8
SHAPES = ((6, 5), (9,), (4, 3))
#: Seconds of a full mean and of a compressed one.
Speed = tuple[float, float]
FAST, SLOW = (10.0, 1.0), (1.0, 10.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """``clock.now`` of a thread, which is a rank."""
    found = threading.local()
    monkeypatch.setattr("ops.optimizers.pays.time", SimpleNamespace(perf_counter=lambda: getattr(found, "now", 0.0)))
    return found


class Timed:
    """A collective that takes as long as it is told: ``full`` and ``compressed`` are seconds of each call, the last
    one's for all that follow. Keeps what it was given, as (elements, dtype)."""

    def __init__(self, inner: GradientCollective, clock: threading.local, full: Any, compressed: Any) -> None:
        self._inner, self._clock, self.rank, self.size, self.sent = inner, clock, inner.rank, inner.size, inner.sent
        self._seconds = {"full": self._list(full), "compressed": self._list(compressed)}
        self.given: dict[str, list[tuple[int, torch.dtype]]] = {"full": [], "compressed": []}

    @staticmethod
    def _list(seconds: Any) -> list[float]:
        return list(seconds) if isinstance(seconds, Sequence) else [seconds]

    def _takes(self, kind: str, elements: int, dtype: torch.dtype) -> None:
        seconds = self._seconds[kind]
        self._clock.now = getattr(self._clock, "now", 0.0) + (seconds.pop(0) if len(seconds) > 1 else seconds[0])
        self.given[kind].append((elements, dtype))

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """Small ones take no time."""
        count = sum(tensor.numel() for tensor in tensors)
        if count > FEW and tensors[0].dtype != torch.float64:
            self._takes("full", count, tensors[0].dtype)
        return self._inner.mean(tensors)

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """As the inner one."""
        self._takes("compressed", buffer.numel(), buffer.dtype)
        return self._inner.compressed_mean(buffer, errors, parts)


def begun(collective: Any, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> CompressedOptimizer:
    """An optimizer that is to compress from its third step on, if it pays."""
    late = {"var_freeze_step": 2, "var_update_scaler": 2} if kind == "zero_one" else {"freeze_step": 2}
    weights = [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel()).view(s).to(dtype)) for s in SHAPES]
    return KINDS[kind](weights, collective=collective, **{"lr": 0.01, "compression": "auto", **late, **options})


def weights_of(optimizer: CompressedOptimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]  # type: ignore[no-any-return]


def go_on(optimizer: CompressedOptimizer, first: int, last: int) -> list[Tensor]:
    """The weights after some steps, with gradients of each rank's own."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + optimizer.collective.rank)
        for weight in weights_of(optimizer):
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights_of(optimizer)]


def same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("speed", [FAST, SLOW], ids=["pays", "does not"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_it_does_not_pay_the_warm_up_goes_on(
    kind: str, speed: Speed, clock: threading.local, caplog: pytest.LogCaptureFixture
) -> None:
    """To the last bit what "always" does, or a warm-up without an end. Measured once, said once."""
    never = {"var_freeze_step": 99, "var_update_scaler": 99} if kind == "zero_one" else {"freeze_step": 99}
    wanted = {} if speed is FAST else never

    def run(one: GradientCollective) -> tuple[list[Tensor], Timed, CompressedOptimizer]:
        timed = Timed(one, clock, *speed)
        optimizer = begun(timed, kind)
        return go_on(optimizer, 0, 9), timed, optimizer

    caplog.set_level("INFO", logger="slipstream.optimizers")
    found = together(2, run)
    plain = together(2, lambda one: go_on(begun(one, kind, compression="always", **wanted), 0, 9))
    for (weights, timed, optimizer), other in zip(found, plain, strict=True):
        assert same(weights, other)
        assert optimizer.frozen == (speed is FAST)
        assert optimizer.verdict is not None
        assert optimizer.verdict == Verdict(*speed, 2)
        if speed is SLOW:
            assert len(timed.given["compressed"]) == 4, "a round to warm up, three that count"
            assert len(timed.given["full"]) == 4 + 9
    lines = [record.getMessage() for record in caplog.records if "by a full mean" in record.getMessage()]
    what = "signs are exchanged" if speed is FAST else "nothing is compressed, the warm-up goes on"
    seconds = [f"{each:.3g} s" for each in speed]
    said = (
        f"on 2 processes a step by a full mean of the gradients takes {seconds[0]}, "
        f"one by a compressed exchange {seconds[1]}: {what}"
    )
    assert lines == [f"{type(found[0][2]).__name__}: {said}"]


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_counts(kind: str, clock: threading.local, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kind of step takes on a part of the largest parameter is counted for all elements; the copy leaves nothing
    behind."""
    monkeypatch.setattr("ops.optimizers.pays.SAMPLE", 10)
    measuring = threading.local()

    def slow(name: str, seconds: float) -> None:
        plain = getattr(KINDS[kind], name)

        def run(self: CompressedOptimizer, *arguments: Any) -> None:
            if getattr(measuring, "on", False):
                clock.now = getattr(clock, "now", 0.0) + seconds
                batch = arguments[1] if name == "warm_up" else arguments[0].batch
                assert [len(weight) for weight in batch.params] == [10]
            plain(self, *arguments)

        monkeypatch.setattr(KINDS[kind], name, run)

    def watched(optimizer: MeasuredOptimizer) -> Verdict:
        measuring.on = True
        try:
            return measure(optimizer)
        finally:
            measuring.on = False

    slow("warm_up", 0.25)
    slow("finish", 4.0)
    monkeypatch.setattr("ops.optimizers.pays.measure", watched)
    share = sum(torch.Size(shape).numel() for shape in SHAPES) / 10

    def run(one: GradientCollective) -> tuple[Verdict | None, int]:
        optimizer = begun(Timed(one, clock, *FAST), kind)
        go_on(optimizer, 0, 4)
        return optimizer.verdict, len(optimizer.state)

    for verdict, states in together(2, run):
        assert verdict == Verdict(10.0 + 0.25 * share, 1.0 + 4.0 * share, 2)
        assert not verdict.pays
        assert states == len(SHAPES)


@pytest.mark.parametrize(
    ("speeds", "pays", "wanted"),
    [
        (((20.0, 1.0), (20.0, 21.0)), False, (20.0, 21.0)),
        (((9.0, 1.0), (1.0, 6.0)), True, (9.0, 6.0)),
        (((6.0, 6.0), (6.0, 1.0)), False, (6.0, 6.0)),
    ],
    ids=["one alone would", "one alone would not", "no faster"],
)
def test_all_decide_alike_by_the_slowest(
    speeds: tuple[Speed, Speed], pays: bool, wanted: Speed, clock: threading.local
) -> None:
    def run(one: GradientCollective) -> tuple[Verdict | None, bool, list[Tensor]]:
        optimizer = begun(Timed(one, clock, *speeds[one.rank]), "adam")
        weights = go_on(optimizer, 0, 6)
        return optimizer.verdict, optimizer.frozen, weights

    one, other = together(2, run)
    assert one[0] == other[0] == Verdict(*wanted, 2)
    assert one[1] is other[1] is pays
    assert same(one[2], other[2])


@pytest.mark.parametrize(
    ("full", "compressed", "pays"),
    [
        ([1.0, 1.0, 4.0], [99.0, 3.0], True),  # two steps, a round to warm up, three that count
        ([1.0] * 3 + [4.0, 99.0, 4.0], [5.0], False),
        ([1.0] * 3 + [4.0, 0.1, 4.0], [3.0], True),
    ],
    ids=["the first round does not count", "one slow", "one fast"],
)
def test_a_round_out_of_line_decides_nothing(
    full: list[float], compressed: list[float], pays: bool, clock: threading.local
) -> None:
    def run(one: GradientCollective) -> bool:
        optimizer = begun(Timed(one, clock, full, compressed), "lamb")
        go_on(optimizer, 0, 4)
        return optimizer.frozen

    assert together(2, run) == [pays, pays]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_measuring_touches_nothing(kind: str, dtype: torch.dtype, clock: threading.local) -> None:
    """Neither state nor gradients, one that is missing among them; and times what each exchange would send."""

    def run(one: GradientCollective) -> Timed:
        timed = Timed(one, clock, *SLOW)
        optimizer = begun(timed, kind, dtype)
        go_on(optimizer, 0, 1)
        weights_of(optimizer)[1].grad = None
        before = copy.deepcopy(optimizer.state_dict())
        grads = [None if weight.grad is None else weight.grad.clone() for weight in weights_of(optimizer)]
        weights = [weight.detach().clone() for weight in weights_of(optimizer)]
        timed.given = {"full": [], "compressed": []}
        assert not optimizer.compresses()
        after = optimizer.state_dict()
        assert after["compression"].pop("verdict") is not None
        del before["compression"]["verdict"]
        assert str(after) == str(before)
        for index, state in before["state"].items():
            assert all(torch.equal(value, after["state"][index][name]) for name, value in state.items())
        for weight, grad, old in zip(weights_of(optimizer), grads, weights, strict=True):
            assert (weight.grad is None) if grad is None else torch.equal(weight.grad, grad)  # type: ignore[arg-type]
            assert torch.equal(weight, old)
        assert not optimizer._errors
        return timed

    count = sum(torch.Size(shape).numel() for shape in SHAPES)
    for timed in together(2, run):
        assert timed.given["full"] == [(count, dtype)] * 4
        assert timed.given["compressed"] == [(count, torch.float32)] * 4


@pytest.mark.parametrize("speed", [FAST, SLOW], ids=["pays", "does not"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_is_state(kind: str, speed: Speed, clock: threading.local) -> None:
    """A run that goes on does what the one would have done that never stopped, on a network of the other kind too."""

    def run(one: GradientCollective) -> None:
        whole = begun(Timed(one, clock, *speed), kind)
        weights = go_on(whole, 0, 6)
        again = begun(Timed(one, clock, *reversed(speed)), kind)
        with torch.no_grad():
            for mine, weight in zip(weights_of(again), weights, strict=True):
                mine.copy_(weight)
        shared, own = whole.split_ranks(copy.deepcopy(whole.state_dict())) if whole.together else ({}, {})
        again.load_state_dict(copy.deepcopy(whole.state_dict()))
        assert again.verdict == whole.verdict is not None
        assert same(go_on(again, 6, 11), go_on(whole, 6, 11))
        assert again.verdict == whole.verdict
        assert not shared or (shared["compression"]["verdict"]["size"] == 2 and "verdict" not in own)

    together(2, run)


def test_other_processes_measure_again(clock: threading.local) -> None:
    """What two found says nothing of three; what is compressed already stays so."""

    def saved(one: GradientCollective, speed: Speed) -> Any:
        optimizer = begun(Timed(one, clock, *speed), "adam")
        go_on(optimizer, 0, 4)
        return copy.deepcopy(optimizer.state_dict())

    def resumed(one: GradientCollective, states: list[Any], speed: Speed) -> tuple[bool, Verdict | None]:
        optimizer = begun(Timed(one, clock, *speed), "adam")
        optimizer.load_state_dict(states[0])
        assert optimizer.verdict is None
        go_on(optimizer, 4, 6)
        return optimizer.frozen, optimizer.verdict

    slow = together(2, partial(saved, speed=SLOW))
    assert together(3, partial(resumed, states=slow, speed=FAST)) == [(True, Verdict(10.0, 1.0, 3))] * 3
    assert together(3, partial(resumed, states=slow, speed=SLOW)) == [(False, Verdict(1.0, 10.0, 3))] * 3
    fast = together(2, partial(saved, speed=FAST))
    assert together(3, partial(resumed, states=fast, speed=SLOW)) == [(True, None)] * 3


def test_a_state_without_a_verdict_is_measured(clock: threading.local) -> None:
    """As one is that was saved before there were any."""

    def run(one: GradientCollective) -> bool:
        optimizer = begun(Timed(one, clock, *FAST), "adam")
        go_on(optimizer, 0, 1)
        state = copy.deepcopy(optimizer.state_dict())
        del state["compression"]["verdict"]
        optimizer.load_state_dict(state)
        go_on(optimizer, 1, 4)
        return optimizer.frozen and optimizer.verdict is not None

    assert together(2, run) == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_has_nothing_to_compress(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="slipstream.optimizers")
    optimizer = begun(SingleProcess(), kind)
    never = {"var_freeze_step": 99, "var_update_scaler": 99} if kind == "zero_one" else {"freeze_step": 99}
    assert same(go_on(optimizer, 0, 9), go_on(begun(SingleProcess(), kind, **never), 0, 9))
    assert not optimizer.frozen
    assert optimizer.verdict == Verdict(0.0, 0.0, 1), "nothing was measured"
    said = "one process has nothing to compress: the warm-up goes on"
    assert [record.getMessage() for record in caplog.records] == [f"{type(optimizer).__name__}: {said}"]


def test_0_1_adam_leaves_its_intervals(clock: threading.local) -> None:
    """Where signs were exchanged by two and do not pay for three: from when it is asked on, all steps are in full."""

    def saved(one: GradientCollective) -> Any:
        optimizer = begun(Timed(one, clock, *FAST), "zero_one", var_freeze_step=7)
        go_on(optimizer, 0, 4)
        assert optimizer._interval == 2  # type: ignore[attr-defined]
        return copy.deepcopy(optimizer.state_dict())

    def resumed(one: GradientCollective, states: list[Any]) -> list[bool]:
        optimizer = begun(Timed(one, clock, *SLOW), "zero_one", var_freeze_step=7)
        assert isinstance(optimizer, ZeroOneAdam)
        optimizer.load_state_dict(states[0])
        found = []
        for step in range(4, 11):
            found.append(optimizer.averages())
            go_on(optimizer, step, step + 1)
        return found

    states = together(2, saved)
    assert together(3, partial(resumed, states=states)) == [[False, True] + [True] * 5] * 3


def test_0_1_adam_asks_again_among_others(clock: threading.local) -> None:
    """Long behind the step at which two had asked."""

    def saved(one: GradientCollective) -> Any:
        optimizer = begun(Timed(one, clock, *SLOW), "zero_one", var_freeze_step=99)
        go_on(optimizer, 0, 5)
        return copy.deepcopy(optimizer.state_dict())

    def resumed(one: GradientCollective, states: list[Any]) -> int:
        optimizer = begun(Timed(one, clock, *FAST), "zero_one", var_freeze_step=99)
        optimizer.load_state_dict(states[0])
        go_on(optimizer, 5, 6)
        return optimizer._interval  # type: ignore[attr-defined,no-any-return]

    assert together(3, partial(resumed, states=together(2, saved))) == [2] * 3


def test_a_variance_that_stands_is_asked_of(clock: threading.local) -> None:
    """With both "auto": nothing is measured before the variance stands, and then once."""

    def run(one: GradientCollective, speed: Speed) -> tuple[int | None, bool]:
        timed = Timed(one, clock, *speed)
        optimizer = begun(timed, "adam", freeze_step="auto", betas=(0.9, 0.98))
        first = None
        for step in range(400):
            go_on(optimizer, step, step + 1)
            if optimizer.verdict is not None and first is None:
                first = step
        assert speed is FAST or len(timed.given["compressed"]) == 4
        return first, optimizer.frozen

    for speed in (FAST, SLOW):
        (first, frozen), other = together(2, partial(run, speed=speed))
        assert (first, frozen) == other
        assert first is not None
        assert first > 50, "ten looks at a variance of fifty steps"
        assert frozen == (speed is FAST)


def test_gradients_that_differ_are_told_all_the_same(clock: threading.local) -> None:
    """At the step at which it is measured, which compares nothing itself: real processes would hang."""

    def run(one: GradientCollective, change: Callable[[list[nn.Parameter], int], None]) -> None:
        optimizer = begun(Timed(one, clock, *SLOW), "adam")
        more = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [more]})
        go_on(optimizer, 0, 2)
        change([*weights_of(optimizer), more], one.rank)
        optimizer.step()

    def gone(weights: list[nn.Parameter], rank: int) -> None:
        weights[rank].grad = None

    def come(weights: list[nn.Parameter], rank: int) -> None:
        weights[-1].grad = torch.ones(3) if rank else None

    for change in (gone, come):
        with pytest.raises(OptimizerError, match="processes have not the same gradients"):
            together(2, partial(run, change=change))


@pytest.mark.parametrize("kind", KINDS)
def test_another_word_is_refused(kind: str) -> None:
    with pytest.raises(OptimizerError, match="compression is 'never': use 'always' or 'auto'"):
        begun(None, kind, compression="never")
    with pytest.raises(OptimizerError, match="compression is True"):
        OneBitAdam([nn.Parameter(torch.ones(1))], compression=True)  # type: ignore[arg-type]
