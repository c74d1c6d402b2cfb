"""What LAMB keeps, saves and refuses."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from config_schema.errors import SlipstreamError
from ops.optimizers import LAMB, OptimizerError
from tests.ops.optimizers.test_lamb import FOREACH, parameters, set_gradients

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def run(optimizer: LAMB, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients([param for group in optimizer.param_groups for param in group["params"]], step)
        optimizer.step()


def everything(optimizer: LAMB) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [*params, *(optimizer.state[param][key] for param in params for key in sorted(optimizer.state[param]))]


def assert_same(one: LAMB, other: LAMB) -> None:
    for mine, theirs in zip(everything(one), everything(other), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@FOREACH
@DTYPES
def test_a_resumed_run_is_the_run_that_never_stopped(dtype, foreach) -> None:
    whole = LAMB(parameters(dtype=dtype), lr=0.01, weight_decay=0.1, foreach=foreach)
    run(whole, 0, 3)
    params = [nn.Parameter(param.detach().clone()) for param in whole.param_groups[0]["params"]]
    resumed = LAMB(params, foreach=foreach)
    resumed.load_state_dict(saved(whole.state_dict()))
    assert resumed.param_groups[0]["lr"] == 0.01
    assert_same(whole, resumed)
    run(whole, 3, 8)
    run(resumed, 3, 8)
    assert_same(whole, resumed)


def test_a_loaded_state_is_a_copy() -> None:
    first, second = LAMB(parameters()), LAMB(parameters())
    run(first, 0, 2)
    second.load_state_dict(first.state_dict())
    before = [tensor.clone() for tensor in everything(second)]
    run(first, 2, 4)
    assert all(torch.equal(old, new) for old, new in zip(before, everything(second), strict=True))


def test_hooks_of_the_user_still_run_around_a_load() -> None:
    first, second = LAMB(parameters(dtype=torch.bfloat16)), LAMB(parameters(dtype=torch.bfloat16))
    run(first, 0, 2)
    seen = []

    def double_the_steps(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {key: {**state, "step": state["step"] * 2} for key, state in state_dict["state"].items()}
        return {**state_dict, "state": states}

    second.register_load_state_dict_pre_hook(double_the_steps)
    second.register_load_state_dict_post_hook(
        lambda loaded: seen.append(loaded.state[loaded.param_groups[0]["params"][0]]["exp_avg"].dtype)
    )
    for _ in range(2):
        second.load_state_dict(first.state_dict())
    assert seen == [torch.float32] * 2
    assert len(second._optimizer_load_state_dict_pre_hooks) == len(second._optimizer_load_state_dict_post_hooks) == 1
    assert float(second.state[second.param_groups[0]["params"][0]]["step"]) == 4


def test_state_of_adamw_is_taken() -> None:
    theirs, ours = parameters(), parameters()
    adamw = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1)
    for step in range(3):
        set_gradients(theirs, step)
        adamw.step()
    optimizer = LAMB(ours, adapt=False)
    optimizer.load_state_dict(adamw.state_dict())
    with torch.no_grad():
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
    assert optimizer.param_groups[0]["max_coeff"] == 10.0
    set_gradients(ours, 3)
    set_gradients(theirs, 3)
    optimizer.step()
    adamw.step()
    assert all(torch.allclose(mine, other, atol=1e-6) for mine, other in zip(ours, theirs, strict=True))


def test_state_of_half_parameters_serves_full_ones_and_the_other_way_round() -> None:
    half, full = LAMB(parameters(dtype=torch.bfloat16)), LAMB(parameters())
    run(half, 0, 2)
    full.load_state_dict(half.state_dict())
    assert all(
        "master_weight" not in state and state["exp_avg"].dtype == torch.float32 for state in full.state.values()
    )
    run(full, 2, 3)
    half.load_state_dict(full.state_dict())
    run(half, 3, 4)
    assert all(state["master_weight"].dtype == torch.float32 for state in half.state.values())


def test_a_state_of_other_shapes_is_refused_and_changes_nothing() -> None:
    first, second = LAMB(parameters([(3, 2)])), LAMB(parameters([(2, 3)]))
    run(first, 0, 1)
    run(second, 0, 1)
    before = [tensor.clone() for tensor in everything(second)]
    with pytest.raises(OptimizerError, match=r"the saved exp_avg of 0\.0 is \(3, 2\), the parameter \(2, 3\)"):
        second.load_state_dict(first.state_dict())
    assert all(torch.equal(old, new) for old, new in zip(before, everything(second), strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_go_their_own_way(copied) -> None:
    optimizer = LAMB(parameters(dtype=torch.bfloat16), lr=0.01)
    run(optimizer, 0, 2)
    other = copied(optimizer)
    assert_same(optimizer, other)
    run(optimizer, 2, 4)
    assert not torch.equal(everything(optimizer)[0], everything(other)[0])
    run(other, 2, 4)
    assert_same(optimizer, other)


@FOREACH
def test_a_parameter_without_gradient_is_left_alone(foreach) -> None:
    params = parameters()
    optimizer = LAMB(params, weight_decay=0.1, foreach=foreach)
    run(optimizer, 0, 2)
    set_gradients(params, 2)
    params[1].grad = None
    before = [params[1].detach().clone(), *(value.clone() for value in optimizer.state[params[1]].values())]
    optimizer.step()
    after = [params[1].detach(), *optimizer.state[params[1]].values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert float(optimizer.state[params[0]]["step"]) == 3
    frozen = LAMB(parameters(), foreach=foreach)
    frozen.step()
    assert not frozen.state
    assert frozen.trust_ratios() == {}


def test_ratios_go_by_the_names_that_were_given() -> None:
    model = nn.Linear(3, 2)
    optimizer = LAMB(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["weight", "bias"]
    stays = optimizer.state[model.weight]["trust_ratio"]
    optimizer.step()
    assert optimizer.state[model.weight]["trust_ratio"] is stays
    assert float(stays) == optimizer.trust_ratios()["weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr is -0.001: use a number of 0 or more"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": "1e-3"}, "lr is '1e-3'"),
        ({"lr": torch.ones(2)}, "lr is a torch.float32 tensor of 2 elements"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1.0"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1.0: use a number from 0 up to, not including, 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\): use two numbers"),
        ({"betas": 0.9}, "betas are 0.9"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"min_coeff": 2.0, "max_coeff": 1.0}, "min_coeff is 2.0, above max_coeff 1.0"),
        ({"min_coeff": -1.0}, "min_coeff is -1.0"),
        ({"max_coeff": math.nan}, "max_coeff is nan"),
        ({"adapt": "no"}, "adapt is 'no': use True or False"),
        ({"bias_correction": 2}, "bias_correction is 2"),
        ({"maximize": None}, "maximize is None"),
        ({"foreach": "auto"}, "foreach is 'auto': use None or True or False"),
    ],
)
def test_bad_options_are_named(options, message) -> None:
    with pytest.raises(OptimizerError, match=f"^LAMB: {message}"):
        LAMB(parameters(), **options)
    optimizer = LAMB(parameters())
    group = {"params": parameters([(2,)]), **options}
    with pytest.raises(ValueError, match=r"\(group 1\)") as raised:
        optimizer.add_param_group(group)
    assert isinstance(raised.value, SlipstreamError)
    assert "\n" not in str(raised.value)
    assert len(optimizer.param_groups) == 1


def test_what_cannot_be_trained_is_refused_by_name() -> None:
    with pytest.raises(
        OptimizerError, match=r"LAMB: 0\.1 is torch.complex64: fp32, fp64, bf16 and fp16 can be trained"
    ):
        LAMB([*parameters([(2,)]), nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    embedding, linear = nn.Embedding(4, 3, sparse=True), nn.Linear(3, 1)
    named = [*linear.named_parameters(), ("table", embedding.weight)]
    optimizer = LAMB(named)
    linear(embedding(torch.tensor([1, 2]))).sum().backward()
    before = linear.weight.detach().clone()
    with pytest.raises(OptimizerError, match="the gradient of table is sparse: build its layer with sparse=False"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    assert not optimizer.state
