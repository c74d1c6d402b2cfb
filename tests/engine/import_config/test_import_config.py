"""DeepSpeed's configurations as slipstream's: files of its tutorials and of Hugging Face's documentation."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config_schema import ConfigError, load_config
from engine.import_config import MODEL, Fate, Imported, import_config
from engine.import_config.hjson import plain_json
from engine.import_config.keys import AUTO, AUTO_FLAGS, KEYS
from engine.import_config.sections import NEVER
from engine.training.schedules import build_schedule
from tests.engine.import_config.files import (
    BING_BERT,
    INFERENCE,
    LAYER_DROP,
    MOQ,
    ONE_BIT,
    ONE_CYCLE,
    TRAINER_ZERO3,
    Document,
)

EXPECTED: dict[str, tuple[Document, Document]] = {
    "trainer, ZeRO-3": (
        TRAINER_ZERO3,
        {
            "training": {
                "micro_batch_size": 8,
                "accumulation_steps": 1,
                "clip_norm": 1.0,
                "data_parallel": "shard",
                "log_every": 2000,
            },
            "optimizer": {
                "type": "AdamW",
                "lr": 5e-5,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.0,
                "decay_all": True,
            },
            "schedule": {"type": "linear", "warmup_steps": 0, "total_steps": "auto"},
        },
    ),
    "layer drop": (
        LAYER_DROP,
        {
            "precision": "fp16",
            "training": {
                "train_batch_size": 4096,
                "micro_batch_size": 16,
                "loss_scale": {"initial": 65536.0, "growth_interval": 1000},
                "clip_norm": 1.0,
                "log_every": 1000,
            },
            "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01, "decay_all": True},
            "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.001},
        },
    ),
    "bing_bert": (
        BING_BERT,
        {
            "precision": "fp16",
            "training": {
                "train_batch_size": 65536,
                "micro_batch_size": 64,
                "loss_scale": {"initial": 65536.0, "growth_interval": 1000},
                "clip_norm": 1.0,
                "log_every": 100,
            },
            "optimizer": {
                "type": "LAMB",
                "lr": 0.011,
                "weight_decay": 0.01,
                "decay_all": True,
                "bias_correction": False,
                "max_coeff": 0.3,
                "min_coeff": 0.01,
            },
        },
    ),
    "MoQ": (
        MOQ,
        {
            "precision": "fp16",
            "training": {"train_batch_size": 32, "loss_scale": {"initial": 65536.0, "growth_interval": 1000}},
            "optimizer": {"type": "AdamW", "lr": 2e-5, "weight_decay": 0.0},
            "quantize_training": {
                "enabled": True,
                "start_bits": 16,
                "target_bits": 8,
                "quantize_period": 400,
                "schedule_offset": 0,
                "quantize_groups": 8,
            },
        },
    ),
    "1-bit": (
        ONE_BIT,
        {
            "precision": "fp16",
            "training": {
                "train_batch_size": 65536,
                "micro_batch_size": 64,
                "loss_scale": {"initial": 65536.0, "growth_interval": 1000},
                "clip_norm": 1.0,
            },
            "optimizer": {
                "type": "OneBitLamb",
                "lr": 0.011,
                "weight_decay": 0.0,
                "bias_correction": False,
                "freeze_step": 1000,
                "max_coeff": 0.3,
                "min_coeff": 0.01,
                "coeff_beta": 0.9,
                "factor_max": 4.0,
                "factor_min": 0.5,
                "factor_threshold": 0.1,
            },
        },
    ),
    "1Cycle": (
        ONE_CYCLE,
        {
            "precision": "fp32",
            "training": {"train_batch_size": 16, "data_parallel": "replicate", "log_every": 2000},
            "optimizer": {
                "type": "AdamW",
                "lr": 0.001,
                "betas": [0.8, 0.999],
                "eps": 1e-8,
                "weight_decay": 3e-7,
                "decay_all": True,
            },
            "schedule": {"type": "one_cycle", "warmup_steps": 1000, "total_steps": 2000},
            "flops_profiler": {
                "enabled": True,
                "profile_step": 1,
                "module_depth": -1,
                "top_modules": 3,
                "detailed": True,
            },
        },
    ),
    "inference": (
        INFERENCE,
        {"precision": "fp16", "kernels": "auto", "inference": {"max_tokens": 2048}},
    ),
}


def leaves(document: Document, prefix: str = "") -> list[str]:
    """Every key of a document that is no section, by its dotted path."""
    found = []
    for name, value in document.items():
        key = f"{prefix}{name}"
        found += leaves(value, f"{key}.") if isinstance(value, dict) else [key]
    return found


def fates(imported: Imported) -> dict[str, Fate]:
    """What became of each key that has a row."""
    return {row.key: row.fate for row in imported.rows}


def reason_of(imported: Imported, key: str) -> str:
    """What the row of ``key`` says."""
    return next(row.reason for row in imported.rows if row.key == key)


@pytest.mark.parametrize("name", EXPECTED)
def test_files_of_tutorials_become_exactly_this(name: str) -> None:
    source, expected = EXPECTED[name]
    before = copy.deepcopy(source)
    found = import_config(source)
    assert found.document == {"model": {"path": MODEL}, **expected}
    assert source == before
    config = load_config(found.document)
    assert load_config(config.to_dict()) == config


@pytest.mark.parametrize("name", EXPECTED)
def test_no_key_is_passed_over(name: str) -> None:
    source = EXPECTED[name][0]
    told = set(fates(import_config(source)))
    for key in leaves(source):
        parts = key.split(".")
        assert any(".".join(parts[: end + 1]) in told for end in range(len(parts))), key


def test_features_to_come_are_said_to_be_missing() -> None:
    cycle, inference = fates(import_config(ONE_CYCLE)), fates(import_config(INFERENCE))
    assert (cycle["flops_profiler.top_modules"], cycle["wall_clock_breakdown"]) == (Fate.MAPPED, Fate.DROPPED)
    assert inference["tensor_parallel.tp_size"] is Fate.LATER
    assert fates(import_config({"dtype": "int8"}))["dtype"] is Fate.LATER
    new_spelling = {"weight_quantization": {"shared_parameters": {"enabled": True}, "different_groups": {"wq1": {}}}}
    found = import_config({"train_batch_size": 1, "compression_training": new_spelling})
    assert fates(found)["compression_training.weight_quantization"] is Fate.LATER


def test_what_is_off_is_told_as_off() -> None:
    off = {
        "train_batch_size": 8,
        "fp16": {"enabled": False, "loss_scale_window": 5},
        "bf16": {},
        "progressive_layer_drop": {"enabled": False, "theta": 0.3},
        "quantize_training": {"enabled": False},
        "flops_profiler": {"enabled": False},
        "activation_checkpointing": {"partition_activations": False},
        "gradient_clipping": 0,
        "memory_breakdown": False,
        "scheduler": None,
    }
    found = import_config(off)
    assert {key for key, fate in fates(found).items() if fate is Fate.OFF} == off.keys() - {"train_batch_size"}
    assert found.document == {
        "model": {"path": MODEL},
        "precision": "fp32",
        "training": {"train_batch_size": 8},
    }


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("quantize_training.quantize-algo", 'did you mean "quantize_algo"?'),
        ("zero_optimisation", 'did you mean "zero_optimization"?'),
        ("fp16.loss_scale_windows", 'did you mean "loss_scale_window"?'),
        ("optimizer.params.beta", 'did you mean "betas"?'),
        ("theta", 'did you mean "progressive_layer_drop.theta"?'),
        ("fp16.fp16", ""),
        ("pipe-parallel-size", ""),
        ("completely_else", ""),
    ],
)
def test_keys_that_deepspeed_does_not_have(key: str, meant: str) -> None:
    *sections, name = key.split(".")
    source: Document = {"train_batch_size": 1, "fp16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {}}}
    place = source
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = 1
    found = import_config(source)
    assert [row.key for row in found.rows if row.fate is Fate.UNKNOWN] == [key]
    assert reason_of(found, key) == meant


@pytest.mark.parametrize("fixed", [0, 128.0])
def test_loss_scale(fixed: float) -> None:
    fp16 = {"enabled": True, "loss_scale": fixed, "initial_scale_power": 12, "loss_scale_window": 500, "hysteresis": 2}
    found = import_config({"train_batch_size": 1, "fp16": {**fp16, "min_loss_scale": 1}})
    scale = load_config(found.document).training
    assert scale is not None
    assert scale.loss_scale is not None
    wanted = (fixed, NEVER) if fixed else (4096.0, 500)
    assert (scale.loss_scale.initial, scale.loss_scale.growth_interval) == wanted
    told = fates(found)
    assert told["fp16.loss_scale"] is (Fate.CHECK if fixed else Fate.MAPPED)
    assert told["fp16.hysteresis"] is told["fp16.min_loss_scale"] is (Fate.OFF if fixed else Fate.DROPPED)
    silent = import_config({"train_batch_size": 1, "fp16": {"enabled": True}})
    assert "2, DeepSpeed's default" in reason_of(silent, "fp16.hysteresis")


@pytest.mark.parametrize(
    ("sections", "precision"),
    [
        ({}, "fp32"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"bfloat16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, "bf16"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "fp16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "fp16"),
        ({"torch_autocast": {"enabled": True}}, "bf16"),
    ],
)
def test_precision(sections: Document, precision: str | None) -> None:
    assert import_config({"train_batch_size": 1, **sections}).document.get("precision") == precision


@pytest.mark.parametrize(("stage", "way"), [(0, "replicate"), (1, "auto"), (2, "auto"), (3, "shard")])
def test_zero(stage: int, way: str) -> None:
    found = import_config({"train_batch_size": 1, "zero_optimization": {"stage": stage}})
    assert found.document["training"]["data_parallel"] == way


def rates(document: Document, steps: int) -> list[float]:
    """The learning rates of an imported configuration, step by step."""
    config = load_config(document)
    assert config.schedule is not None
    assert config.optimizer is not None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    total = config.schedule.total_steps
    schedule = build_schedule(
        config.schedule.type, optimizer, config.schedule.warmup_steps, None if total == "auto" else total
    )
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_schedules_have_deepspeeds_rates(kind: str) -> None:
    """DeepSpeed's documented formulas: a line up to the scheduler's highest rate, then flat, a line or a cosine."""
    warm, total, top = 10, 50, 0.02
    params: Document = {"warmup_num_steps": warm, "warmup_type": "linear"}
    if kind != "WarmupLR":
        params["total_num_steps"] = total
    if kind != "WarmupCosineLR":
        params |= {"warmup_min_lr": 0, "warmup_max_lr": top}
    optimizer = {"type": "AdamW", "params": {"lr": top if kind == "WarmupCosineLR" else 0.5}}
    source = {"train_batch_size": 1, "optimizer": optimizer, "scheduler": {"type": kind, "params": params}}
    behind: dict[str, Callable[[float], float]] = {
        "WarmupLR": lambda share: 1.0,
        "WarmupDecayLR": lambda share: 1 - share,
        "WarmupCosineLR": lambda share: (1 + math.cos(math.pi * share)) / 2,
    }
    wanted = [top * (t / warm if t < warm else behind[kind]((t - warm) / (total - warm))) for t in range(total)]
    assert rates(import_config(source).document, total) == pytest.approx(wanted, abs=1e-12)


def test_the_schedulers_rate_goes_before_the_optimizers() -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 0.1}}
    decay = {"type": "WarmupDecayLR", "params": {"total_num_steps": 2000}}
    source = {"train_batch_size": 1, "optimizer": optimizer, "scheduler": decay}
    found = import_config(source)
    assert found.document["optimizer"]["lr"] == 0.001  # WarmupDecayLR's default
    assert "goes before the optimizer's 0.1" in reason_of(found, "scheduler.params.warmup_max_lr")
    assert "along a logarithm, its default" in reason_of(found, "scheduler.params.warmup_type")
    del source["optimizer"]
    assert import_config(source).document["optimizer"] == {"type": "AdamW", "lr": 0.001, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("section", "fate", "said"),
    [
        ({"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_step_size": 5}}}, Fate.DROPPED, "range test"),
        ({"scheduler": {"type": "WarmUpLR", "params": {}}}, Fate.DROPPED, 'did you mean "WarmupLR"?'),
        ({"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}}, Fate.DROPPED, "there is no Lion"),
    ],
)
def test_kinds_that_are_not_here(section: Document, fate: Fate, said: str) -> None:
    found = import_config({"train_batch_size": 1, **section})
    (name,) = section
    assert fates(found)[name] is fate
    assert said in reason_of(found, name)
    assert found.document.keys() == {"model", "precision", "training"}


def test_options_of_adam() -> None:
    params = {"amsgrad": True, "adam_w_mode": False, "torch_adam": True, "max_grad_norm": 0.5, "weight_decay": 0.1}
    found = import_config({"train_batch_size": 1, "optimizer": {"type": "adam", "params": params}})
    told = fates(found)
    assert {told[f"optimizer.params.{name}"] for name in ("amsgrad", "adam_w_mode", "torch_adam")} == {Fate.DROPPED}
    assert told["optimizer.params.weight_decay"] is Fate.CHECK
    assert found.document["training"]["clip_norm"] == 0.5


REFUSED: dict[str, tuple[object, str]] = {
    "text for a number": ({"train_batch_size": "8"}, '$.train_batch_size: got "8", wanted a whole number'),
    "a fraction": ({"steps_per_print": 1.5, "fp16": {}}, "$.steps_per_print: got 1.5, wanted a whole number"),
    "true for a section": ({"fp16": True}, "$.fp16: got true, wanted an object"),
    "no type": ({"optimizer": {"params": {}}}, "$.optimizer.type: missing, wanted the name of an optimizer"),
    "auto that nobody fills in": (
        {"fp16": {"enabled": True, "initial_scale_power": "auto"}},
        '$.fp16.initial_scale_power: got "auto", wanted a whole number',
    ),
    "both": (
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
        "$.fp16.enabled: bf16 is on too: switch one of them off",
    ),
    "a stage": ({"zero_optimization": {"stage": 4}}, "$.zero_optimization.stage: got 4, wanted 0, 1, 2 or 3"),
    "no end": (
        {"scheduler": {"type": "WarmupCosineLR", "params": {}}},
        "$.scheduler.params.total_num_steps: missing, wanted the number of steps at whose end WarmupCosineLR ends",
    ),
    "what slipstream refuses": (
        {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 3},
        "$.train_batch_size: as $.training.train_batch_size: 10 is no multiple of 3 (micro_batch_size): "
        "change one of them",
    ),
    "out of range": (
        {"train_batch_size": 1, "progressive_layer_drop": {"enabled": True, "theta": 1.5}},
        "$.progressive_layer_drop.theta: as $.progressive_layer_drop.theta: got 1.5, "
        "wanted a number above 0 and at most 1",
    ),
    "none of DeepSpeed's": ({"model": {"path": "m"}}, "$: is no configuration of DeepSpeed: it has none of its keys"),
    "no object": ([1], "$: wanted an object: {...}"),
    "a dtype": ({"dtype": "int4"}, '$.dtype: got "int4", wanted fp16, bf16 or fp32'),
    "a dtype of autocast": (
        {"torch_autocast": {"enabled": True, "dtype": "int4"}, "train_batch_size": 1},
        '$.torch_autocast.dtype: got "int4", wanted fp16, bf16 or fp32',
    ),
    "no number": (
        {"fp16": {"enabled": True, "initial_scale_power": 1024}},
        "$.fp16.initial_scale_power: got 1024, wanted at most 1023",
    ),
    "a switch that nobody fills in": (
        {"tensorboard": {"enabled": "auto"}, "train_batch_size": 1},
        '$.tensorboard.enabled: got "auto", wanted true or false',
    ),
    "one of a pair": (
        {"optimizer": {"type": "Adam", "params": {"betas": [0.9, 1.0]}}},
        "$.optimizer.params.betas[1]: as $.optimizer.betas[1]: got 1, wanted a number of at least 0 and below 1",
    ),
    "a warm-up beyond the end": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 9, "total_num_steps": 5}}},
        "$.scheduler.params.warmup_num_steps: as $.schedule.warmup_steps: 9 is more than $.schedule.total_steps, "
        "which is 5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_of_no_use_is_refused_with_its_place(name: str, tmp_path: Path) -> None:
    document, message = REFUSED[name]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ConfigError) as caught:
        import_config(str(path))
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("key", [key for key, known in KEYS.items() if known.reason])
def test_every_key_with_a_reason_gives_a_row(key: str) -> None:
    source: Document = {"train_batch_size": 1}
    *sections, name = key.split(".")
    place = source
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = "cpu" if name == "device" else True
    source.get("optimizer", {})["type"] = "Adam"
    if "scheduler" in source:
        source["scheduler"]["type"] = "WarmupLR"
    switched = {"fp16", "bf16", "amp", "torch_autocast", "progressive_layer_drop", "flops_profiler"}
    for section in (switched | {"quantize_training", "eigenvalue"}) & source.keys():
        source[section]["enabled"] = True
    if "eigenvalue" in key:  # in its own section, or in that of quantize_training
        source.setdefault("quantize_training", {"enabled": True}).get("eigenvalue", {})["enabled"] = True
    if sections and sections[-1] in ("activation_checkpointing", "offload_optimizer", "offload_param"):
        key = ".".join(sections)  # a section that has one row as a whole
        assert key in fates(import_config(source))
        return
    assert fates(import_config(source)).get(key) is KEYS[key].fate


def test_sections_lead_to_their_keys() -> None:
    for key in KEYS:
        above = key.rpartition(".")[0]
        assert not above or (above in KEYS and not KEYS[above].any_keys) or key == "amp.enabled", key
    assert AUTO.keys() | AUTO_FLAGS <= KEYS.keys()


def test_gradient_clipping_goes_before_the_optimizers_own() -> None:
    optimizer = {"type": "Adam", "params": {"max_grad_norm": 0.5}}
    found = import_config({"train_batch_size": 1, "gradient_clipping": 2.0, "optimizer": optimizer})
    assert found.document["training"]["clip_norm"] == 2.0
    assert fates(found)["optimizer.params.max_grad_norm"] is Fate.DROPPED


def test_a_silent_file_is_not_clipped_without_a_word() -> None:
    found = import_config({"train_batch_size": 1})
    assert "clip_norm" not in found.document["training"]
    assert "clips at 1.0" in reason_of(found, "gradient_clipping")


def test_layer_drop_has_deepspeeds_defaults() -> None:
    found = import_config({"train_batch_size": 1, "progressive_layer_drop": {"enabled": True, "theta": 0.7}})
    assert found.document["progressive_layer_drop"] == {"enabled": True, "theta": 0.7, "gamma": 0.001}


SMALL: dict[str, tuple[Document, str, object]] = {
    "print": ({"steps_per_print": 10}, "log_every", 10),
    "print as a float": ({"steps_per_print": 1e3}, "log_every", 1000),
    "print never": ({"steps_per_print": 1e10}, "log_every", None),
    "compile": ({"compile": {"enabled": True}}, "compile", True),
    "do not compile": ({"compile": {"deepcompile": False}}, "compile", None),
    "TensorBoard": ({"tensorboard": {"enabled": True, "job_name": "a"}}, "tensorboard", True),
    "old ZeRO": ({"zero_optimization": True}, "data_parallel", "auto"),
    "old ZeRO, off": ({"zero_optimization": False}, "data_parallel", None),
    "checkpointing": ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing", True),
    "checkpointing, off": ({"activation_checkpointing": {"profile": True}}, "activation_checkpointing", None),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_keys_of_training(name: str) -> None:
    source, key, value = SMALL[name]
    found = import_config({"train_batch_size": 1, **source})
    assert found.document["training"].get(key) == value
    assert source.keys() & {row.key.split(".")[0] for row in found.rows}


def test_what_does_not_belong_to_its_kind_is_told() -> None:
    params = {"warmup_min_lr": 0.5, "cycle_max_lr": 1.0, "warmup_num_steps": 5}
    found = import_config({"train_batch_size": 1, "scheduler": {"type": "WarmupLR", "params": params}})
    assert reason_of(found, "scheduler.params.warmup_min_lr") == "the rate rises from 0"
    assert reason_of(found, "scheduler.params.cycle_max_lr") == "does not belong to what is chosen beside it"


def test_compression_that_is_off_says_so_one_section_deeper() -> None:
    groups = {"different_groups": {"a": {"params": {"dense_ratio": 0.5}}}}
    methods = {name: {"shared_parameters": {"enabled": name == "row_pruning"}, **groups} for name in COMPRESSION}
    told = fates(import_config({"train_batch_size": 1, "compression_training": methods}))
    assert {name: told[f"compression_training.{name}"] for name in COMPRESSION} == {
        "weight_quantization": Fate.OFF,
        "row_pruning": Fate.DROPPED,
        "head_pruning": Fate.OFF,
    }


COMPRESSION = ("weight_quantization", "row_pruning", "head_pruning")


def test_zero_is_a_value() -> None:
    sizes = {"stage": 3, "reduce_bucket_size": 0, "overlap_comm": False, "sub_group_size": None}
    told = {row.key: (row.fate, row.value) for row in import_config({"zero_optimization": sizes}).rows}
    assert told["zero_optimization.reduce_bucket_size"] == (Fate.DROPPED, "0")
    assert told["zero_optimization.overlap_comm"] == (Fate.OFF, "false")
    assert told["zero_optimization.sub_group_size"] == (Fate.OFF, "null")


def test_a_name_with_a_dot_is_no_path() -> None:
    (row,) = (
        row
        for row in import_config({"train_batch_size": 1, "zero_optimization.stage": 3}).rows
        if row.fate is Fate.UNKNOWN
    )
    assert (str(row), row.target) == ("zero_optimization.stage = 3", "")


def test_what_trainer_fills_in_is_told_with_what_it_brings() -> None:
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    found = import_config({"train_batch_size": 1, "scheduler": {"type": "WarmupLR", "params": params}})
    assert "warmup_steps or warmup_ratio" in reason_of(found, "scheduler.params.warmup_num_steps")
    assert "along a logarithm" in reason_of(found, "scheduler.params.warmup_type"), "it is not 0 for ever"


def test_one_cycle_is_another_curve() -> None:
    found = import_config(ONE_CYCLE)
    assert fates(found)["scheduler.type"] is Fate.CHECK
    assert "near 0 from step 2000 on" in reason_of(found, "scheduler.type")
    assert fates(found)["scheduler.params.cycle_min_lr"] is Fate.DROPPED


@pytest.mark.parametrize(("params", "fate"), [({}, Fate.CHECK), ({"bias_correction": False}, Fate.MAPPED)])
def test_lambs_trust_ratio_differs_with_bias_correction(params: Document, fate: Fate) -> None:
    found = import_config({"train_batch_size": 1, "optimizer": {"type": "Lamb", "params": params}})
    assert fates(found)["optimizer.type"] is fate


def test_what_only_the_script_knew_is_to_be_filled_in() -> None:
    found = import_config({"train_batch_size": 1}, "m")
    assert [line.split(":")[0] for line in found.missing[:2]] == ["$.optimizer", "$.schedule"]
    assert [line.split(":")[0] for line in import_config(ONE_CYCLE, "m").missing[:1]] == [
        "$.training.max_steps or epochs"
    ]


def test_the_files_of_init_inference_are_the_models_directory() -> None:
    found = import_config({"dtype": "fp16", "checkpoint": {"type": "BLOOM", "checkpoints": ["a.pt"]}, "base_dir": ""})
    row = next(row for row in found.rows if row.key == "checkpoint")
    assert (row.fate, row.target) == (Fate.CHECK, "model.path")


def test_what_hjson_lets_pass(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    text = """{ // of the example
      "train_batch_size": 8, # all "processes
      "zero_optimization": {"stage": 2, "cpu_offload": false, },
      /* "optimizer": {,
         */
      "tensorboard": {"output_path": "http://a/#b,]", },
    }"""
    path.write_text(text, "utf-8")
    found = import_config(path)
    assert found.document["training"] == {"train_batch_size": 8, "data_parallel": "auto"}
    assert leaves({row.key: 0 for row in found.rows if row.key.startswith("tensorboard")}) == ["tensorboard"]
    assert plain_json(text).splitlines()[5] == '      "tensorboard": {"output_path": "http://a/#b,]"  } '
    assert len(plain_json(text)) == len(text), "places stay"


@pytest.mark.parametrize("text", ["/* " * 300_000, '"' + '\\"' * 400_000, "," * 800_000, "[" + ", " * 400_000])
def test_no_text_takes_long(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        import_config(path)
