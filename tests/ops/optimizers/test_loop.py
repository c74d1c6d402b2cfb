"""LAMB in other people's loops: groups, schedules, scalers, clipping, closures, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from ops.optimizers import LAMB
from tests.ops.optimizers.equations import PaperLamb
from tests.ops.optimizers.test_lamb import FOREACH, assert_near, double, parameters, set_gradients


def test_each_group_has_its_options() -> None:
    params = parameters([(6, 4), (6,), (5,)])
    optimizer = LAMB([{"params": params[:1]}, {"params": params[1:2], "lr": 0.3, "adapt": False}], 0.1, max_coeff=2.0)
    optimizer.add_param_group({"params": params[2:], "weight_decay": 0.5, "max_coeff": 0.1, "bias_correction": False})
    paper = [
        PaperLamb(double(params[0]), bounds=(0.01, 2.0)),
        PaperLamb(double(params[1]), bounds=(1.0, 1.0)),
        PaperLamb(double(params[2]), bounds=(0.01, 0.1), decay=0.5, corrected=False),
    ]
    for step in range(5):
        set_gradients(params, step)
        for reference, param, rate in zip(paper, params, (0.1, 0.3, 0.1), strict=True):
            reference.step(double(param.grad), rate)
        optimizer.step()
    for reference, param in zip(paper, params, strict=True):
        assert_near(param, reference.weight, 5)


SCHEDULES: dict[str, Any] = {
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 8),
    "one_cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@FOREACH
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_followed(name, tensor, foreach) -> None:
    """Also OneCycleLR's, which moves beta1 as well; a tensor is changed in place and may have dimensions."""
    params = parameters([(4, 3), (5,)])
    optimizer = LAMB(params, lr=torch.tensor([[0.1]], dtype=torch.float64) if tensor else 0.1, foreach=foreach)
    schedule = SCHEDULES[name](optimizer)
    paper, rates = [PaperLamb(double(param)) for param in params], []
    for step in range(8):
        set_gradients(params, step)
        group = optimizer.param_groups[0]
        rates.append(float(group["lr"]))
        for reference, param in zip(paper, params, strict=True):
            reference.betas = group["betas"]
            reference.step(double(param.grad), rates[-1])
        optimizer.step()
        schedule.step()
    assert len(set(rates)) > 3
    for reference, param in zip(paper, params, strict=True):
        assert_near(param, reference.weight, 8)


def test_the_scaler_skips_what_overflowed() -> None:
    model = nn.Linear(4, 2)
    optimizer = LAMB(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    reference = [PaperLamb(double(param)) for param in model.parameters()]
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        loss = (model(torch.ones(3, 4)) ** 2).mean() * factor
        scaler.scale(loss).backward()
        if factor != float("inf"):
            for paper, param in zip(reference, model.parameters(), strict=True):
                paper.step(double(param.grad) / scaler.get_scale(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**9
    for paper, param in zip(reference, model.parameters(), strict=True):
        assert_near(param, paper.weight, 2)
        assert float(optimizer.state[param]["step"]) == 2


def test_gradients_are_taken_as_clipped_and_stay_as_they_are() -> None:
    params = parameters()
    optimizer = LAMB(params, eps=0.1)
    paper = [PaperLamb(double(param), eps=0.1) for param in params]
    set_gradients(params, 0)
    nn.utils.clip_grad_norm_(params, 0.5)
    clipped = [param.grad.clone() for param in params]
    for reference, grad in zip(paper, clipped, strict=True):
        reference.step(double(grad), 1e-3)
    optimizer.step()
    for reference, param, grad in zip(paper, params, clipped, strict=True):
        assert_near(param, reference.weight, 1)
        assert torch.equal(param.grad, grad)


@FOREACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_not_written(maximize, dtype, foreach) -> None:
    params = parameters(dtype=dtype)
    set_gradients(params, 0)
    before = [param.grad.clone() for param in params]
    LAMB(params, weight_decay=0.1, maximize=maximize, foreach=foreach).step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, before, strict=True))


def test_a_closure_is_called_once_with_gradients_on() -> None:
    param = nn.Parameter(torch.tensor([2.0]))
    optimizer, calls = LAMB([param], lr=0.1), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) == 4.0
    assert calls == [True]
    assert param.item() == pytest.approx(2 - 0.1 * 2)


def test_hooks_of_a_step_run() -> None:
    params, seen = parameters(), []
    optimizer = LAMB(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@FOREACH
def test_a_compiled_step_does_the_same(foreach) -> None:
    plain, compiled = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    one, other = LAMB(plain, lr=0.1, foreach=foreach), LAMB(compiled, lr=0.1, foreach=foreach)
    step = torch.compile(lambda: other.step(), backend="eager")
    for number in range(4):
        set_gradients(plain, number)
        set_gradients(compiled, number)
        one.step()
        step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(plain, compiled, strict=True))
    assert one.trust_ratios() == other.trust_ratios()
