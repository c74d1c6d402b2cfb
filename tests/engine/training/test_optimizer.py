"""Optimizers by name: their groups, and what they refuse."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import nn

from config_schema import load_config
from engine.errors import EngineError
from engine.training.optimizer import build_optimizer
from ops.optimizers import LAMB, OneBitAdam, OneBitLamb, ZeroOneAdam


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AdamW", torch.optim.AdamW),
        ("adamw", torch.optim.AdamW),
        ("LAMB", LAMB),
        ("OneBitAdam", OneBitAdam),
        ("onebitlamb", OneBitLamb),
        ("ZeroOneAdam", ZeroOneAdam),
    ],
)
def test_biases_and_norms_do_not_decay(name: str, kind: type) -> None:
    found = build_optimizer(model(), name, {"lr": 0.5, "weight_decay": 0.25})
    assert isinstance(found, kind)
    named = [(group["param_names"], group["weight_decay"], group["lr"]) for group in found.param_groups]
    assert named == [(["0.weight", "2.weight"], 0.25, 0.5), (["0.bias", "1.weight", "1.bias", "2.bias"], 0.0, 0.5)]
    (whole,) = build_optimizer(model(), name, {"weight_decay": 0.25}, decay_all=True).param_groups
    assert (len(whole["params"]), whole["weight_decay"]) == (6, 0.25)


def test_a_step_is_torchs() -> None:
    ours, twin = model(), model()
    optimizer = build_optimizer(ours, "AdamW", {"lr": 0.1, "weight_decay": 0.2})
    decayed = [p for p in twin.parameters() if p.ndim == 2]
    others = [p for p in twin.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], 0.1, weight_decay=0.2)
    x = torch.randn(5, 3)
    for one, steps in ((ours, optimizer), (twin, reference)):
        for _ in range(3):
            steps.zero_grad()
            one(x).square().mean().backward()
            steps.step()
    assert optimizer.param_groups[0]["fused"], "one kernel for the step"
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [LAMB, OneBitAdam, OneBitLamb, ZeroOneAdam])
def test_a_section_has_the_defaults_of_its_class(kind: type) -> None:
    document = {"model": {"path": "m"}, "training": {"micro_batch_size": 1}, "optimizer": {"type": kind.__name__}}
    section = load_config(document).optimizer
    assert section is not None
    given = section.model_dump(exclude={"type", "decay_all"})
    wanted = {name: p.default for name, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}
    assert given == {name: value for name, value in wanted.items() if name in given}
    assert set(wanted) - set(given) <= {"collective", "foreach", "maximize", "adapt"}


def test_frozen_and_shared_parameters() -> None:
    one = model()
    one[0].weight.requires_grad_(False)
    one.append(nn.Linear(4, 1))
    one[3].weight = one[2].weight
    names = [name for group in build_optimizer(one, "LAMB").param_groups for name in group["param_names"]]
    assert names == ["2.weight", "0.bias", "1.weight", "1.bias", "2.bias", "3.bias"]


def test_fused_only_where_nothing_else_is_asked_for() -> None:
    assert build_optimizer(model(), "AdamW", {"foreach": True}).param_groups[0]["fused"] is None
    meta = copy.deepcopy(model()).to("meta")
    assert not build_optimizer(meta, "AdamW").param_groups[0]["fused"]


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("Adagrad", {}, "no optimizer 'Adagrad': there are AdamW, LAMB, OneBitAdam, OneBitLamb, ZeroOneAdam"),
        ("AdamW", {"weight_decy": 0.1}, 'AdamW has no parameter "weight_decy", did you mean "weight_decay"?'),
        ("LAMB", {"warmth": 1}, 'LAMB has no parameter "warmth": it has lr, betas, eps, weight_decay'),
        ("AdamW", {"lr": -1.0}, "AdamW: Invalid learning rate: -1.0"),
        ("LAMB", {"betas": (0.9, 1.5)}, r"LAMB: betas\[1\] is 1.5: use a number from 0"),
    ],
)
def test_what_is_wrong_is_told(name: str, params: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        build_optimizer(model(), name, params)


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(EngineError, match="nothing to train: no parameter of the model requires a gradient"):
        build_optimizer(model().requires_grad_(False), "AdamW")
