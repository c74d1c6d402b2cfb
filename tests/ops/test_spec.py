"""The facts of a model: derived sizes, weight names, and facts that cannot be."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from ops.spec import HeadSpec, LearnedPositions, RotaryPositions
from tests.ops.specs import spec


def test_weight_shapes_of_a_gated_pre_norm_decoder() -> None:
    shapes = spec(final_norm=True, head=HeadSpec(task="causal_lm", outputs=50)).weight_shapes()
    assert shapes["embed.token.weight"] == (50, 48)
    assert shapes["layers.1.q.weight"] == (48, 48)
    assert shapes["layers.1.k.weight"] == (16, 48)
    assert "layers.0.gate.weight" not in shapes
    assert "layers.0.q.bias" not in shapes
    assert "final_norm.bias" not in shapes
    assert shapes["head.out.weight"] == (50, 48)
    gated = spec(gated=True, qkv_bias=True, norm="layernorm").weight_shapes()
    assert gated["layers.0.gate.weight"] == (40, 48)
    assert gated["layers.0.v.bias"] == (16,)
    assert gated["layers.1.ffn_norm.bias"] == (48,)


def test_a_tied_head_has_no_weight_of_its_own() -> None:
    shapes = spec(
        head=HeadSpec(task="masked_lm", outputs=50, tied=True, bias=True, dense=True, norm=True)
    ).weight_shapes()
    assert "head.out.weight" not in shapes
    assert shapes["head.out.bias"] == (50,)
    assert shapes["head.dense.weight"] == (48, 48)
    assert shapes["head.norm.weight"] == (48,)


def test_an_embedding_of_another_width_is_projected_in_and_out() -> None:
    one = spec(embedding_size=12, head=HeadSpec(task="causal_lm", outputs=50, tied=True))
    assert one.weight_shapes()["embed.project.weight"] == (48, 12)
    assert one.weight_shapes()["head.project.weight"] == (12, 48)
    assert one.embedding_width == 12


def test_parameters_are_counted_once() -> None:
    one = spec(layers=1, positions=LearnedPositions(10, 2), token_types=3)
    layer = 48 * 2 + 48 * 48 + 2 * 16 * 48 + 48 * 48 + 2 * 40 * 48
    assert one.parameters() == 50 * 48 + 10 * 48 + 3 * 48 + layer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 4}, "6 heads are not a multiple of 4 KV heads"),
        ({"windows": (3,)}, "1 windows for 2 layers"),
        ({"positions": RotaryPositions(10, (1.0,) * 5)}, "rotary size 10 does not fit head size 8"),
        ({"positions": RotaryPositions(8, (1.0,) * 3)}, "rotary size 8 does not fit head size 8"),
    ],
)
def test_facts_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_a_spec_is_frozen_and_compares_by_value() -> None:
    assert spec() == spec()
    assert hash(spec()) == hash(spec())
    with pytest.raises(FrozenInstanceError):
        spec().hidden = 3  # type: ignore[misc]
