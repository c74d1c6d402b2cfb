"""Floors against bytes and FLOPs counted by hand, and against what is published of the models of the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.bench import floors
from engine.bench.job import Case
from engine.families import spec_from_hf
from ops.spec import ModelSpec
from profiler import rates as measured


def spec(model_type: str, **values: object) -> ModelSpec:
    return spec_from_hf({"model_type": model_type, **values}, None, "test")[1]


GPT2 = spec(
    "gpt2", architectures=["GPT2LMHeadModel"], vocab_size=100, n_embd=8, n_layer=2, n_head=2, n_positions=64, n_inner=32
)
#: A layer of GPT-2 of width 8: qkv, out, up, down; two of them; the tied head.
GPT2_WEIGHTS = 2 * (3 * 8 * 8 + 8 * 8 + 8 * 32 + 32 * 8) + 100 * 8


def test_a_decoder_reads_its_linear_weights_its_head_and_the_cache() -> None:
    work = floors.work(GPT2, Case(batch=1, tokens=10, new=4), element=2)
    # Four tokens see 11, 12, 13 and 14 keys: 12.5 in the mean, in each of two layers, keys and values of 8 elements.
    assert work.bytes == 2 * (GPT2_WEIGHTS + 2 * 12.5 * 2 * 8)
    assert work.flops == 2 * GPT2_WEIGHTS + 4 * 8 * 12.5 * 2


def test_a_batch_reads_the_weights_once_and_every_cache() -> None:
    one, four = (floors.work(GPT2, Case(batch, 10, 4), 4) for batch in (1, 4))
    assert four.bytes - one.bytes == 3 * 4 * (2 * 12.5 * 2 * 8)
    assert four.flops == 4 * one.flops


def test_windows_bound_what_is_read_of_the_cache() -> None:
    values = {"vocab_size": 100, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "window_size": 5}
    neo = spec("gpt_neo", architectures=["GPTNeoForCausalLM"], attention_types=[[["global", "local"], 1]], **values)
    weights = sum(floors.linear_weights(neo))
    assert weights == 2 * (4 * 8 * 8 + 2 * 8 * 32) + 100 * 8
    assert floors.work(neo, Case(1, 10, 4), 1).bytes == weights + 2 * 8 * (12.5 + 5)


def test_ahead_of_the_first_token_the_head_sees_one_and_none_looks_ahead() -> None:
    case = Case(batch=3, tokens=4, new=1, first=True)
    work = floors.work(GPT2, case, element=2)
    assert work.bytes == 2 * GPT2_WEIGHTS
    layers, head = GPT2_WEIGHTS - 100 * 8, 100 * 8
    assert work.flops == 3 * (2 * (layers * 4 + head) + 2 * 4 * 8 * (1 + 2 + 3 + 4))
    assert (case.room, Case(3, 4, 1).room, Case(3, 4).room) == (5, 6, 4)


def test_a_window_bounds_what_a_prompt_attends_to() -> None:
    values = {"vocab_size": 100, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "window_size": 3}
    neo = spec("gpt_neo", architectures=["GPTNeoForCausalLM"], attention_types=[[["global", "local"], 1]], **values)
    body, head = floors.linear_weights(neo)
    work = floors.work(neo, Case(1, 5, 1, first=True), 1)
    assert work.flops == 2 * (body * 5 + head) + 4 * 8 * (1 + 2 + 3 + 4 + 5) + 4 * 8 * (1 + 2 + 3 + 3 + 3)


def test_grouped_queries_gates_and_an_untied_head() -> None:
    llama = spec(
        "llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=100,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    assert floors.linear_weights(llama) == (16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24, 100 * 16)
    cached = floors.work(llama, Case(1, 10, 1), 1).bytes - sum(floors.linear_weights(llama))
    assert cached == 2 * 8 * 11


def test_an_encoder_computes_every_token_and_reads_weights_once() -> None:
    bert = spec(
        "bert",
        architectures=["BertModel"],
        vocab_size=100,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    layers, pooler = 2 * (4 * 8 * 8 + 2 * 8 * 32), 8 * 8
    work = floors.work(bert, Case(batch=3, tokens=20), element=2)
    assert work.bytes == 2 * (layers + pooler)
    assert work.flops == 2 * (layers * 3 * 20 + pooler * 3) + 3 * 2 * 4 * 20 * 20 * 8


SHAPES = Path(__file__).parents[3] / "benchmarks" / "shapes"
#: Parameters as published, and the floor of one token (or of 128) at 4.3 TB/s in two bytes a weight, in microseconds.
PUBLISHED = {
    "gpt2": (124_439_808, 59),
    "gpt2-xl": (1_557_611_200, 735),
    "gpt-neo-2.7b": (2_651_307_520, 1243),
    "llama-3.2-1b": (1_235_814_400, 576),
    "llama-2-7b": (6_738_415_616, 3093),
    "bert-base": (109_482_240, 40),
    "bert-large": (335_141_888, 141),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shapes_of_the_table_are_the_published_ones(name: str) -> None:
    values = json.loads((SHAPES / name / "config.json").read_text("utf-8"))
    _, found = spec_from_hf(values, None, name)
    parameters, floor = PUBLISHED[name]
    assert found.parameters() == parameters
    case = Case(1, 128, 64) if found.causal else Case(1, 128)
    assert floors.work(found, case, 2).bytes / 4.3e6 == pytest.approx(floor, rel=0.01)


def test_every_shape_of_the_table_is_checked() -> None:
    from benchmarks.models import TABLE

    assert {path.name for path in SHAPES.iterdir()} == set(PUBLISHED) == {entry.name for entry in TABLE}


def test_rates_are_those_of_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measured.READ_BYTES, "cpu", 1 << 24)
    monkeypatch.setitem(measured.MATRIX, "cpu", 128)
    rates = floors.rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.read < 1e13
    assert 1e7 < rates.flops < 1e14
