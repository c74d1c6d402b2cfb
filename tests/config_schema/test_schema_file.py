"""The checked-in JSON Schema: current, valid, complete, and of one opinion with pydantic."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from config_schema import (
    SCHEMA_PATH,
    Config,
    ConfigError,
    json_schema,
    load_config,
    schema_file,
    schema_problems,
    schema_text,
)
from config_schema.generate import main
from config_schema.reader import plain_document
from tests.config_schema.test_messages import GOLDEN

TEXTS = st.text(alphabet="ab ü/\\.\n\0", max_size=4)
COUNTS = st.integers(1, 2**31 - 1)
PATHS = st.text(alphabet="ab ü/\\.\n", min_size=1, max_size=4)


def section(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional)


def texts_or_file(items: st.SearchStrategy[Any]) -> list[dict[str, Any]]:
    return [{"texts": st.lists(items, min_size=1, max_size=3)}, {"texts_file": PATHS, "texts": st.none()}]


def job_strategies() -> st.SearchStrategy[Any]:
    output = {"output": st.none() | PATHS}
    message = section({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXTS}, {})
    prompt_sources: list[dict[str, Any]] = [
        {"prompts": st.lists(TEXTS, min_size=1, max_size=3)},
        {"messages": st.lists(message, min_size=1, max_size=3)},
        {"prompts_file": PATHS},
    ]
    kinds: list[tuple[str, list[dict[str, Any]], dict[str, Any]]] = [
        ("generate", prompt_sources, {"stream": st.booleans()}),
        ("encode", texts_or_file(TEXTS), {"similarity": st.booleans()}),
        ("classify", texts_or_file(TEXTS | st.lists(TEXTS, min_size=2, max_size=2)), {"top_k": COUNTS}),
        ("classify_tokens", texts_or_file(TEXTS), {}),
        ("answer", [{"questions": st.lists(section({"question": TEXTS, "context": TEXTS}, {}), min_size=1)}], {}),
        ("fill_mask", texts_or_file(TEXTS), {"top_k": COUNTS}),
    ]
    jobs = [
        section({"type": st.just(kind), **source}, {**output, **options})
        for kind, sources, options in kinds
        for source in sources
    ]
    return st.one_of([*jobs, st.just({"type": "train"})])


def or_null(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


AUTO_COUNTS = COUNTS | st.just("auto")
NAMES = st.text(min_size=1, max_size=3)
SEEDS = st.integers(0, 2**63 - 1)
NOT_NEGATIVE = st.just(0) | st.floats(0, allow_infinity=False)
POSITIVE = st.integers(1, 9) | st.floats(0, exclude_min=True, allow_infinity=False)
SHARES = st.just(1) | st.floats(0, 1, exclude_min=True)
FILES = or_null(PATHS | st.lists(PATHS, min_size=1, max_size=2))


def quantization_strategies() -> dict[str, st.SearchStrategy[Any]]:
    """The keys of "quantize_training"."""
    bits = {"start_bits": st.integers(1, 16), "target_bits": st.integers(1, 16), "quantize_period": COUNTS}
    rule = section(
        {"modules": NAMES | st.lists(NAMES, min_size=1, max_size=2)}, {name: or_null(bits[name]) for name in bits}
    )
    second = {
        "enabled": st.booleans(),
        "max_iter": COUNTS,
        "tol": POSITIVE,
        "stability": POSITIVE,
        "layer_name": or_null(NAMES),
    }
    return {
        **bits,
        **{name: st.booleans() for name in ("enabled", "embedding", "head")},
        **{name: or_null(COUNTS) for name in ("group_size", "quantize_groups")},
        "schedule_offset": st.integers(0, 2**31 - 1),
        "q_type": st.sampled_from(["symmetric", "asymmetric"]),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "quantize_change_ratio": or_null(SHARES),
        "exclude": st.lists(NAMES, max_size=2),
        "rules": st.lists(rule, max_size=2),
        "eigenvalue": or_null(section({}, second)),
        "seed": SEEDS,
    }


def training_strategies() -> dict[str, st.SearchStrategy[Any]]:
    """The sections of training, by name."""
    moments = {
        "lr": POSITIVE,
        "betas": st.lists(st.just(0) | st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "decay_all": st.booleans(),
    }
    lamb = {"bias_correction": st.booleans(), "max_coeff": or_null(POSITIVE), "min_coeff": or_null(NOT_NEGATIVE)}
    counts = ("train_batch_size", "micro_batch_size", "accumulation_steps", "max_steps", "checkpoint_every")
    columns = ("text", "text_pair", "label", "question", "context", "answers", "id")
    return {
        "training": section(
            {},
            {
                **{name: or_null(COUNTS) for name in (*counts, "evaluate_every")},
                **{name: or_null(POSITIVE) for name in ("epochs", "clip_norm")},
                **dict.fromkeys(("keep_checkpoints", "log_every"), COUNTS),
                **{name: st.booleans() for name in ("activation_checkpointing", "compile", "resume", "tensorboard")},
                "seed": SEEDS,
                "processes": or_null(COUNTS | st.just("auto")),
                "data_parallel": st.sampled_from(["auto", "replicate", "shard"]),
                "loss_scale": or_null(section({}, {"initial": POSITIVE, "growth_interval": COUNTS})),
                "output": or_null(PATHS),
            },
        ),
        "optimizer": section({"type": st.just("AdamW")}, moments)
        | section({"type": st.just("LAMB")}, {**moments, **lamb}),
        "schedule": section(
            {},
            {
                "type": st.sampled_from(["constant", "linear", "cosine", "one_cycle"]),
                "warmup_steps": st.integers(0, 2**31 - 1),
                "total_steps": AUTO_COUNTS,
            },
        ),
        "progressive_layer_drop": section(
            {},
            {
                "enabled": st.booleans(),
                "theta": SHARES,
                "gamma": or_null(POSITIVE),
                "total_steps": AUTO_COUNTS,
                "paths": or_null(NAMES | st.lists(NAMES, min_size=1, max_size=2)),
                "seed": SEEDS,
            },
        ),
        "quantize_training": section({}, quantization_strategies()),
        "data": section(
            {},
            {
                "task": st.sampled_from(["auto", "masked_lm", "regression", "question_answering"]),
                "train": FILES,
                "eval": FILES,
                "format": or_null(st.sampled_from(["text", "jsonl", "csv", "tsv", "parquet"])),
                "columns": section({}, {name: or_null(NAMES) for name in columns}),
                "documents": st.sampled_from(["blank_line", "line"]),
                "quoted": st.booleans(),
                "labels": or_null(st.integers(2, 2**31 - 1) | st.lists(NAMES, min_size=2, max_size=3)),
                "mask_probability": SHARES,
                **dict.fromkeys(("length", "stride", "max_question"), COUNTS),
                **{name: or_null(NAMES) for name in ("separator", "metric")},
            },
        ),
    }


VALID = section(
    {
        "model": section(
            {"path": PATHS},
            {
                "revision": or_null(st.text(min_size=1, max_size=3)),
                "gguf_file": or_null(st.sampled_from(["m.gguf", "...", "\n", "ü"])),
                "task": st.sampled_from(["auto", "causal_lm", "embedding", "masked_lm", "token_classification"]),
                "weights": st.sampled_from(["pretrained", "random"]),
            },
        )
    },
    {
        "$schema": or_null(TEXTS),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:12"]),
        "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16", "int8", "int4"]),
        "quantization": or_null(
            section(
                {},
                {
                    "group_size": or_null(AUTO_COUNTS),
                    "symmetric": st.booleans() | st.just("auto"),
                    "scale_dtype": st.sampled_from(["auto", "fp32", "fp16", "bf16"]),
                    "compute": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
                    "exclude": st.lists(st.text(min_size=1, max_size=2), max_size=2, unique=True),
                    "embedding": st.booleans(),
                    "head": st.booleans(),
                },
            )
        ),
        "kernels": st.sampled_from(["auto", "eager", "generic", "specialized"]),
        "inference": section(
            {},
            {
                "max_tokens": AUTO_COUNTS,
                "max_batch": AUTO_COUNTS,
                "page_size": st.sampled_from([8, 16, 32, 64, 128, 256]),
                "prefill_chunk": AUTO_COUNTS,
            },
        ),
        "generation": section(
            {},
            {
                "max_new_tokens": or_null(COUNTS),
                "min_new_tokens": or_null(st.integers(0, 2**31 - 1)),
                "do_sample": or_null(st.booleans()),
                "temperature": or_null(st.integers(0) | st.floats(0, allow_infinity=False)),
                "top_k": or_null(st.integers(0, 2**31 - 1)),
                "top_p": or_null(st.floats(0, 1, exclude_min=True) | st.just(1)),
                "repetition_penalty": or_null(st.floats(0, exclude_min=True, allow_infinity=False)),
                "stop": st.lists(st.text(min_size=1, max_size=2), max_size=2),
                "seed": or_null(st.integers(0, 2**63 - 1)),
                "logprobs": or_null(st.integers(0, 20)),
                "ignore_eos": st.booleans(),
            },
        ),
        "embedding": section(
            {},
            {
                "pooling": st.sampled_from(["auto", "mean", "cls"]),
                "normalize": st.booleans() | st.just("auto"),
                "batch_size": COUNTS,
                "truncate": st.booleans(),
            },
        ),
        **{name: or_null(strategy) for name, strategy in training_strategies().items()},
        "job": or_null(job_strategies()),
    },
)

EDGES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    0.0,
    -0.0,
    8.0,
    16.5,
    20,
    21,
    1.5,
    5e-324,
    2**31 - 1,
    2**31,
    2.0**31,
]
EDGES += [2**63 - 1, 2**63, 2.0**63, 10**30, 1e30, 1e300, 1.7976931348623157e308, 10**308, -(10**30)]
EDGES += ["", "auto", "true", "1", "cuda\n", "cuda:0\n", "cuda:00", "cpu ", "a/b", "..", "..\n", "\0", "x\0", "cls"]
EDGES += ["generate", "encode", [], {}, [[]], [""], ["a"], ["a", "b"], [1], [None], {"type": "encode"}, {"type": None}]
EDGES += [{"path": "m"}, {"type": "encode", "texts": None, "texts_file": None}, [{"role": "user", "content": "a"}]]
DELETED = object()
KEYS = ["extra", "$schema", "type", "texts", "texts_file", "prompts", "messages", "path", "top_k", "max_tokens", ""]


def containers(node: Any) -> list[Any]:
    """``node`` and all objects and arrays in it."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
    inner = [container for child in children for container in containers(child)]
    return [node, *inner] if isinstance(node, (dict, list)) else inner


