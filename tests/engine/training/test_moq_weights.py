"""Which weights are rounded, in which groups, with which bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from config_schema.quantize_training import QuantizeTraining
from engine.errors import EngineError
from engine.training.block_stack import find_stack
from engine.training.moq_weights import RoundedWeight, find_weights
from ops.quantization import dequantize
from tests.engine.training.hf_small import small
from tests.engine.training.trained import Stack, bert


def found(model: nn.Module, **keys: Any) -> dict[str, RoundedWeight]:
    weights = find_weights(model, QuantizeTraining(**keys), find_stack(model))
    return {weight.name: weight for weight in weights}


def test_linear_layers_embeddings_and_the_tied_head() -> None:
    model = small("gpt2")
    weights = found(model)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = {f"transformer.h.{index}.{part}" for index in range(4) for part in parts}
    assert set(weights) == blocks | {"transformer.wte"}, "lm_head is the embedding; positions stay"
    assert all(weights[name].transposed == (name in blocks) for name in weights)
    assert weights["transformer.h.2.mlp.c_fc"].layer == "transformer.h.2"
    assert weights["transformer.h.2.mlp.c_fc"].block == 2
    assert (weights["transformer.wte"].layer, weights["transformer.wte"].block) == ("transformer.wte", None)
    assert weights["transformer.h.0.mlp.c_fc"].logical.shape == (64, 16)


def test_patterns_leave_modules_out() -> None:
    model = bert("SequenceClassification")
    whole = set(found(model))
    assert whole - set(found(model, exclude=("bert.encoder.layer.0",))) == {
        name for name in whole if name.startswith("bert.encoder.layer.0.")
    }
    assert whole - set(found(model, exclude=("*.pooler", "*.query"))) == {
        "bert.pooler.dense",
        *(f"bert.encoder.layer.{index}.attention.self.query" for index in range(3)),
    }
    assert whole - set(found(model, embedding=False)) == {"bert.embeddings.word_embeddings"}
    assert whole - set(found(model, head=False)) == {"classifier"}
    model.bert.encoder.layer[0].requires_grad_(False)
    assert len(found(model)) == len(whole) - 6, "what is not trained is not rounded"


def test_all_embeddings_of_a_model_that_does_not_say_which_is_of_tokens() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 4), "places": nn.Embedding(3, 4)})
    assert [weight.name for weight in find_weights(model, QuantizeTraining(), None)] == ["tokens", "places"]


def test_rules_of_single_modules() -> None:
    rules = (
        {"modules": ("blocks.*", "out"), "target_bits": 4},
        {"modules": "blocks.1", "start_bits": 6, "quantize_period": 7},
    )
    weights = found(Stack(), start_bits=8, target_bits=5, quantize_period=3, schedule_offset=2, rules=rules)
    schedules = {name: weight.schedule for name, weight in weights.items()}
    assert {(s.offset, s.change_ratio) for s in schedules.values()} == {(2, None)}
    bits = {name: (s.start_bits, s.target_bits, s.period) for name, s in schedules.items()}
    assert bits == {
        "blocks.0.inner": (8, 4, 3),
        "blocks.1.inner": (6, 5, 7),
        "blocks.2.inner": (8, 4, 3),
        "out": (8, 4, 3),
    }


@pytest.mark.parametrize(
    ("shape", "groups", "size"),
    [((6, 8), 1, None), ((6, 8), 3, None), ((6, 8), 6, None), ((6, 8), 12, 4), ((6, 8), 48, 1)],
)
def test_groups_of_deepspeed(shape: tuple[int, int], groups: int, size: int | None) -> None:
    """Where they are parts of rows they are the same elements."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    (weight,) = find_weights(model, QuantizeTraining(quantize_groups=groups), None)
    assert weight.group_size == size
    if size is not None:
        theirs = weight.parameter.detach().view(groups, -1)
        scales = (theirs.amax(1) / 127).maximum(-theirs.amin(1) / 128)
        torch.testing.assert_close(weight.quantized(8).scales.flatten().float(), scales, rtol=1e-3, atol=0)


def test_stored_as_rounded() -> None:
    model = small("gpt2")
    for weight in found(model, group_size=6, q_type="asymmetric").values():
        rounded = weight.rounded(4)
        assert rounded.shape == weight.parameter.shape
        assert rounded.is_contiguous()
        whole = dequantize(weight.quantized(4))
        assert torch.equal(rounded.T if weight.transposed else rounded, whole)
        assert not weight.quantized(4).symmetric


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing there": (nn.Sequential(nn.LayerNorm(2)), {}, "Sequential has no linear layer and no embedding to round"),
    "no such module": (
        Stack(),
        {"exclude": ("out", "ouut")},
        r'exclude: "ouut" names no linear layer and no embedding; there are blocks.0.inner, blocks.1.inner, '
        "blocks.2.inner, out$",
    ),
    "no such module in a rule": (
        Stack(),
        {"rules": ({"modules": ("out", "blocks.3*"), "target_bits": 4},)},
        r'rules\[0\].modules: "blocks.3\*" names no linear layer',
    ),
    "all left out": (Stack(), {"exclude": ("*",)}, "every linear layer and embedding is left out"),
    "no head": (Stack(), {"head": False}, "head: Stack does not say which part is its body.*name its output layers"),
    "half of a tied weight": (
        small("gpt2"),
        {"embedding": False},
        "transformer.wte and lm_head are one weight, and are to be rounded in two ways",
    ),
    "a tied weight with two bits": (
        small("gpt2"),
        {"rules": ({"modules": "lm_head", "target_bits": 4},)},
        "transformer.wte and lm_head are one weight",
    ),
    "groups across rows": (
        Stack(),
        {"quantize_groups": 4},
        r"4 groups of blocks.0.inner \[6, 6\] are neither whole rows nor equal parts of rows: set group_size",
    ),
    "groups across outputs": (
        small("gpt2"),
        {"quantize_groups": 2, "embedding": False, "exclude": ("lm_head",)},
        r"2 groups of transformer.h.0.attn.c_attn, which is stored as \[in, out\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_told(name: str) -> None:
    model, keys, message = BAD[name]
    with pytest.raises(EngineError, match=message):
        find_weights(model, QuantizeTraining(**keys), None)
