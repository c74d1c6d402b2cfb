"""What a block adds to its hidden states, read off one run of it; and what cannot be dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.residual import Residual, trace
from tests.engine.training.blocks import WIDTH, Inline, OneBranch, Parallel, PostNorm, PreNorm, TwoBranches


class Odd(nn.Module):
    """A module of four parts whose forward pass a test gives."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.identity = nn.Identity()
        self.run = forward

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        return self.run(self, x, **kwargs)


def read(block: nn.Module, **kwargs: Any) -> Residual:
    torch.manual_seed(1)
    return trace("layers.0", block, block.forward, (torch.randn(2, 3, WIDTH),), kwargs)


@pytest.mark.parametrize(
    ("block", "branches", "extras"),
    [
        (OneBranch(), ("inner",), None),
        (Inline(), (), None),
        (TwoBranches(), ("first", "second"), None),
        (PreNorm(0.5), ("mix", "down"), 0),
        (PostNorm(), ("mix", "down"), None),
        (Parallel(), (), None),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), ("dropout1", "linear2"), None),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True), ("dropout1", "linear2"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds_of_blocks(block: nn.Module, branches: tuple[str, ...], extras: int | None) -> None:
    assert read(block) == Residual(branches, extras)


@pytest.mark.parametrize(
    ("forward", "branches"),
    [
        (lambda m, x: x + 0.5 * m.a(x), ()),
        (lambda m, x: x + m.identity(m.a(m.norm(x))), ("identity",)),
        (lambda m, x: x + m.norm(m.a(x)), ("norm",)),
        (lambda m, x: x + m.a(m.a(x)), ()),  # a hook on `a` would scale twice
        (lambda m, x: (x.view(6, WIDTH) + m.a(x).view(6, WIDTH)).view(x.shape), ()),
        (lambda m, x: m.norm(m.b(m.a(x)) + x), ("b",)),
        (lambda m, x: x.add_(m.a(x)), ("a",)),
        (lambda m, x: x + m.a(x) + 1.0, ("a",)),
        (lambda m, x: torch.add(x, m.a(x), alpha=1), ("a",)),
    ],
)
def test_odd_blocks(forward: Any, branches: tuple[str, ...]) -> None:
    assert read(Odd(forward)).branches == branches


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m.a(x), "adds nothing to its hidden states: not a residual block"),
        (lambda m, x: x, "adds nothing"),
        (lambda m, x: m.norm(x + 0.5 * m.a(x)), "normalises or scales .* not what submodules of its own return"),
        (lambda m, x: m.norm((x + m.a(x)) + m.b(x)), "normalises or scales"),
        (lambda m, x: 0.5 * x + m.a(x), "normalises or scales"),
        (lambda m, x: torch.sub(x, m.a(x)), "adds nothing"),
        (lambda m, x: torch.add(x, m.a(x), alpha=2), "adds nothing"),
        (lambda m, x: x.add_(F.relu(m.a(x))), "in place"),
        (lambda m, x: (x + m.a(x))[..., :4], r"makes \[2, 3, 4\] of hidden states \[2, 3, 8\]"),
        (lambda m, x: (x + m.a(x), m.b(x)), "returns more tensors than its hidden states"),
        (lambda m, x: {"x": x + m.a(x)}, "returns dict: a block returns a tensor"),
        (lambda m, x: (), "returns tuple"),
    ],
)
def test_what_cannot_be_dropped_is_told(forward: Any, message: str) -> None:
    with pytest.raises(EngineError, match=rf"^layers\.0 .*{message}") as caught:
        read(Odd(forward))
    assert "\n" not in str(caught.value)


def test_a_block_without_hidden_states() -> None:
    block = OneBranch()
    with pytest.raises(EngineError, match="without a floating-point tensor"):
        trace("layers.0", block, block.forward, (torch.tensor([1]),), {"mask": None})


def test_caches_of_tuples_are_passed_by() -> None:
    found = read(PreNorm(), use_cache=True)
    assert found.extras == 1
    hidden = torch.zeros(1)
    assert found.passed_through(hidden) == (hidden, None)


class Cache:
    """What tells a Hugging Face cache."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def update(self) -> None:
        self.length += 1


def cached(block: Odd, x: Tensor, cache: Cache | None, give: bool) -> tuple[Any, ...]:
    if cache:
        cache.update()
    return (x + block.a(x), cache) if give else (x + block.a(x),)


def test_a_cache_is_not_filled() -> None:
    cache = Cache()
    assert read(Odd(cached), cache=cache, give=False) == Residual(("a",), 0)
    assert cache.length == 0
    with pytest.raises(EngineError, match=r"returns its cache.*use_cache to false"):
        read(Odd(cached), cache=cache, give=True)


def test_a_run_leaves_no_mark() -> None:
    def forward(block: Odd, x: Tensor) -> Tensor:
        assert not block.training
        assert not torch.is_grad_enabled()
        return x.add_(block.a(x)).add_(block.identity(torch.rand_like(x)))

    block = Odd(forward)
    block.norm.eval()
    x = torch.randn(2, WIDTH, requires_grad=True)
    before, state = x.detach().clone(), torch.get_rng_state()
    trace("layers.0", block, block.forward, (x,), {})
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert block.training
    assert block.a.training
    assert not block.norm.training
    assert not any(module._forward_hooks for module in block.modules())


def test_excluded_modules_are_not_scaled() -> None:
    block = PreNorm()
    x = torch.randn(2, WIDTH)
    found = trace("layers.0", block, block.forward, (x,), {}, {id(block.dropout)})
    assert found.branches == ("mix", "down")