def mutate(document: dict[str, Any], chance: random.Random) -> None:
    """Change one thing anywhere: a value, its type, a key too many or too few."""
    place: Any = chance.choice(containers(document))
    slots: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    action = chance.choice(["replace", "replace", "float", "delete", "add"])
    if action == "add" or not slots:
        value = copy.deepcopy(chance.choice(EDGES))
        if isinstance(place, dict):
            place[chance.choice(KEYS)] = value
        else:
            place.append(value)
        return
    slot = chance.choice(slots)
    if action == "delete":
        del place[slot]
    elif action == "float" and type(place[slot]) is int and abs(place[slot]) < 10**300:
        place[slot] = float(place[slot])
    else:
        place[slot] = copy.deepcopy(chance.choice(EDGES))


def pydantic_accepts(document: dict[str, Any]) -> bool:
    plain, findings = plain_document(document)
    assert not findings
    try:
        Config.model_validate_json(json.dumps(plain))
    except ValidationError:
        return False
    return True


def small_enough(document: dict[str, Any]) -> dict[str, Any]:
    """Integers that no float can hold are refused by the reader, before either of the two is asked."""
    temperature = document.get("generation", {}).get("temperature")
    if isinstance(temperature, int):
        document["generation"]["temperature"] = temperature % 10**308
    return document


