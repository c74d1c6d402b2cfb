"""``--set a.b.c=value``."""

from __future__ import annotations

from pathlib import Path

import pytest

from config_schema import ConfigError, apply_overrides, load_config
from tests.config_schema.test_messages import problems_of, with_model

BASE: dict[str, object] = {"a": {"b": 1}, "list": [1, {"x": 2}], "null": None}

APPLIED: dict[str, tuple[list[str], dict[str, object]]] = {
    "number": (["a.b=0.5"], {"a": {"b": 0.5}}),
    "whole float": (["a.b=2.0"], {"a": {"b": 2}}),
    "string": (["a.b=cuda:0"], {"a": {"b": "cuda:0"}}),
    "quoted string": (['a.b="5"'], {"a": {"b": "5"}}),
    "boolean and null": (["a.b=true", "a.c=null"], {"a": {"b": True, "c": None}}),
    "array and object": (['a.b=["x", {"y": 1}]'], {"a": {"b": ["x", {"y": 1}]}}),
    "what is not quite JSON": (["a.b=[INST] hi"], {"a": {"b": "[INST] hi"}}),
    "equals sign in the value": (["a.b=c=d"], {"a": {"b": "c=d"}}),
    "spaces in the value": (["a.b= x "], {"a": {"b": " x "}}),
    "empty value": (["a.b="], {"a": {"b": ""}}),
    "new objects": (["n.m.k=1"], {"n": {"m": {"k": 1}}}),
    "new array": (["n.0.k=1", "n.1=2"], {"n": [{"k": 1}, 2]}),
    "index": (["list.0=9", "list.1.x=8"], {"list": [9, {"x": 8}]}),
    "append": (["list.2=9"], {"list": [1, {"x": 2}, 9]}),
    "into null": (["null.k=1"], {"null": {"k": 1}}),
    "dollar": (["$.a.b=2"], {"a": {"b": 2}}),
    "later ones win": (["a.b=2", "a.b=3"], {"a": {"b": 3}}),
    "whole section": (['a={"c": 1}'], {"a": {"c": 1}}),
    "number as a key": (["a.0=1"], {"a": {"b": 1, "0": 1}}),
}

CANNOT = "wanted a.b.c=value, with a key or an index between the dots"
INDICES = "$.list is an array of 2; its indices go from 0 to 2 (append)"
REFUSED = {
    "a.b": f'the override "a.b" cannot be read: {CANNOT}',
    "": f'the override "" cannot be read: {CANNOT}',
    "=1": f'the override "=1" cannot be read: {CANNOT}',
    "a..b=1": f'the override "a..b=1" cannot be read: {CANNOT}',
    "a.=1": f'the override "a.=1" cannot be read: {CANNOT}',
    "a.b.c=1": 'the override "a.b.c=1" cannot be applied: $.a.b is neither an object nor an array, so it has no "c"',
    "list.3=1": f'the override "list.3=1" cannot be applied: {INDICES}',
    "list.x=1": f'the override "list.x=1" cannot be applied: {INDICES}',
    "list.-1=1": f'the override "list.-1=1" cannot be applied: {INDICES}',
    "a.b=NaN": 'the override "a.b=NaN": NaN is not a JSON value; write a number',
    "a.b=1e999": 'the override "a.b=1e999": the number is infinite, or too large',
    'a={"x":1,"x":2}': 'the override "a={\\"x\\":1,\\"x\\":2}": the key appears more than once in its object; keep one',
    "a.b=\udc80": 'the override "a.b=\\udc80": \\udc80 is half a character (a lone surrogate); it is not Unicode text',
}


@pytest.mark.parametrize("name", APPLIED)
def test_applies(name: str) -> None:
    overrides, changed = APPLIED[name]
    assert apply_overrides(BASE, overrides) == {**BASE, **changed}


@pytest.mark.parametrize("text", REFUSED)
def test_refuses(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides(BASE, [text])
    assert str(caught.value) == f"$: {REFUSED[text]}"


def test_the_document_given_does_not_change() -> None:
    apply_overrides(BASE, ["a.b=5", "list.0=5"])
    assert BASE == {"a": {"b": 1}, "list": [1, {"x": 2}], "null": None}


def test_deep_values_stay_text() -> None:
    assert apply_overrides({}, ["a=" + "[" * 100_000])["a"] == "[" * 100_000


def test_in_load_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIPSTREAM_UNSET", raising=False)
    path = tmp_path / "c.json"
    path.write_text('{"model": {"path": "${SLIPSTREAM_UNSET}"}}')
    config = load_config(
        path, overrides=["model.path=m", "job.type=generate", "job.prompts.0=hi", "generation.top_k=4"]
    )
    assert config == load_config(with_model(job={"type": "generate", "prompts": ["hi"]}, generation={"top_k": 4}))
    assert load_config(config, overrides=["generation.top_k=null"]).generation.top_k is None


def test_all_problems_at_once() -> None:
    assert problems_of(with_model(device="gpx"), overrides=["x", "modle.path=m", "generation.topk=5"]) == [
        f'$: the override "x" cannot be read: {CANNOT}',
        '$.device: got "gpx", wanted one of "auto", "cpu", "cuda" or a numbered GPU such as "cuda:0"',
        '$.modle: unknown key, did you mean "model"? (allowed: $schema, model, device, precision, quantization, '
        "kernels, inference, generation, embedding, training, optimizer, schedule, progressive_layer_drop, "
        "flops_profiler, data, job)",
        '$.generation.topk: unknown key, did you mean "top_k"? (allowed: max_new_tokens, min_new_tokens, do_sample, '
        "temperature, top_k, top_p, repetition_penalty, stop, seed, logprobs, ignore_eos)",
    ]
