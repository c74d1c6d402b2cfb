"""Learning rates against their closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from engine.errors import EngineError
from engine.training.schedules import build_schedule


def optimizer(*rates: float) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return torch.optim.SGD(groups, lr=1.0)


def rates(name: Any, steps: int, warmup: int, total: int | None) -> list[tuple[float, ...]]:
    """The rates of each step of two groups whose highest are 1 and 0.1."""
    one = optimizer(1.0, 0.1)
    schedule = build_schedule(name, one, warmup, total)
    found = []
    for _ in range(steps):
        found.append(tuple(float(group["lr"]) for group in one.param_groups))
        one.step()
        schedule.step()
    return found


def expected(name: str, step: int, warmup: int, total: int) -> float:
    if step < warmup:
        return step / warmup
    if name == "constant":
        return 1.0
    share = min((step - warmup) / (total - warmup), 1.0)
    return 1.0 - share if name == "linear" else 0.5 * (1 + math.cos(math.pi * share))


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_closed_forms(name: str, warmup: int) -> None:
    for step, (high, low) in enumerate(rates(name, 14, warmup, 12)):
        wanted = expected(name, step, warmup, 12)
        assert high == pytest.approx(wanted, abs=1e-12)
        assert low == pytest.approx(0.1 * wanted, abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3])
def test_one_cycle(warmup: int) -> None:
    found = [high for high, _ in rates("one_cycle", 14, warmup, 10)]
    assert max(found) == pytest.approx(1.0)
    assert found.index(max(found)) == max(warmup - 1, 0)
    if warmup:
        one = optimizer(1.0)
        theirs = torch.optim.lr_scheduler.OneCycleLR(one, 1.0, total_steps=10, pct_start=warmup / 10)
        for rate in found[:10]:
            assert rate == pytest.approx(one.param_groups[0]["lr"])
            one.step()
            if theirs.last_epoch < 9:
                theirs.step()
    assert found[9] == pytest.approx(1 / 25 / 1e4)
    assert found[9:] == [found[9]] * 5, "past its end it stays there"


def test_resumed_in_the_middle() -> None:
    whole = rates("cosine", 12, 3, 10)
    one = optimizer(1.0, 0.1)
    schedule = build_schedule("cosine", one, 3, 10)
    for _ in range(5):
        one.step()
        schedule.step()
    other = optimizer(1.0, 0.1)
    resumed = build_schedule("cosine", other, 3, 10)
    other.load_state_dict(one.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    for step in range(5, 12):
        assert tuple(float(group["lr"]) for group in other.param_groups) == whole[step]
        other.step()
        resumed.step()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("linear", 0, None), "needs total_steps"),
        (("linear", -1, 5), "warmup_steps is -1"),
        (("cosine", 6, 5), "the warm-up must fit in"),
        (("cosine", 0, 0), "the warm-up must fit in"),
        (("square", 0, 5), "no schedule 'square': there are constant, linear, cosine, one_cycle"),
    ],
)
def test_contradictions(given: tuple[Any, int, int | None], words: str) -> None:
    name, warmup, total = given
    with pytest.raises(EngineError, match=words):
        build_schedule(name, optimizer(1.0), warmup, total)