VALID_DOCUMENTS = VALID.map(small_enough)


@settings(deadline=None, max_examples=150)
@given(VALID_DOCUMENTS)
def test_both_accept_valid_documents(document: dict[str, Any]) -> None:
    assert schema_problems(document) == []
    assert pydantic_accepts(document)


@settings(deadline=None, max_examples=1000)
@given(VALID_DOCUMENTS, st.integers(1, 3), st.randoms(use_true_random=False))
def test_both_give_the_same_verdict_on_mutated_documents(
    document: dict[str, Any], times: int, chance: random.Random
) -> None:
    for _ in range(times):
        mutate(document, chance)
    assert pydantic_accepts(document) == (schema_problems(document) == [])


def slots_of(node: Any) -> list[tuple[Any, Any]]:
    return [
        (container, slot)
        for container in containers(node)
        for slot in (list(container) if isinstance(container, dict) else range(len(container)))
    ]


FULL_JOBS: list[dict[str, Any]] = [
    {"type": "generate", "prompts": ["a"], "output": "o", "stream": True},
    {"type": "generate", "messages": [{"role": "user", "content": "a"}]},
    {"type": "classify", "texts": ["a", ["a", "b"]], "top_k": 1},
    {"type": "answer", "questions": [{"question": "a", "context": "b"}]},
    {"type": "encode", "texts_file": "a", "similarity": True},
    {"type": "fill_mask", "texts": ["a"], "top_k": 5},
    {"type": "classify_tokens", "texts": ["a"], "output": None},
    {"type": "train"},
]

