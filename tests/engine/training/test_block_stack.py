"""The stack of residual blocks: the largest, or the one that is named; and what is said where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.errors import EngineError
from engine.training.block_stack import find_stack
from tests.engine.training.blocks import Inline, OneBranch, PostNorm, Stacked


class Stage(nn.Module):
    """Some blocks, and something small of its own."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(PostNorm(), PostNorm())
        self.own = own


class Mixture(nn.Module):
    """A layer that mostly consists of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8)) for _ in range(4))


def model(**parts: nn.Module) -> nn.Module:
    return nn.ModuleDict(parts)


def test_the_largest_stack_is_found() -> None:
    found = find_stack(model(few=Stacked(OneBranch, 2), many=Stacked(Inline, 5)))
    assert found.paths == ("many.blocks",)
    assert found.names == tuple(f"many.blocks.{index}" for index in range(5))
    assert str(found) == "many.blocks (5 Inline)"


def test_a_sequential_that_is_the_whole_model() -> None:
    found = find_stack(nn.Sequential(OneBranch(), OneBranch()))
    assert found.paths == ("",)
    assert found.names == ("0", "1")


def test_size_counts_and_not_number() -> None:
    wide = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    assert find_stack(model(many=Stacked(OneBranch, 5), wide=wide)).paths == ("wide",)


def test_shared_parameters_count_once() -> None:
    tied = nn.ModuleList(OneBranch() for _ in range(4))
    for block in tied:
        block.inner.weight = tied[0].inner.weight
    assert find_stack(model(tied=tied, own=Stacked(Inline, 2))).paths == ("own.blocks",)


def test_stages_give_way_to_their_blocks() -> None:
    stages = nn.ModuleList(Stage(nn.Linear(8, 2)) for _ in range(3))
    found = find_stack(model(stages=stages, other=Stacked(PostNorm, 2)))
    assert found.paths == ("stages.0.blocks", "stages.1.blocks", "stages.2.blocks")
    assert found.names[2] == "stages.1.blocks.0"
    assert len(found.blocks) == 6
    assert found.class_name == "PostNorm"


def test_stages_of_nothing_but_blocks_need_no_norms() -> None:
    stages = nn.ModuleList(nn.Sequential(OneBranch(), OneBranch()) for _ in range(2))
    assert find_stack(model(stages=stages)).paths == ("stages.0", "stages.1")


def test_layers_with_a_lot_of_their_own_are_no_stages() -> None:
    layers = nn.ModuleList(Stage(nn.Linear(64, 64)) for _ in range(3))
    assert find_stack(model(layers=layers)).paths == ("layers",)


def test_experts_are_not_the_stack() -> None:
    layers = nn.ModuleList(Mixture() for _ in range(2))
    assert find_stack(model(layers=layers)).paths == ("layers",)


@pytest.mark.parametrize(
    "none",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.ModuleList([OneBranch()]),
        nn.ModuleList([OneBranch()] * 3),
        nn.ModuleList([OneBranch(), Inline()]),
        nn.ModuleList(nn.Sequential(nn.ReLU()) for _ in range(3)),
    ],
    ids=["no list", "no submodules", "one", "one thrice", "two classes", "no parameters"],
)
def test_no_stack_is_an_error(none: nn.Module) -> None:
    with pytest.raises(EngineError, match=r"^no stack of residual blocks in ModuleDict: needed is .* by its path$"):
        find_stack(model(some=none))


def test_paths_name_it() -> None:
    both = model(few=Stacked(OneBranch, 2), many=Stacked(Inline, 5))
    assert find_stack(both, "few.blocks").paths == ("few.blocks",)
    joined = find_stack(both, ["few.blocks", "many.blocks"])
    assert len(joined.blocks) == 7
    assert joined.names[2] == "many.blocks.0"
    assert find_stack(model(one=both), "few.blocks").paths == ("one.few.blocks",), "from further in"


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (
            "layers",
            r'no module "layers" in ModuleDict; stacks here: few.blocks \(2 OneBranch\), many.blocks \(5 Inline\)$',
        ),
        ("few.start", r'"few.start" is a Linear and no stack: needed is .* stacks here: few.blocks'),
        ("few.blocks.0", r'"few.blocks.0" is a OneBranch and no stack'),
        ("blocks", r'"blocks" may be any of few.blocks, many.blocks: give the whole path'),
        (["few.blocks", "few.blocks"], "share blocks"),
        ([], "paths is empty"),
    ],
)
def test_a_wrong_path_is_told(paths: str | list[str], message: str) -> None:
    both = model(few=Stacked(OneBranch, 2), many=Stacked(Inline, 5))
    with pytest.raises(EngineError, match=message) as caught:
        find_stack(both, paths)
    assert "\n" not in str(caught.value)


def test_compiled_blocks_keep_their_name() -> None:
    blocks = nn.ModuleList(torch.compile(OneBranch(), backend="eager") for _ in range(2))
    assert str(find_stack(model(layers=blocks))) == "layers (2 OneBranch)"
