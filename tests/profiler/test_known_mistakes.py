"""Cases that a profiler which patches functions is known to get wrong (deepspeed 0.19.8): each is right here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import linear as imported_before
from transformers.pytorch_utils import Conv1D

from profiler import Counter, Report, Workload, count, get_model_profile, profile
from profiler.tables import text
from tests.profiler.reports import LIMITS

X = torch.randn(2, 8, 16)


def flops(function, *args, **kwargs):
    return count(function, *args, **kwargs)[1].total().flops


def test_attention_by_keywords():
    _, counts = count(F.scaled_dot_product_attention, query=X, key=X, value=X)
    assert counts.total().macs == 2 * 2 * 8 * 8 * 16


def test_an_exception_does_not_double_later_counts():
    layer = nn.Linear(16, 16)
    before = flops(layer, X)
    with pytest.raises(RuntimeError):
        count(layer, torch.randn(2, 3))
    assert flops(layer, X) == before == 2 * 16 * 16 * 16


def test_operators_written_as_signs():
    assert flops(lambda: X + X) == flops(lambda: X * X) == 256
    assert flops(lambda: X @ X[0].T) == 2 * 256 * 8


def test_rms_norm_and_cross_entropy():
    assert flops(nn.RMSNorm(16), X) > 3 * 256
    assert flops(F.cross_entropy, X[0], torch.zeros(8, dtype=torch.long)) > 5 * 128


def test_einsum_is_exact_and_allocates_nothing():
    a, b = torch.empty(128, 64, 4096, device="meta"), torch.empty(128, 4096, 2048, device="meta")
    for call in (
        lambda: torch.einsum("bik,bkj->bij", a, b),
        lambda: torch.einsum(a, [0, 1, 2], b, [0, 2, 3], [0, 1, 3]),
    ):
        total = count(call)[1].total()
        assert (total.flops, total.macs) == (2 * 128 * 64 * 4096 * 2048, 128 * 64 * 4096 * 2048)


def test_broadcast_products_and_vectors():
    assert flops(torch.matmul, torch.randn(8, 1, 4, 16), torch.randn(16, 5)) == 2 * 8 * 4 * 16 * 5
    assert flops(torch.matmul, torch.randn(64, 16), torch.randn(16)) == 2 * 64 * 16


def test_recurrent_layers_have_macs_and_biases():
    plain, biased = (count(nn.LSTM(16, 8, bias=bias), X)[1].total() for bias in (False, True))
    assert plain.macs == biased.macs == 16 * 4 * 8 * (16 + 8)
    assert biased.executed_flops - plain.executed_flops == 2 * 16 * 4 * 8


def test_causal_attention_is_no_full_square():
    _, counts = count(lambda: F.scaled_dot_product_attention(X[:, None], X[:, None], X[:, None], is_causal=True))
    total = counts.total()
    assert total.flops == 4 * 2 * 64 * 16
    assert total.executed_flops == 4 * 2 * 36 * 16


def test_functions_that_were_imported_before():
    assert flops(imported_before, X, torch.randn(4, 16)) == 2 * 16 * 16 * 4


def test_conv1d_of_transformers():
    counts = count(Conv1D(4, 16), X)[1]
    assert counts.module("Conv1D").total().macs == 16 * 16 * 4
    assert counts.root.total_parameters == 68


def test_a_model_on_its_own_has_parameters_and_stays_in_its_mode():
    model = nn.Sequential(nn.Linear(16, 4), nn.Dropout())
    _, counts = count(model, X)
    assert counts.root.total_parameters == 68
    assert model.training
    assert model[1].training


def test_the_deepest_modules_are_in_the_tree():
    model = nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(16, 4))))
    _, counts = count(model, X)
    assert [module.name for module in counts.root.walk()] == ["", "Sequential", "0", "0.0", "0.0.0"]
    assert counts.module("0.0.0").own_work() == counts.total()


def test_the_backward_pass_is_counted_rather_than_assumed():
    frozen = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    frozen[0].requires_grad_(False)
    with Counter(frozen) as counter:
        frozen(X).sum().backward()
    counts = counter.counts()
    assert counts.module("0").total("backward").macs == 0
    assert counts.module("1").total("backward").macs == counts.module("1").total("forward").macs


# ---- of what is reported ----


def profiled(model, *args, **kwargs) -> Report:
    return profile(lambda: model(*args, **kwargs), model, repeats=1, limits=LIMITS)


def test_the_deepest_depth_is_in_the_aggregated_table():
    printed = text(profiled(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(16, 4)))), X))
    section = printed.split("By depth")[1].split("\n\n")[0]
    assert re.search(r"^ +3  +68 Linear +1\.02 K Linear +\S+ \ws Linear$", section, re.MULTILINE)


def test_conv1d_of_transformers_has_numbers_in_the_tree():
    printed = text(profiled(nn.Sequential(Conv1D(4, 16)), X))
    assert re.search(r"^└─ 0: Conv1D +68 +1\.02 K +2\.05 K ", printed, re.MULTILINE)
    assert re.search(r"^└─ 0 +\S+ \ws +\S+% +\S+ \w? ", printed, re.MULTILINE)


def test_parameters_of_the_model_are_right_without_an_engine():
    report = profiled(nn.Linear(16, 4), X)
    assert "parameters   68 (272 B)\n" in text(report)
    sharded = replace(report, workload=Workload(world_size=2, tensor_parallel=2))
    assert "parameters   68 (272 B); of the model 136\n" in text(sharded)


def test_a_model_that_trains_goes_on_training():
    model = nn.Sequential(nn.Linear(16, 4), nn.Dropout())
    get_model_profile(model, (2, 16), print_profile=False)
    assert [module.training for module in model.modules()] == [True, True, True]


def test_integers_are_exact():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 3))
    found = get_model_profile(model, (7, 16), print_profile=False, as_string=False)
    assert found == (2 * 7 * (16 * 4 + 4 * 3), 7 * (16 * 4 + 4 * 3), 16 * 4 + 4 + 4 * 3 + 3)


def test_the_same_numbers_again_after_an_exception():
    model = nn.Linear(16, 4)
    before = get_model_profile(model, (7, 16), print_profile=False, as_string=False)
    with pytest.raises(RuntimeError):
        get_model_profile(model, (7, 15), print_profile=False)
    assert get_model_profile(model, (7, 16), print_profile=False, as_string=False) == before


def test_shared_weights_are_parameters_once():
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 9, bias=False), nn.Linear(16, 9, bias=False))
    for layer in (model[1], model[2]):
        layer.weight = model[0].weight
    found = get_model_profile(model[1], (2, 16), print_profile=False, as_string=False)
    assert found[2] == 9 * 16
    report = profile(lambda: model[2](model[0](torch.zeros(2, dtype=torch.long))), model, repeats=0)
    assert report.counts.root.total_parameters == 9 * 16


def test_backward_and_step_are_measured_rather_than_multiplied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters())

    def step():
        model(X).sum().backward()
        optimizer.step()

    printed = text(profile(step, model, repeats=1, limits=LIMITS))
    section = printed.split("By phase")[1].split("\n\n")[0]
    for phase in ("forward", "backward", "step"):
        assert re.search(rf"^{phase} .* \S+ \ws ", section, re.MULTILINE)
