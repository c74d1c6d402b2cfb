"""Rules across sections, and the configuration as a Python object."""

from __future__ import annotations

import json

import pydantic
import pytest

from config_schema import Config, load_config
from config_schema.generation import Generation
from config_schema.inference import Inference
from config_schema.job import EncodeJob, GenerateJob
from config_schema.model import Model
from config_schema.rules import RULES
from tests.config_schema.test_messages import problems_of, with_model

PROMPTS = {"type": "generate", "prompts": ["a"]}
NO_EFFECT = "has no effect because $.generation.do_sample is false; remove one of the two"

BROKEN: dict[str, tuple[dict[str, object], list[str]]] = {
    "job against task": (
        {"model": {"path": "m", "task": "embedding"}, "job": PROMPTS},
        ['$.job.type: "generate" needs $.model.task to be "causal_lm" or "auto", which is "embedding"'],
    ),
    "new tokens over the budget": (
        with_model(job=PROMPTS, generation={"max_new_tokens": 64}, inference={"max_tokens": 64}),
        [
            "$.generation.max_new_tokens: 64 new tokens and a prompt do not fit $.inference.max_tokens, which is 64; "
            "set that to more than 64, or lower this"
        ],
    ),
    "least over most": (
        with_model(generation={"min_new_tokens": 5, "max_new_tokens": 4}),
        ["$.generation.min_new_tokens: 5 is more than $.generation.max_new_tokens, which is 4"],
    ),
    "sampling at temperature 0": (
        with_model(generation={"do_sample": True, "temperature": 0.0}),
        [
            "$.generation.temperature: 0 is greedy, but $.generation.do_sample is true; "
            "raise it, or set $.generation.do_sample to false"
        ],
    ),
    "options of sampling without sampling": (
        with_model(generation={"do_sample": False, "temperature": 0.7, "top_k": 5, "top_p": 0.9}),
        [f"$.generation.{name}: {NO_EFFECT}" for name in ("temperature", "top_k", "top_p")],
    ),
    "options of sampling at temperature 0": (
        with_model(generation={"temperature": 0, "top_k": 5}),
        ["$.generation.top_k: has no effect because $.generation.temperature is 0 (greedy); remove one of the two"],
    ),
    "output over input": (
        with_model(job={"type": "encode", "texts_file": "a.txt", "output": "a.txt"}),
        ["$.job.output: would overwrite $.job.texts_file; give it another name"],
    ),
    "sections of training without it": (
        {
            "model": {"path": "m", "weights": "random"},
            "optimizer": {"type": "LAMB"},
            "schedule": {},
            "progressive_layer_drop": {"gamma": 0.1},
            "data": {},
        },
        [
            f"$.{name}: has no effect without $.training; add that section, or remove this"
            for name in ("model.weights", "optimizer", "schedule", "progressive_layer_drop", "data")
        ],
    ),
    "a job that lacks what it trains": (
        with_model(job={"type": "train"}),
        [
            '$.job.type: "train" needs the section $.training; add it',
            '$.job.type: "train" needs the section $.data; add it',
        ],
    ),
    "a run without files, place and end": (
        with_model(job={"type": "train"}, training={"micro_batch_size": 1}, data={}),
        [
            '$.data.train: missing: the job "train" needs files to train on',
            '$.training.output: missing: the job "train" writes metrics and checkpoints there',
            "$.training: has no end: give max_steps or epochs",
        ],
    ),
    "two ends": (
        with_model(training={"micro_batch_size": 1, "max_steps": 5, "epochs": 1.0}),
        ["$.training.epochs: contradicts $.training.max_steps, which is 5: give one"],
    ),
    "no batch size": (
        with_model(training={"accumulation_steps": 2}),
        ["$.training: has no batch size: give micro_batch_size or train_batch_size"],
    ),
    "batch sizes that contradict each other": (
        with_model(training={"train_batch_size": 10, "micro_batch_size": 2, "accumulation_steps": 2}),
        [
            "$.training.train_batch_size: 10 is no multiple of 2 (micro_batch_size) x 2 (accumulation_steps): "
            "change one of them"
        ],
    ),
    "batch sizes that contradict processes": (
        with_model(training={"train_batch_size": 10, "micro_batch_size": 5, "processes": 4}),
        ["$.training.train_batch_size: 10 is no multiple of 5 (micro_batch_size) x 4 (processes): change one of them"],
    ),
    "a loss scale outside of fp16": (
        with_model(training={"micro_batch_size": 1, "loss_scale": {}}, precision="bf16"),
        ['$.training.loss_scale: has no effect with $.precision "bf16": set that to "fp16", or remove this'],
    ),
    "two clocks": (
        with_model(training={"micro_batch_size": 1}, progressive_layer_drop={"gamma": 0.1, "total_steps": 9}),
        ["$.progressive_layer_drop.total_steps: contradicts gamma, which says how fast theta falls: give one"],
    ),
    "a warm-up that does not end": (
        with_model(training={"micro_batch_size": 1}, schedule={"type": "cosine", "warmup_steps": 9, "total_steps": 8}),
        ["$.schedule.warmup_steps: 9 is more than $.schedule.total_steps, which is 8"],
    ),
    "a warm-up longer than the training": (
        with_model(training={"micro_batch_size": 1, "max_steps": 8}, schedule={"type": "linear", "warmup_steps": 9}),
        ["$.schedule.warmup_steps: 9 is more than $.training.max_steps, which is 8"],
    ),
    "the end of what does not end": (
        with_model(training={"micro_batch_size": 1}, schedule={"total_steps": 8}),
        [
            '$.schedule.total_steps: has no effect with $.schedule.type "constant", which does not end: '
            "choose another, or remove this"
        ],
    ),
    "bounds of the trust ratio that cross": (
        with_model(training={"micro_batch_size": 1}, optimizer={"type": "LAMB", "max_coeff": 0.005}),
        [
            "$.optimizer.min_coeff: 0.01 is more than $.optimizer.max_coeff, which is 0.005: "
            "lower this, or set it to null"
        ],
    ),
    "bounds of 1-bit LAMB that cross": (
        with_model(
            training={"micro_batch_size": 1}, optimizer={"type": "OneBitLamb", "max_coeff": 0.005, "factor_min": 5.0}
        ),
        [
            "$.optimizer.min_coeff: 0.01 is more than $.optimizer.max_coeff, which is 0.005: lower this",
            "$.optimizer.factor_min: 5.0 is more than $.optimizer.factor_max, which is 4.0: lower this",
        ],
    ),
    "shards of what is exchanged whole, and two norms": (
        with_model(
            training={"micro_batch_size": 1, "data_parallel": "shard", "clip_norm": 1.0},
            optimizer={"type": "OneBitAdam", "max_grad_norm": 0.5},
        ),
        [
            '$.training.data_parallel: "shard" and "OneBitAdam" exclude each other: set this to "replicate", or choose '
            "AdamW or LAMB",
            "$.optimizer.max_grad_norm: 0.5 contradicts $.training.clip_norm, which is 1.0: give one of them",
        ],
    ),
    "an exchange that nothing goes through": (
        with_model(
            precision="fp16",
            training={
                "micro_batch_size": 1,
                "data_parallel": "shard",
                "gradient_exchange": "PowerSGD",
            },
            optimizer={"type": "LAMB"},
            progressive_layer_drop={},
        ),
        [
            f"$.training.gradient_exchange: {reason}"
            for reason in (
                "with $.progressive_layer_drop gradients travel in full: leave one of the two out",
                'with $.training.data_parallel "shard" gradients travel in full: make that "replicate"',
                'PowerSGD would carry overflows of "fp16" on: set $.precision to "bf16" or "fp32"',
            )
        ],
    ),
    "an exchange beside another one": (
        with_model(
            training={"micro_batch_size": 1, "gradient_exchange": "bf16", "power_sgd": {}},
            optimizer={"type": "OneBitAdam"},
        ),
        [
            '$.training.power_sgd: has no effect with $.training.gradient_exchange "bf16": set that to "PowerSGD", or '
            "remove this",
            '$.training.gradient_exchange: "OneBitAdam" exchanges momenta by itself: leave this out, or choose AdamW '
            "or LAMB",
        ],
    ),
    "data of another task": (
        {
            "model": {"path": "m", "task": "causal_lm"},
            "training": {"micro_batch_size": 1},
            "data": {"task": "regression"},
        },
        [
            '$.data.task: "regression" needs $.model.task to be "sequence_classification" or "auto", '
            'which is "causal_lm"'
        ],
    ),
    "evaluations of nothing": (
        with_model(training={"micro_batch_size": 1, "evaluate_every": 5}, data={"train": "a.txt"}),
        ["$.training.evaluate_every: has no effect without $.data.eval; name files, or remove this"],
    ),
    "a profile that comes too late": (
        with_model(
            training={"micro_batch_size": 1, "max_steps": 8}, flops_profiler={"enabled": True, "profile_step": 8}
        ),
        [
            "$.flops_profiler.profile_step: 8 is too late, training ends behind step 8 ($.training.max_steps): lower "
            "this below it"
        ],
    ),
    "a profile of nothing": (
        with_model(flops_profiler={"enabled": True}),
        [
            "$.flops_profiler.enabled: has no effect without $.training: `slipstream profile` and engine.profile() "
            "need no switch; remove it"
        ],
    ),
    "a profile without a file": (
        with_model(flops_profiler={"formats": ["table", "html", "html"]}),
        [
            "$.flops_profiler.formats: names a format twice; name each once",
            '$.flops_profiler.output_file: missing: the format "html" is a file; name it',
        ],
    ),
}

