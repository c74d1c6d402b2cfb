"""Profiling from end to end, and ``get_model_profile``."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import GPT2Config, GPT2LMHeadModel

from profiler import Judged, Profiler, ProfilerError, Workload, count, get_model_profile, profile
from profiler.ignored import without
from tests.profiler.reports import LIMITS

X = torch.randn(4, 16)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 4)))


def trainer(model, calls=None):
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        if calls is not None:
            calls.append(1)
        F.mse_loss(model(X), torch.zeros(4, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def nothing_is_left() -> bool:
    kinds = ("_global_forward_hooks", "_global_forward_pre_hooks")
    return not any(getattr(hooks, kind) for kind in kinds) and not _get_current_dispatch_mode_stack()


# ---- profile ----


def test_a_step_is_counted_timed_and_judged():
    model, calls = net(), []
    report = profile(trainer(model, calls), model, samples=4, warm_up=1, repeats=2, limits=LIMITS)
    assert len(calls) == 2 + 1 + 2 * 2
    assert report.name == "Sequential"
    assert report.workload == Workload("training", "fp32", samples=4)
    assert report.timing.steps == 2
    assert report.timing.warm_up == 2
    assert report.energy is None
    assert report.counting_seconds > 0
    assert 0 < report.timing.plain_seconds < report.timing_seconds
    assert report.machine["torch"] == torch.__version__
    judged = Judged(report)
    assert judged.model_flops == 2 * 4 * (2 * 16 * 32 + 3 * 32 * 4)  # the input needs no gradient
    assert set(judged.phases) == {"forward", "backward", "step"}
    for name in ("0", "2.1"):
        for phase in ("forward", "backward"):
            assert judged.own(name, phase).seconds > 0
            assert judged.own(name, phase).limit.seconds > 0
    assert judged.own("", "step").seconds > 0
    assert nothing_is_left()


def test_activations_of_a_forward_pass_with_gradients_are_those_of_its_graph():
    """Though nobody keeps its result. By hand: the two inner results and the output; ReLU keeps its output, not its
    input, and a product its input."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = profile(lambda: model(torch.ones(2, 8)), model, repeats=0)
    assert report.counts.root.total_activation_bytes == 4 * 2 * (16 + 4) + report.counts.root.activation_bytes
    assert report.counts.module("1").activation_bytes == 4 * 2 * 16


def test_nothing_that_is_computed_changes():
    plain, profiled = net(), net()
    torch.manual_seed(1)
    step = trainer(plain)
    for _ in range(2 + 1 + 2 * 2):
        step()
    torch.manual_seed(1)
    profile(trainer(profiled), profiled, warm_up=1, repeats=2, limits=None)
    for one, other in zip(plain.parameters(), profiled.parameters(), strict=True):
        assert torch.equal(one, other)


def test_counts_alone_run_the_step_once():
    model, calls = net(), []
    report = profile(trainer(model, calls), model, repeats=0)
    assert len(calls) == 1
    assert (report.timing, report.limits) == (None, None)


def test_any_code_without_a_model():
    report = profile(lambda: X @ X.T, repeats=1, limits=LIMITS)
    assert (report.name, report.workload.mode) == ("step", "call")
    assert Judged(report).own("").work.macs == 4 * 4 * 16


def test_precision_is_that_of_most_parameters():
    model = nn.Sequential(nn.Linear(16, 64).bfloat16(), nn.LayerNorm(4))
    assert profile(lambda: model[0](X.bfloat16()), model, repeats=1, limits=LIMITS).workload.precision == "bf16"
    assert profile(lambda: None, model, precision="fp32", repeats=1, limits=LIMITS).workload.precision == "fp32"


def test_integers_are_no_precision_and_tf32_is_where_torch_uses_it():
    model = nn.Linear(16, 4)
    model.table = nn.Parameter(torch.zeros(1000, dtype=torch.int8), requires_grad=False)
    loose = replace(LIMITS, flops={**LIMITS.flops, "tf32": 2e12}, sources={**LIMITS.sources, "tf32": "table"})
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            report = profile(lambda: model(X), model, repeats=1, limits=loose)
            found.append(report.workload.precision)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == ["fp32", "tf32"]


def test_a_precision_without_a_ceiling_is_not_judged_or_refused():
    model, calls = nn.Linear(16, 4).double(), []
    report = profile(lambda: model(X.double()), model, repeats=1, limits=LIMITS)
    assert report.limits is None
    assert report.notes == ("not judged: there is no ceiling for float64 of Test device",)
    with pytest.raises(ProfilerError, match="has no ceiling for fp8"):
        profile(lambda: calls.append(1), model, precision="fp8", limits=LIMITS)
    assert calls == []


def test_an_exception_leaves_nothing_behind():
    def broken():
        raise ValueError("no")

    model = net()
    with pytest.raises(ValueError, match="no"):
        profile(broken, model, limits=None)
    assert nothing_is_left()
    assert count(model, X)[1].total().flops == count(net(), X)[1].total().flops


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ProfilerError, match="repeats is -1"):
        Profiler(repeats=-1)


# ---- Profiler ----


def test_a_loop_is_profiled_as_it_goes():
    model = net()
    step = trainer(model)
    profiler = Profiler(model, warm_up=1, repeats=2)
    made = 0
    while not profiler.done:
        with pytest.raises(ProfilerError, match="more steps are needed for a profile"):
            profiler.report()
        with profiler.step():
            step()
        made += 1
    assert made == 2 + 1 + 2 * 2
    report = profiler.report(limits=LIMITS)
    with profiler.step():  # any further step has nothing around it
        assert nothing_is_left()
        step()
    assert profiler.report(limits=LIMITS) == report
    other = net()
    assert report.counts.total() == profile(trainer(other), other, repeats=0).counts.total()