TRAINED: dict[str, Any] = {
    "training": {"loss_scale": {"initial": 2.0}, "micro_batch_size": 1},
    "optimizer": {"type": "LAMB"},
    "schedule": {"type": "linear"},
    "progressive_layer_drop": {"gamma": 0.1},
    "quantize_training": {"rules": [{"modules": ["a"], "target_bits": 4}], "exclude": ["b"], "eigenvalue": {}},
    "data": {"train": ["a"], "labels": ["a", "b"]},
}


def full_documents() -> list[Any]:
    """Each job, and each section of training, in a document of its own; all the others are whole beside one job."""
    model: dict[str, Any] = {"model": {"path": "m"}}
    whole = load_config(model | TRAINED | {"precision": "fp16"}).to_dict()
    inferring = load_config(model).to_dict()
    jobs = [(inferring if job is FULL_JOBS[0] else model) | {"job": job} for job in FULL_JOBS]
    sections = [model | {name: whole[name]} for name in TRAINED]
    return [
        pytest.param(document, id=str(list(document)[-1]) + f"{number}")
        for number, document in enumerate([*jobs, *sections])
    ]


@pytest.mark.parametrize("full", full_documents())
def test_both_give_the_same_verdict_with_every_edge_in_every_place(full: dict[str, Any]) -> None:
    verdicts = set()
    for index in range(len(slots_of(full))):
        for edge in [*EDGES, DELETED]:
            document = copy.deepcopy(full)
            container, slot = slots_of(document)[index]
            if edge is DELETED:
                del container[slot]
            else:
                container[slot] = copy.deepcopy(edge)
            verdict = pydantic_accepts(document)
            assert verdict == (schema_problems(document) == []), document
            verdicts.add(verdict)
    assert verdicts == {True, False}


@pytest.mark.parametrize("name", GOLDEN)
def test_both_refuse_the_golden_documents(name: str) -> None:
    assert schema_problems(GOLDEN[name][0])  # type: ignore[arg-type]


def loaded_or_refused(document: dict[str, Any]) -> Config | None:
    """The configuration, or None where it was refused by problems that are one line each and name a place."""
    try:
        return load_config(document)
    except ConfigError as error:
        lines = [(problem.path[:1], len(str(problem).splitlines())) for problem in error.problems]
    assert lines
    assert set(lines) == {("$", 1)}
    return None


@settings(deadline=None, max_examples=150)
@given(VALID_DOCUMENTS, st.integers(0, 2), st.randoms(use_true_random=False))
def test_whatever_loads_is_read_back_equal(document: dict[str, Any], times: int, chance: random.Random) -> None:
    for _ in range(times):
        mutate(document, chance)
    config = loaded_or_refused(document)
    if config is not None:
        assert load_config(config.to_dict()) == config
        assert load_config(json.loads(config.to_json())) == config
        assert load_config(config) == config


def test_the_checked_in_schema_is_current() -> None:
    assert json.loads(schema_text()) == json_schema(), "run python -m config_schema.generate"
    assert main(["--check"]) == 0


def test_a_stale_schema_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "schema.json"
    stale.write_text(schema_text().replace('"fp16"', '"fp61"'))
    monkeypatch.setattr(schema_file, "SCHEMA_PATH", stale)
    schema_file._validator.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"^\$\.precision: .*refuses it; run python -m config_schema\.generate"):
            load_config({"model": {"path": "m"}, "precision": "fp16"})
    finally:
        schema_file._validator.cache_clear()


def test_the_schema_is_valid_itself() -> None:
    schema = json.loads(schema_text())
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "$schema" in schema["properties"]


def test_everything_in_the_schema_is_described() -> None:
    schema = json_schema()
    objects = [schema, *schema["$defs"].values()]
    fields = [field for item in objects for field in item["properties"].values()]
    described = [schema["$defs"][item["$ref"].rpartition("/")[2]] if "$ref" in item else item for item in fields]
    for item in [*objects, *(a | b for a, b in zip(described, fields, strict=True))]:
        assert item["title"], item
        assert item["description"], item


def test_generate_writes_checks_and_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "sub" / "schema.json"
    assert main(["--check", "--output", str(target)]) == 1
    assert main(["--output", str(target)]) == 0
    assert target.read_bytes() == SCHEMA_PATH.read_bytes()
    assert main(["--check", "--output", str(target)]) == 0
    target.write_text(target.read_text().replace("fp16", "fp61"))
    assert main(["--check", "--output", str(target)]) == 1
    assert "is stale; run python -m config_schema.generate" in capsys.readouterr().err
    assert main(["--output", str(target)]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["schema.json"]
