"""Golden texts: what a user reads about each kind of broken document."""

from __future__ import annotations

from typing import Any

import pytest

from config_schema import ConfigError, Problem, load_config

ROOT_KEYS = (
    "$schema, model, device, precision, quantization, kernels, inference, generation, embedding, training, optimizer, "
    "schedule, "
    "progressive_layer_drop, flops_profiler, data, job"
)
JOBS = '"answer", "classify", "classify_tokens", "encode", "fill_mask", "generate", "train"'


def problems_of(document: object, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(document, **options)  # type: ignore[arg-type]
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def with_model(**sections: object) -> dict[str, object]:
    return {"model": {"path": "m"}, **sections}


def with_job(**job: object) -> dict[str, object]:
    return with_model(job=job)


TRAINING_KEYS = (
    "train_batch_size, micro_batch_size, accumulation_steps, max_steps, epochs, clip_norm, seed, "
    "activation_checkpointing, compile, processes, exchange_timeout, data_parallel, gradient_exchange, power_sgd, "
    "loss_scale, output, checkpoint_every, keep_checkpoints, resume, evaluate_every, log_every, tensorboard"
)

GOLDEN: dict[str, tuple[object, list[str]]] = {
    "unknown key": (
        {"model": {"path": "m", "taks": "auto"}},
        ['$.model.taks: unknown key, did you mean "task"? (allowed: path, revision, gguf_file, task, weights)'],
    ),
    "unknown key that resembles none": (
        with_model(zzzz=1),
        [f"$.zzzz: unknown key (allowed: {ROOT_KEYS})"],
    ),
    "key of another section": (
        with_model(max_new_tokens=3),
        [f"$.max_new_tokens: unknown key, did you mean $.generation.max_new_tokens? (allowed: {ROOT_KEYS})"],
    ),
    "keys of training": (
        with_model(training={"micro_batch_sise": 4, "acumulation_steps": 2, "loss_scale": {"inital": 2.0}}),
        [
            f'$.training.micro_batch_sise: unknown key, did you mean "micro_batch_size"? (allowed: {TRAINING_KEYS})',
            f'$.training.acumulation_steps: unknown key, did you mean "accumulation_steps"? (allowed: {TRAINING_KEYS})',
            '$.training.loss_scale.inital: unknown key, did you mean "initial"? (allowed: initial, growth_interval)',
        ],
    ),
    "keys beside training": (
        with_model(
            training={"micro_batch_size": 4},
            optimizer={"type": "AdamW", "weight_decy": 0.1},
            schedule={"warmup": 3},
            progressive_layer_drop={"tetha": 0.5},
            data={"colums": {}},
        ),
        [
            '$.optimizer.weight_decy: unknown key, did you mean "weight_decay"? '
            "(allowed: type, lr, betas, eps, weight_decay, decay_all)",
            '$.schedule.warmup: unknown key, did you mean "warmup_steps"? (allowed: type, warmup_steps, total_steps)',
            '$.progressive_layer_drop.tetha: unknown key, did you mean "theta"? '
            "(allowed: enabled, theta, gamma, total_steps, paths, seed)",
            '$.data.colums: unknown key, did you mean "columns"? (allowed: task, train, eval, format, columns, '
            "documents, quoted, length, labels, mask_probability, separator, stride, max_question, metric)",
        ],
    ),
    "an optimizer that is not there": (
        with_model(training={"micro_batch_size": 4}, optimizer={"type": "Adam"}),
        [
            '$.optimizer.type: got "Adam", wanted one of "AdamW", "LAMB", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"; '
            'did you mean "AdamW"?'
        ],
    ),
    "keys of compressed optimizers": (
        with_model(
            training={"micro_batch_size": 4},
            optimizer={"type": "ZeroOneAdam", "freeze_step": 3, "local_step_cliper": 8},
        ),
        [
            f'$.optimizer.{key}: unknown key, did you mean "{meant}"? (allowed: type, lr, betas, eps, weight_decay, '
            "decay_all, compression, max_grad_norm, var_freeze_step, var_update_scaler, local_step_scaler, "
            "local_step_clipper, bias_correction)"
            for key, meant in (("freeze_step", "var_freeze_step"), ("local_step_cliper", "local_step_clipper"))
        ],
    ),
    "an exchange that is not there": (
        with_model(training={"micro_batch_size": 4, "gradient_exchange": "fp8"}),
        ['$.training.gradient_exchange: got "fp8", wanted one of "full", "bf16", "PowerSGD"'],
    ),
    "an exchange with a misspelt key": (
        with_model(training={"micro_batch_size": 4, "gradient_exchange": "PowerSGD", "power_sgd": {"rnk": 2}}),
        ['$.training.power_sgd.rnk: unknown key, did you mean "rank"? (allowed: rank, start_step)'],
    ),
    "a warm-up that is no number": (
        with_model(training={"micro_batch_size": 4}, optimizer={"type": "OneBitAdam", "freeze_step": 0}),
        ['$.optimizer.freeze_step: got 0, wanted an integer from 1 to 2147483647 or "auto"'],
    ),
    "a compression that is not there": (
        with_model(training={"micro_batch_size": 4}, optimizer={"type": "OneBitLamb", "compression": True}),
        ['$.optimizer.compression: got true, wanted one of "always", "auto"'],
    ),
    "theta out of range": (
        with_model(training={"micro_batch_size": 4}, progressive_layer_drop={"theta": 1.5}),
        ["$.progressive_layer_drop.theta: got 1.5, wanted a number above 0 and at most 1"],
    ),
    "key in another case": (
        with_model(embedding={"Pooling": "cls"}),
        [
            (
                '$.embedding.Pooling: unknown key, did you mean "pooling"? '
                "(allowed: pooling, normalize, batch_size, truncate)"
            ),
        ],
    ),
    "key that is no identifier": (
        with_model(**{"a b\n\x1b": 1}),
        [f'$["a b\\n\\u001b"]: unknown key (allowed: {ROOT_KEYS})'],
    ),
    "schema that is no string": (
        with_model(**{"$schema": 5}),
        ['$["$schema"]: got 5, wanted a string or null'],
    ),
    "empty object": ({}, ["$.model: missing, wanted an object"]),
    "missing required key": (
        {"model": {}},
        ["$.model.path: missing, wanted a non-empty path without NUL characters"],
    ),
    "empty path": (
        {"model": {"path": ""}},
        ['$.model.path: got "", wanted a non-empty path without NUL characters'],
    ),
    "path with NUL": (
        {"model": {"path": "a\0b"}},
        ['$.model.path: got "a\\u0000b", wanted a non-empty path without NUL characters'],
    ),
    "file name with a directory": (
        {"model": {"path": "m", "gguf_file": "../m.gguf"}},
        [
            '$.model.gguf_file: got "../m.gguf", wanted the name of a file in the model\'s directory, '
            "without a path or null"
        ],
    ),
    "directory for a file name": (
        {"model": {"path": "m", "gguf_file": ".."}},
        ['$.model.gguf_file: got "..", wanted the name of a file in the model\'s directory, without a path or null'],
    ),
    "section that is no object": (
        {"model": "gpt2", "inference": [1]},
        [
            '$.model: got the string "gpt2", wanted an object',
            "$.inference: got an array of 1, wanted an object",
        ],
    ),
    "null for a section": (with_model(generation=None), ["$.generation: got null, wanted an object"]),
    "misspelt choice": (
        with_model(device="gpu", precision="PF16", kernels="Eager"),
        [
            '$.device: got "gpu", wanted one of "auto", "cpu", "cuda" or a numbered GPU such as "cuda:0"; '
            'did you mean "cpu"?',
            '$.precision: got "PF16", wanted one of "auto", "fp32", "bf16", "fp16", "int8", "int4"; '
            'did you mean "fp16"?',
            '$.kernels: got "Eager", wanted one of "auto", "eager", "generic", "specialized"; did you mean "eager"?',
        ],
    ),
    "device with a line break": (
        with_model(device="cuda:0\n"),
        [
            '$.device: got "cuda:0\\n", wanted one of "auto", "cpu", "cuda" or a numbered GPU such as "cuda:0"; '
            'did you mean "cuda"?'
        ],
    ),
    "string for a boolean": (
        with_model(generation={"ignore_eos": "yes"}),
        ['$.generation.ignore_eos: got the string "yes", wanted true or false'],
    ),
    "quoted boolean": (
        with_model(generation={"ignore_eos": "true"}),
        ['$.generation.ignore_eos: got the string "true", wanted true or false; remove the quotes'],
    ),
    "number for a boolean": (
        with_model(generation={"do_sample": 1}),
        ["$.generation.do_sample: got 1, wanted true, false or null"],
    ),
    "boolean for an integer": (
        with_model(generation={"top_k": True}),
        ["$.generation.top_k: got true, wanted an integer from 0 to 2147483647 or null"],
    ),
    "quoted number": (
        with_model(generation={"temperature": "0.7", "seed": "1"}),
        [
            '$.generation.temperature: got the string "0.7", wanted a number of at least 0 or null; remove the quotes',
            '$.generation.seed: got the string "1", wanted an integer from 0 to 9223372036854775807 or null; '
            "remove the quotes",
        ],
    ),
    "fraction for an integer": (
        with_model(embedding={"batch_size": 1.5}),
        ["$.embedding.batch_size: got 1.5, wanted an integer from 1 to 2147483647"],
    ),
    "one line for a union": (
        with_model(inference={"max_tokens": 0, "max_batch": "atuo", "prefill_chunk": None}),
        [
            '$.inference.max_tokens: got 0, wanted an integer from 1 to 2147483647 or "auto"',
            '$.inference.max_batch: got "atuo", wanted an integer from 1 to 2147483647 or "auto"; did you mean "auto"?',
            '$.inference.prefill_chunk: got null, wanted an integer from 1 to 2147483647 or "auto"',
        ],
    ),
    "not a power of two": (
        with_model(inference={"page_size": 24}),
        ["$.inference.page_size: got 24, wanted one of 8, 16, 32, 64, 128, 256"],
    ),
    "out of range": (
        with_model(generation={"top_p": 1.5, "temperature": -0.5, "logprobs": 21, "repetition_penalty": 0}),
        [
            "$.generation.top_p: got 1.5, wanted a number above 0 and at most 1 or null",
            "$.generation.temperature: got -0.5, wanted a number of at least 0 or null",
            "$.generation.logprobs: got 21, wanted an integer from 0 to 20 or null",
            "$.generation.repetition_penalty: got 0, wanted a number above 0 or null",
        ],
    ),
    "far out of range": (
        with_model(generation={"seed": 10**40, "top_k": 1e300}),
        [
            "$.generation.seed: got 1e+40, wanted an integer from 0 to 9223372036854775807 or null",
            "$.generation.top_k: got 1e+300, wanted an integer from 0 to 2147483647 or null",
        ],
    ),
    "boolean or auto": (
        with_model(embedding={"normalize": "yes"}),
        ['$.embedding.normalize: got "yes", wanted true, false or "auto"'],
    ),
    "elements of arrays": (
        with_model(generation={"stop": ["a", "", 5]}),
        [
            '$.generation.stop[1]: got "", wanted a non-empty string',
            "$.generation.stop[2]: got 5, wanted a non-empty string",
        ],
    ),
    "string for an array": (
        with_job(type="generate", prompts="hello"),
        ['$.job.prompts: got the string "hello", wanted a non-empty array of strings or null'],
    ),
    "empty array": (
        with_job(type="encode", texts=[]),
        ["$.job.texts: got an empty array, wanted a non-empty array of strings or null"],
    ),
    "array in which nothing is valid": (
        with_job(type="encode", texts=[1]),
        ["$.job.texts[0]: got 1, wanted a string"],
    ),
    "pairs": (
        with_job(type="classify", texts=["a", ["a", "b"], ["a"], ["a", 1], ["a", "b", "c"], {"str": 1}, []]),
        [
            "$.job.texts[2]: got an array of 1, wanted a string or an array of 2 strings",
            "$.job.texts[3]: got an array of 2, wanted a string or an array of 2 strings",
            "$.job.texts[4]: got an array of 3, wanted a string or an array of 2 strings",
            "$.job.texts[5]: got an object, wanted a string or an array of 2 strings",
            "$.job.texts[6]: got an empty array, wanted a string or an array of 2 strings",
        ],
    ),
    "job without a type": (with_job(prompts=["a"]), [f"$.job.type: missing, wanted one of {JOBS}"]),
    "job of a misspelt type": (
        with_job(type="fillmask"),
        [f'$.job.type: got "fillmask", wanted one of {JOBS}; did you mean "fill_mask"?'],
    ),
    "job of no type": (with_job(type=["generate"]), [f"$.job.type: got an array of 1, wanted one of {JOBS}"]),
    "job that is no object": (
        with_model(job="generate"),
        ['$.job: got the string "generate", wanted an object or null'],
    ),
    "key like the tag of a union": (
        with_job(type="generate", prompts=["a"], generate=1),
        ["$.job.generate: unknown key (allowed: type, prompts, messages, prompts_file, output, stream)"],
    ),
    "none of several sources": (
        with_job(type="generate", prompts=None),
        ['$.job: give exactly one of "prompts", "messages", "prompts_file"; none is there'],
    ),
    "two sources, and a wrong type beside": (
        with_job(type="encode", texts=["a"], texts_file="b", similarity="no"),
        [
            '$.job: give exactly one of "texts", "texts_file"; "texts" and "texts_file" are there',
            '$.job.similarity: got the string "no", wanted true or false',
        ],
    ),
    "parts of messages": (
        with_job(type="generate", messages=[{"role": "bot", "content": 1, "name": "x"}, {}, "hi"]),
        [
            '$.job.messages[0].role: got "bot", wanted one of "system", "user", "assistant", "tool"',
            "$.job.messages[0].content: got 1, wanted a string",
            "$.job.messages[0].name: unknown key (allowed: role, content)",
            '$.job.messages[1].role: missing, wanted one of "system", "user", "assistant", "tool"',
            "$.job.messages[1].content: missing, wanted a string",
            '$.job.messages[2]: got the string "hi", wanted an object',
        ],
    ),
    "missing array": (
        with_job(type="answer"),
        ["$.job.questions: missing, wanted a non-empty array of objects"],
    ),
    "long string": (
        with_model(precision="x" * 500),
        [f'$.precision: got "{"x" * 77}...", wanted one of "auto", "fp32", "bf16", "fp16", "int8", "int4"'],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_message_of(name: str) -> None:
    document, expected = GOLDEN[name]
    assert problems_of(document) == expected


def test_problems_come_in_the_order_of_the_document() -> None:
    document = {"job": {"type": "encode", "b": 1, "a": 1}, "zz": 1, "generation": {"top_p": 5, "top_k": -1}}
    assert [line.split(":")[0] for line in problems_of(document)] == [
        "$.job",
        "$.job.b",
        "$.job.a",
        "$.zz",
        "$.generation.top_p",
        "$.generation.top_k",
        "$.model",
    ]


def test_long_lists_of_problems_are_cut() -> None:
    lines = problems_of(with_job(type="encode", texts=list(range(250))))
    assert len(lines) == 101
    assert lines[99:] == ["$.job.texts[99]: got 99, wanted a string", "$: there are more problems than these 100"]


def test_every_message_is_one_line() -> None:
    for document, _ in GOLDEN.values():
        assert all(len(line.splitlines()) == 1 for line in problems_of(document))


def test_problem_without_a_path_is_its_message() -> None:
    assert str(Problem("", "is empty")) == "is empty"
    assert str(Problem("$.a", "is wrong")) == "$.a: is wrong"