def test_a_step_that_raises_is_made_again():
    model = net()
    profiler = Profiler(model, warm_up=0, repeats=1)
    for _ in range(2):
        with pytest.raises(RuntimeError), profiler.step():
            model(torch.randn(4, 3))
    while not profiler.done:
        with profiler.step():
            model(X)
    assert profiler.report(limits=None).counts.total() == count(net(), X)[1].total()


def test_what_the_optimizers_step_is_can_be_said():
    model = net()
    profiler = Profiler(model, warm_up=0, repeats=1)
    while not profiler.done:
        with profiler.step():
            model(X).sum().backward()
            with profiler.optimizer_step():
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    judged = Judged(profiler.report(limits=None))
    assert judged.own("", "step").work.flops > 0
    assert judged.own("", "step").seconds > 0
    with profiler.optimizer_step():
        assert nothing_is_left()


def test_counts_from_before_are_taken_over():
    model = net()
    counts = count(model, X)[1]
    profiler = Profiler(model, warm_up=0, repeats=1, counts=counts)
    made = 0
    while not profiler.done:
        with profiler.step():
            model(X)
        made += 1
    assert made == 3
    assert profiler.report(limits=None).counts is counts


# ---- get_model_profile ----


def test_the_signature_is_deepspeeds():
    assert list(inspect.signature(get_model_profile).parameters) == [
        *("model", "input_shape", "args", "kwargs", "print_profile", "detailed", "module_depth", "top_modules"),
        *("warm_up", "as_string", "output_file", "ignore_modules", "mode"),
    ]


def test_numbers_and_strings():
    model = nn.Linear(1000, 2000)
    exact = get_model_profile(model, (8, 1000), print_profile=False, as_string=False)
    assert exact == (2 * 8 * 1000 * 2000, 8 * 1000 * 2000, 2_002_000)
    assert get_model_profile(model, (8, 1000), print_profile=False) == ("32.0 M", "16.0 MMACs", "2.00 M")


def test_the_same_by_shape_by_args_and_by_kwargs():
    model = net()
    found = {
        get_model_profile(model, print_profile=False, as_string=False, **given)
        for given in ({"input_shape": (4, 16)}, {"args": [X]}, {"kwargs": {"input": X}})
    }
    assert len(found) == 1


def test_the_profile_is_printed_or_written(tmp_path, capsys, monkeypatch):
    # As an attribute of the package ``profile`` is the function.
    monkeypatch.setattr(importlib.import_module("profiler.profile"), "ceilings", lambda device: LIMITS)
    get_model_profile(net(), (4, 16), top_modules=2, module_depth=1)
    printed = capsys.readouterr().out
    assert printed.startswith("Profile of Sequential\n")
    assert "└─ 2: Sequential" in printed
    assert "1: Linear" not in printed
    get_model_profile(net(), (4, 16), output_file=str(tmp_path / "profile.txt"), detailed=False)
    assert capsys.readouterr().out == ""
    assert "└─ 1: Linear" in (tmp_path / "profile.txt").read_text()


def test_each_modules_mode_is_left_as_it_was():
    model = net()
    model.train()
    model[2].eval()
    before = {name: module.training for name, module in model.named_modules()}
    get_model_profile(model, (4, 16), print_profile=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError):
        get_model_profile(model, (4, 3), print_profile=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert nothing_is_left()


def test_generation():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    given = {
        "input_ids": torch.ones(1, 4, dtype=torch.long),
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "pad_token_id": 0,
    }
    flops, macs, parameters = get_model_profile(
        model, kwargs=given, print_profile=False, as_string=False, mode="generate"
    )
    rows, width, heads = 4 + 1 + 1, 16, 1 + 1 + 1  # a prefill of 4 tokens and two steps; logits of the last tokens
    products = 2 * rows * 12 * width**2 + heads * width * 50
    attention = 2 * 2 * width * (4 * 4 + 5 + 6)
    assert macs == products + attention
    assert flops > 2 * macs
    assert parameters == sum(parameter.numel() for parameter in model.parameters())


def test_ignored_modules_are_their_parents():
    model = net()
    report = profile(lambda: model(X), model, repeats=1, limits=LIMITS)
    found = without(report, model, [nn.Linear, nn.Sequential])
    assert [module.name for module in found.counts.root.walk()] == ["", "Sequential", "1", "2.0"]
    assert found.counts.total() == report.counts.total()
    assert found.counts.root.total_parameters == report.counts.root.total_parameters
    assert found.counts.module("Sequential").own_work().macs == report.counts.total().macs
    assert found.timing.busy_seconds == pytest.approx(report.timing.busy_seconds)
    one = Judged(found).own("Sequential").seconds
    assert one == pytest.approx(sum(Judged(report).own(name).seconds for name in ("Sequential", "0", "2", "2.1")))
    whole = get_model_profile(model, (4, 16), print_profile=False, as_string=False)
    assert whole == get_model_profile(model, (4, 16), print_profile=False, as_string=False, ignore_modules=[nn.Linear])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to call the model with: give input_shape, or args, or kwargs"),
        ({"input_shape": [4, 16]}, r"input_shape is \[4, 16\]: give a tuple"),
        ({"input_shape": ()}, r"input_shape is \(\): give a tuple"),
        ({"input_shape": (4, 16), "args": [X]}, "both input_shape and args"),
        ({"input_shape": (4, 16), "mode": "train"}, "mode is 'train': there are 'forward' and 'generate'"),
        ({"input_shape": (4, 16), "mode": "generate"}, "Sequential has no generate: give mode='forward'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ProfilerError, match=message):
        get_model_profile(net(), **arguments)
    with pytest.raises(ProfilerError, match=r"takes an nn\.Module, not int"):
        get_model_profile(3, (4, 16))
