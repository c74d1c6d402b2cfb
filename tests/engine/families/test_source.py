"""A checkpoint seen through a family: names, slices, and every wrong tensor named at once."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import StateDictSource
from engine.errors import CheckpointError
from engine.families import families, family_for, spec_from_hf
from engine.families.base import HFConfig
from engine.families.source import CanonicalSource
from ops.spec import Task
from tests.engine.tiny import family_of, tiny


def source(model_type: str, task: Task, state: dict[str, Tensor]) -> CanonicalSource:
    one = tiny(model_type, task)
    family, spec = spec_from_hf(one.model.config.to_dict(), task, "config.json")
    return CanonicalSource(StateDictSource(state), family, spec)


def state_of(model_type: str, task: Task) -> dict[str, Tensor]:
    return dict(tiny(model_type, task).model.state_dict())


def test_gpt2_weights_are_transposed_and_cut_apart() -> None:
    state = state_of("gpt2", "causal_lm")
    found = source("gpt2", "causal_lm", state)
    fused, bias = state["transformer.h.1.attn.c_attn.weight"], state["transformer.h.1.attn.c_attn.bias"]
    assert torch.equal(found.read("layers.1.k.weight"), fused[:, 48:96].t())
    assert torch.equal(found.read("layers.1.v.bias"), bias[96:])
    assert torch.equal(found.read("layers.1.v.weight", slice(5, 9)), fused[:, 101:105].t())
    assert torch.equal(
        found.read("layers.0.up.weight", slice(3, 7)), state["transformer.h.0.mlp.c_fc.weight"][:, 3:7].t()
    )
    assert found.shape("layers.0.up.weight") == (80, 48)


def test_rows_of_a_plain_weight() -> None:
    state = state_of("llama", "causal_lm")
    found = source("llama", "causal_lm", state)
    assert torch.equal(found.read("layers.2.up.weight", slice(7, 30)), state["model.layers.2.mlp.up_proj.weight"][7:30])
    assert found.dtype("layers.2.up.weight") == torch.float32


def test_a_bare_model_has_no_prefix() -> None:
    state = {name.removeprefix("transformer."): t for name, t in state_of("gpt2", "causal_lm").items()}
    assert torch.equal(source("gpt2", "causal_lm", state).read("embed.token.weight"), state["wte.weight"])


def test_old_norm_names_are_read() -> None:
    state = {
        re.sub(r"LayerNorm\.weight", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias", "LayerNorm.beta", name)): tensor
        for name, tensor in state_of("bert", "embedding").items()
    }
    found = source("bert", "embedding", state)
    assert torch.equal(found.read("layers.0.attn_norm.bias"), state["encoder.layer.0.attention.output.LayerNorm.beta"])


def test_an_encoder_without_a_pooler_still_embeds() -> None:
    state = {name: t for name, t in state_of("bert", "embedding").items() if "pooler" not in name}
    assert source("bert", "embedding", state).spec.head is None


def test_heads_of_other_tasks_and_old_buffers_are_left_unread() -> None:
    state = state_of("bert", "masked_lm") | {
        "cls.seq_relationship.weight": torch.zeros(2, 48),
        "bert.embeddings.position_ids": torch.arange(128)[None],
    }
    assert "head.out.bias" in source("bert", "masked_lm", state).names()
    gpt2 = state_of("gpt2", "causal_lm") | {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    source("gpt2", "causal_lm", gpt2)


def _drop(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.down_proj.weight"]


def _misspell(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.downproj.weight"] = state.pop("model.layers.1.mlp.down_proj.weight")


def _reshape(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.zeros(47)


def _surplus(state: dict[str, Tensor]) -> None:
    state["model.layers.3.input_layernorm.weight"] = torch.zeros(48)


def _surplus_bias(state: dict[str, Tensor]) -> None:
    state["lm_head.bias"] = torch.zeros(160)


def _integers(state: dict[str, Tensor]) -> None:
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int8)


WRONG = [
    (_integers, r"model\.layers\.0\.mlp\.up_proj\.weight: holds torch\.int8, wanted floating point"),
    (_drop, r"model\.layers\.1\.mlp\.down_proj\.weight: missing"),
    (
        _misspell,
        r'model\.layers\.1\.mlp\.down_proj\.weight: missing, is "model\.layers\.1\.mlp\.downproj\.weight" meant\?',
    ),
    (_reshape, r"model\.norm\.weight: shape \[47\], but config\.json calls for \[48\]"),
    (_surplus, r"model\.layers\.3\.input_layernorm\.weight: this Llama model has no such weight"),
    (_surplus_bias, r"lm_head\.bias: this Llama model has no such weight"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_tensor_is_named(spoil: Any, message: str) -> None:
    state = state_of("llama", "causal_lm")
    spoil(state)
    with pytest.raises(CheckpointError, match=message):
        source("llama", "causal_lm", state)


def test_all_wrong_tensors_come_at_once() -> None:
    state = state_of("llama", "causal_lm")
    _drop(state)
    _reshape(state)
    _surplus(state)
    with pytest.raises(CheckpointError) as caught:
        source("llama", "causal_lm", state)
    assert len(str(caught.value).splitlines()) == 3


def test_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(CheckpointError, match=r"no family 'mamba' here; there are: bert, .*gpt2, .*llama"):
        family_for(HFConfig({"model_type": "mamba"}, "config.json"))


def test_a_task_that_a_family_does_not_serve() -> None:
    values = tiny("gpt2", "causal_lm").model.config.to_dict()
    with pytest.raises(CheckpointError, match="family GPT-2 serves causal_lm, not masked_lm"):
        spec_from_hf(values, "masked_lm", "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "48"}, "hidden_size: got '48', wanted int"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_act": "swoosh"}, "hidden_act: unknown activation 'swoosh'"),
        ({"num_key_value_heads": 4}, "6 heads are not a multiple of 4 KV heads"),
    ],
)
def test_a_config_that_makes_no_sense(change: dict[str, Any], message: str) -> None:
    values = tiny("llama", "causal_lm").model.config.to_dict() | change
    with pytest.raises(CheckpointError, match=message):
        spec_from_hf(values, None, "config.json")


def test_facts_that_no_kernel_honours_are_refused() -> None:
    for model_type, change in (
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("bert", {"position_embedding_type": "relative_key"}),
    ):
        task: Task = "causal_lm" if model_type == "gpt2" else "embedding"
        values = tiny(model_type, task).model.config.to_dict() | change
        with pytest.raises(CheckpointError, match=f"{next(iter(change))}: .* is not supported"):
            spec_from_hf(values, None, "config.json")


@pytest.mark.parametrize("model_type", [name for family in families() for name in family.model_types])
def test_every_family_states_what_it_needs(model_type: str) -> None:
    family = family_of(model_type)
    assert set(family.heads) == set(family.tasks)
    for task in family.tasks:
        one = tiny(model_type, task)
        _, spec = spec_from_hf(one.model.config.to_dict(), task, "config.json")
        assert spec.parameters() == sum(p.numel() for p in one.model.parameters())
        assert replace(spec) == spec
        assert hash(spec) == hash(replace(spec))


def test_family_of_finds_each_type() -> None:
    assert family_of("xlm-roberta").name == "RoBERTa"