FINE: dict[str, dict[str, object]] = {
    "every job fits a task of auto": with_model(job=PROMPTS),
    "job fits its task": {"model": {"path": "m", "task": "causal_lm"}, "job": PROMPTS},
    "new tokens within the budget": with_model(generation={"max_new_tokens": 63}, inference={"max_tokens": 64}),
    "generation beside a job that does not generate": with_model(
        job={"type": "encode", "texts": ["a"]}, generation={"max_new_tokens": 64}, inference={"max_tokens": 64}
    ),
    "least equals most": with_model(generation={"min_new_tokens": 4, "max_new_tokens": 4}),
    "options that are off": with_model(generation={"do_sample": False, "temperature": 0, "top_k": 0, "top_p": 1}),
    "greedy": with_model(generation={"temperature": 0}),
    "sampling": with_model(generation={"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.5}),
    "options of sampling, the checkpoint decides": with_model(generation={"top_k": 5}),
    "a run": with_model(
        precision="fp16",
        training={"train_batch_size": 8, "micro_batch_size": 2, "epochs": 0.5, "output": "o", "loss_scale": {}},
        optimizer={"type": "AdamW", "lr": 1e-4},
        schedule={"type": "one_cycle", "warmup_steps": 8, "total_steps": 8},
        progressive_layer_drop={"theta": 1.0, "gamma": 0.1},
        data={"train": ["a.txt", "b*.txt"], "labels": ["x", "y"]},
        job={"type": "train"},
    ),
    "steps from Python": with_model(training={"micro_batch_size": 2}),
    "evaluation on what fit() is given": with_model(training={"micro_batch_size": 2, "evaluate_every": 5}),
    "a warm-up alone": with_model(
        training={"micro_batch_size": 2, "max_steps": 8}, schedule={"type": "constant", "warmup_steps": 9}
    ),
    "a trust ratio without a bound": with_model(
        training={"micro_batch_size": 2}, optimizer={"type": "LAMB", "max_coeff": 0.005, "min_coeff": None}
    ),
    "one norm under two names": with_model(
        training={"micro_batch_size": 2, "clip_norm": 0.5, "data_parallel": "replicate"},
        optimizer={"type": "OneBitLamb", "max_grad_norm": 0.5, "freeze_step": "auto"},
    ),
    "a norm of the optimizer's": with_model(
        training={"micro_batch_size": 2}, optimizer={"type": "ZeroOneAdam", "max_grad_norm": 0.5}
    ),
    "gradients in bf16": with_model(
        precision="fp16",
        training={"micro_batch_size": 2, "gradient_exchange": "bf16"},
        progressive_layer_drop={"enabled": False},
    ),
    "gradients by low rank": with_model(
        precision="bf16",
        training={"micro_batch_size": 2, "gradient_exchange": "PowerSGD", "power_sgd": {"start_step": 2}},
    ),
    "a profile of inference": with_model(flops_profiler={"module_depth": 2, "top_modules": 3}),
    "a profile in files": with_model(
        training={"micro_batch_size": 2, "max_steps": 8},
        flops_profiler={"enabled": True, "profile_step": 7, "output_file": "p.json", "formats": ["json", "html"]},
    ),
    "a late profile that is off": with_model(
        training={"micro_batch_size": 2, "max_steps": 8}, flops_profiler={"profile_step": 8}
    ),
    "output elsewhere": with_model(job={"type": "encode", "texts_file": "a.txt", "output": "b.jsonl"}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rule_finds(name: str) -> None:
    document, expected = BROKEN[name]
    assert problems_of(document) == expected


@pytest.mark.parametrize("name", FINE)
def test_rule_allows(name: str) -> None:
    assert isinstance(load_config(FINE[name]), Config)


def test_all_rules_run_at_once_and_beside_invalid_sections() -> None:
    document = {
        "model": {"path": "m", "task": "masked_lm"},
        "embedding": {"pooling": 1},
        "generation": {"min_new_tokens": 9, "max_new_tokens": 8, "do_sample": False, "top_k": 1},
        "inference": {"max_tokens": 8},
        "job": PROMPTS,
    }
    assert [line.split(":")[0] for line in problems_of(document)] == [
        "$.embedding.pooling",
        "$.job.type",
        "$.generation.max_new_tokens",
        "$.generation.min_new_tokens",
        "$.generation.top_k",
    ]


def test_rules_that_read_an_invalid_section_wait() -> None:
    document = with_model(generation={"max_new_tokens": 64}, inference={"max_tokens": 8, "page_size": 1})
    assert [line.split(":")[0] for line in problems_of(document)] == ["$.inference.page_size"]


def test_rules_read_fields_that_exist() -> None:
    assert all(rule.reads <= Config.model_fields.keys() for rule in RULES)


def test_defaults() -> None:
    config = load_config({"model": {"path": "m"}})
    assert config == Config(model=Model(path="m"))
    assert (config.device, config.precision, config.kernels, config.job) == ("auto", "auto", "auto", None)
    assert (config.inference.page_size, config.embedding.batch_size, config.generation.stop) == (16, 32, ())


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:17"])
def test_devices(device: str) -> None:
    assert load_config(with_model(device=device)).device == device


@pytest.mark.parametrize("device", ["cuda:", "cuda:01", "cuda:-1", "cuda:0 ", "CPU", "cuda:٣", "", "mps"])
def test_devices_that_do_not_exist(device: str) -> None:
    assert problems_of(with_model(device=device))[0].startswith("$.device: got ")


def test_whole_floats_are_integers() -> None:
    config = load_config(with_model(generation={"top_k": 40.0, "temperature": 1}, inference={"page_size": 32.0}))
    assert (config.generation.top_k, config.inference.page_size, config.generation.temperature) == (40, 32, 1.0)
    assert type(config.generation.top_k) is int
    assert type(config.generation.temperature) is float


def test_configurations_do_not_change() -> None:
    config = Config(model=Model(path="m"))
    with pytest.raises(pydantic.ValidationError):
        config.__setattr__("device", "cpu")
    assert hash(config) == hash(Config(model=Model(path="m")))


def test_python_objects_are_as_strict() -> None:
    with pytest.raises(pydantic.ValidationError):
        Generation(top_k="5")  # type: ignore[arg-type]
    with pytest.raises(pydantic.ValidationError):
        Generation(temperature=float("nan"))
    with pytest.raises(pydantic.ValidationError, match="give exactly one of"):
        EncodeJob(type="encode")
    with pytest.raises(pydantic.ValidationError, match="give exactly one of"):
        GenerateJob(type="generate", prompts=("a",), prompts_file="b")


def test_a_config_is_validated_as_a_whole() -> None:
    good = Config(model=Model(path="${x} $${y}"), job=GenerateJob(type="generate", prompts=("a",)))
    assert load_config(good) == good
    bad = good.model_copy(update={"precision": "fp8"})
    assert problems_of(bad) == ['$.precision: got "fp8", wanted one of "auto", "fp32", "bf16", "fp16", "int8", "int4"']
    contradiction = Config(
        model=Model(path="m"), generation=Generation(max_new_tokens=9), inference=Inference(max_tokens=9)
    )
    assert len(problems_of(contradiction)) == 1


def test_to_dict_is_plain_json_with_the_defaults() -> None:
    document = Config(model=Model(path="m")).to_dict()
    assert document["inference"] == {
        "max_tokens": "auto",
        "max_batch": "auto",
        "page_size": 16,
        "prefill_chunk": "auto",
    }
    assert "$schema" not in document
    assert json.loads(Config(model=Model(path="m")).to_json()) == document
    assert load_config(with_model(**{"$schema": "s.json"})).to_dict()["$schema"] == "s.json"
