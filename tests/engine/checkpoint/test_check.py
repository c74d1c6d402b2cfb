"""Missing, surplus, misshapen and mistyped tensors: all of them at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine.checkpoint import StateDictSource, check_tensors, open_checkpoint
from engine.errors import CheckpointError
from tests.engine.checkpoint import builders

EXPECTED = {
    "embed.weight": (6, 4),
    "layers.0.norm.weight": (4,),
    "layers.0.mlp.weight": (3, 4),
    "layers.0.mlp.bias": (3,),
    "layers.1.scale": (),
}
IGNORED = [re.compile(r"^layers\.\d+\.(mask|ids)$"), re.compile("empty")]


def problems(expected: dict[str, tuple[int, ...]], path: Path) -> list[str]:
    source = open_checkpoint(str(builders.sharded(path / "model"))).source
    with pytest.raises(CheckpointError) as caught:
        check_tensors(source, expected, IGNORED, where="here")
    return str(caught.value).splitlines()


def test_all_is_well(tmp_path: Path) -> None:
    source = open_checkpoint(str(builders.single(tmp_path / "model"))).source
    check_tensors(source, EXPECTED, IGNORED)


def test_one_line_for_each_problem(tmp_path: Path) -> None:
    expected = {
        **EXPECTED,
        "embed.weight": (6, 5),
        "layers.0.mlp.wieght": (3, 4),
        "head.bias": (6,),
        "layers.1.ids": (5,),
    }
    del expected["layers.0.mlp.weight"]
    assert problems(expected, tmp_path) == [
        "here: its tensors are not those of the model: 2 missing, 1 of another shape, 1 of another dtype, 1 surplus",
        "  layers.0.mlp.wieght: missing (shape [3, 4]); did you mean model-00002-of-00003.safetensors: "
        "layers.0.mlp.weight?",
        "  head.bias: missing (shape [6])",
        "  model-00001-of-00003.safetensors: embed.weight: shape [6, 4], expected [6, 5]",
        "  model-00003-of-00003.safetensors: layers.1.ids: torch.int64, expected floating-point numbers",
        "  model-00002-of-00003.safetensors: layers.0.mlp.weight: surplus (shape [3, 4]): the model has no such tensor",
    ]


def test_a_prefix_is_suggested_before_a_similar_name(tmp_path: Path) -> None:
    expected = {f"model.{name}": shape for name, shape in EXPECTED.items()}
    lines = problems(expected, tmp_path)
    assert lines[0].endswith("5 missing, 5 surplus")
    assert "model.layers.0.mlp.bias: missing (shape [3]); did you mean " in lines[4]
    assert lines[4].endswith(": layers.0.mlp.bias?")


def test_a_prefix_goes_before_a_name_that_looks_more_alike() -> None:
    source = StateDictSource({"norm.weights": torch.ones(1), "backbone.encoder.norm.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"did you mean live model: backbone\.encoder\.norm\.weight\?"):
        check_tensors(source, {"norm.weight": (1,)})


def test_only_surplus_is_suggested(tmp_path: Path) -> None:
    lines = problems({**EXPECTED, "layers.0.mlp.bias2": (3,)}, tmp_path)
    assert lines[1:] == ["  layers.0.mlp.bias2: missing (shape [3])"]


def test_ten_are_listed_and_the_rest_counted() -> None:
    source = StateDictSource({f"surplus.{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(CheckpointError) as caught:
        check_tensors(source, {f"needed.{i}": (1,) for i in range(8)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[0].endswith("8 missing, 5 surplus")
    assert lines[9].startswith("  live model: surplus.0")
    assert lines[11] == "  ... and 3 more"


def test_patterns_match_anywhere_unless_anchored() -> None:
    source = StateDictSource({"transformer.h.0.attn.bias": torch.ones(1)})
    check_tensors(source, {}, [re.compile(r"h\.\d+\.attn\.bias$")])
    with pytest.raises(CheckpointError):
        check_tensors(source, {}, [re.compile(r"^h\.\d+\.attn\.bias$")])
