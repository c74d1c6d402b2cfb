"""Batches of any form reach the model's forward, whole or in parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.calls import Caller, split

CPU = torch.device("cpu")
X, Y = torch.arange(6.0).reshape(3, 2), torch.ones(3, 2)


class Two(nn.Module):
    """Says how it was called."""

    def forward(self, x: Tensor, scale: Any = 1.0) -> Any:
        """The mean of the product."""
        return (x * scale).mean()


class Loose(nn.Module):
    """Takes any keyword."""

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """A mapping with the loss."""
        return {"loss": sum(value.sum() for value in inputs.values()), "names": torch.tensor(len(inputs))}


@pytest.mark.parametrize(
    "batch",
    [{"x": X, "scale": Y, "unknown": X}, (X, Y), [X, Y], X],
    ids=["mapping", "tuple", "list", "tensor"],
)
def test_calls(batch: Any) -> None:
    caller = Caller(Two(), CPU)
    assert float(caller.loss_of(Two(), batch)) == 2.5
    assert float(caller.outputs.loss) == 2.5


def test_a_forward_of_any_keywords_gets_all() -> None:
    caller = Caller(Loose(), CPU)
    assert float(caller.loss_of(Loose(), {"a": X, "b": Y})) == 21
    assert int(caller.outputs_of(Loose(), {"a": X, "b": Y})["names"]) == 2


def test_a_loss_of_ones_own_sees_outputs_and_batch() -> None:
    caller = Caller(Two(), CPU, lambda outputs, batch: outputs + batch["scale"].sum())
    assert float(caller.loss_of(Two(), {"x": X, "scale": Y})) == 8.5
    assert isinstance(caller.outputs, SimpleNamespace)
    assert float(caller.outputs.outputs) == 2.5


@pytest.mark.parametrize("found", [None, X, 3.0, {"loss": X}], ids=["nothing", "no scalar", "no tensor", "many"])
def test_refuses_what_is_no_loss(found: Any) -> None:
    caller = Caller(Two(), CPU, lambda outputs, batch: found)
    with pytest.raises(EngineError, match=r"^Two has to give a scalar loss, got .*: put labels into the batch"):
        caller.loss_of(Two(), X)


@pytest.mark.parametrize("batch", [{"x": X, "y": Y}, (X, Y), X], ids=["mapping", "tuple", "tensor"])
def test_parts_put_together_are_the_batch(batch: Any) -> None:
    parts = split(batch, 1)
    assert len(parts) == 3
    leaves = [
        [part] if isinstance(part, Tensor) else [*(part.values() if isinstance(part, dict) else part)] for part in parts
    ]
    for at, whole in enumerate(
        [batch] if isinstance(batch, Tensor) else batch.values() if isinstance(batch, dict) else batch
    ):
        assert torch.equal(torch.cat([part[at] for part in leaves]), whole)


def test_what_has_no_rows_goes_to_every_part() -> None:
    first, second = split({"x": X[:2], "scale": torch.tensor(3.0), "flag": True}, 1)
    assert first["flag"] is second["flag"] is True
    assert first["scale"] is second["scale"]
    assert torch.equal(second["x"], X[1:2])


@pytest.mark.parametrize("batch", [{"x": X, "y": Y[:2]}, {"flag": True}, ()], ids=["unequal", "no rows", "empty"])
def test_refuses_rows_that_do_not_agree(batch: Any) -> None:
    with pytest.raises(EngineError, match="a batch needs tensors of one number of rows"):
        split(batch, 1)
