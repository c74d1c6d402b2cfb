"""Qwen2's windows from config files as published: without ``layer_types``, which new transformers write themselves."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import CheckpointError
from engine.families import spec_from_hf

PUBLISHED = {
    "model_type": "qwen2",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
}
USED = {"use_sliding_window": True, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"sliding_window": 7}, ()),
        ({"sliding_window": 7, "use_sliding_window": False, "max_window_layers": 2}, ()),
        ({"sliding_window": 7, **USED}, (None, None, 7, 7)),
        ({"sliding_window": 7, "use_sliding_window": True}, ()),
        ({"sliding_window": None, **USED}, ()),
        (USED, (None, None, 4096, 4096)),
        (
            {"sliding_window": 7, **USED, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
            (7, None, None, None),
        ),
    ],
)
def test_windows(change: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert spec_from_hf(PUBLISHED | change, None, "config.json")[1].windows == windows


@pytest.mark.parametrize("kinds", ["full", ["full_attention"] * 3, [["full_attention"]] * 4, ["sliding_attention"] * 4])
def test_layer_types_that_make_no_sense(kinds: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: layer_types: "):
        spec_from_hf(PUBLISHED | {"layer_types": kinds}, None, "config.json")
