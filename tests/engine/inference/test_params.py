"""Who decides how to sample: the caller over the config over the checkpoint, with Hugging Face's meanings."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from engine.errors import EngineError
from engine.inference import params
from engine.inference.params import SamplingParams


def resolve(*layers: dict[str, Any]) -> SamplingParams:
    return params.resolve(*layers, {"do_sample": False}, fresh_seed=7)


def test_defaults_are_hugging_faces() -> None:
    found = resolve({})
    assert (found.max_new_tokens, found.temperature, found.repetition_penalty) == (20, 0.0, 1.0)
    sampled = resolve({"do_sample": True})
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (1.0, 50, 1.0)


@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}])
def test_an_option_that_is_given_is_applied(option: dict[str, Any]) -> None:
    found = resolve(option)
    assert found.temperature > 0
    assert all(getattr(found, name) == value for name, value in option.items())


def test_the_stronger_layer_wins() -> None:
    checkpoint = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5}
    assert params.resolve({}, checkpoint, fresh_seed=0).temperature == 0.6
    assert params.resolve({"temperature": 0}, checkpoint, fresh_seed=0).temperature == 0.0
    found = params.resolve({"max_new_tokens": 9}, {"max_new_tokens": 7}, checkpoint, fresh_seed=0)
    assert (found.max_new_tokens, found.top_p) == (9, 0.9)


def test_a_seed_is_made_where_none_is_given() -> None:
    assert resolve({}).seed == 7
    assert resolve({"seed": 3}).seed == 3


def test_end_of_sequence_ids() -> None:
    assert resolve({"eos_token_id": [2, 5]}).stop_ids == {2, 5}
    assert resolve({"eos_token_id": 2, "ignore_eos": True}).stop_ids == frozenset()
    assert params.within(resolve({"eos_token_id": [2, 500]}), 100).stop_ids == {2}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens: got 0, wanted at least 1"),
    ({"max_new_tokens": 2.5}, "max_new_tokens: got 2.5, wanted an integer"),
    ({"min_new_tokens": 30}, "min_new_tokens: got 30, wanted from 0 to max_new_tokens"),
    ({"temperature": -1}, "temperature: got -1.0, wanted 0"),
    ({"temperature": "hot"}, "temperature: got 'hot', wanted a number"),
    ({"top_p": 0.0}, "top_p: got 0.0"),
    ({"top_p": 1.5}, "top_p: got 1.5"),
    ({"top_k": -1}, "top_k: got -1"),
    ({"repetition_penalty": 0}, "repetition_penalty: got 0.0"),
    ({"stop": [""]}, "stop: "),
    ({"stop": [3]}, r"stop: got \[3\]"),
    ({"seed": -1}, "seed: got -1"),
    ({"logprobs": 21}, "logprobs: got 21"),
    ({"do_sample": False, "temperature": 0.5}, "temperature=0.5 has no effect with do_sample=False"),
    ({"temperature": 0, "top_k": 4}, "top_k=4 has no effect with temperature=0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        resolve(params.checked(options))


def test_an_unknown_option_is_named_with_what_is_meant() -> None:
    with pytest.raises(EngineError, match="unknown option 'temprature', did you mean \"temperature\""):
        params.option_names(["temprature"])


def test_a_generation_config_is_accepted() -> None:
    config = GenerationConfig(
        max_new_tokens=4, do_sample=True, temperature=0.5, top_k=3, stop_strings=["x"], eos_token_id=9
    )
    found = params.resolve(params.from_generation_config(config), fresh_seed=0)
    assert (found.max_new_tokens, found.temperature, found.top_k, found.stop, found.stop_ids) == (
        4,
        0.5,
        3,
        ("x",),
        {9},
    )


@pytest.mark.parametrize(
    "option", [{"num_beams": 4}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[3]]}, {"min_p": 0.1}]
)
def test_what_is_not_built_is_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=f"GenerationConfig.{next(iter(option))}: .* is not supported"):
        params.from_generation_config(GenerationConfig(**option))


def test_every_untouched_generation_config_is_accepted() -> None:
    """Whatever defaults the installed version of transformers writes down."""
    found = params.resolve(params.from_generation_config(GenerationConfig()), fresh_seed=0)
    assert found.temperature == 0.0


def test_max_length_counts_the_prompt() -> None:
    assert params.length_limit({"max_length": 30}, prompt=10) == 20
    assert params.length_limit({"max_length": 5}, prompt=10) == 1
    assert params.length_limit({"max_length": 30, "max_new_tokens": 3}, prompt=10) is None
