"""Energy of a step: NVML's counter, or its power; nothing where it has neither."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from profiler.energy import energy
from tests.profiler.test_ceilings import FakeNvml

WATTS = 300


class Metered(FakeNvml):
    """Takes WATTS since it was made."""

    def __init__(self, **answers: int | None) -> None:
        super().__init__(**{"counter": 1, "power": 1, **answers})
        self.start = time.perf_counter()

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.answer("counter")
        return int(1e9 + WATTS * 1e3 * (time.perf_counter() - self.start))

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        self.answer("power")
        return WATTS * 1000


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Puts such an NVML in place, and a GPU that never makes one wait."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"uuid": "12-34"}))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def put(**answers: int | None) -> Metered:
        fake = Metered(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return put


@pytest.mark.parametrize(("answers", "source"), [({}, "counter"), ({"counter": None}, "power")])
def test_joules_are_watts_times_seconds(gpu, answers, source) -> None:
    fake, steps = gpu(**answers), []

    def step() -> None:
        start = time.perf_counter()
        time.sleep(0.01)
        steps.append(time.perf_counter() - start)

    found = energy(step, "cuda", seconds=0.2)
    assert found is not None
    assert found.source == source
    assert sum(steps) >= 0.19
    assert found.joules == pytest.approx(WATTS * sum(steps) / len(steps), rel=0.1)
    assert fake.open == 0
    assert fake.asked == "GPU-12-34"


def test_a_long_step_runs_once(gpu) -> None:
    gpu()
    steps: list[int] = []
    assert energy(lambda: (steps.append(1), time.sleep(0.05)), "cuda", seconds=0.02) is not None
    assert len(steps) == 1


@pytest.mark.parametrize("answers", [{"broken": 1}, {"counter": None, "power": None}])
def test_nothing_is_made_up(gpu, answers) -> None:
    fake = gpu(**answers)
    assert energy(lambda: pytest.fail("it ran"), "cuda") is None
    assert fake.open == 0


def test_a_cpu_and_a_machine_without_nvml_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy(lambda: pytest.fail("it ran"), "cpu") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy(lambda: pytest.fail("it ran"), "cuda") is None


@pytest.mark.parametrize("answers", [{}, {"counter": None}])
def test_a_step_that_raises_leaves_nothing_open(gpu, answers) -> None:
    import threading

    fake, before = gpu(**answers), threading.active_count()
    with pytest.raises(ZeroDivisionError):
        energy(lambda: 1 / 0, "cuda")
    assert fake.open == 0
    assert threading.active_count() == before
