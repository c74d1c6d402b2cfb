"""Encoders of the generic set through the engine: its batches take the static buffers (on a GPU: the graphs)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from engine import Engine
from ops.generic.encoder import WalkGraphs
from ops.plan import StepInputs
from tests.engine.tiny import tiny
from tests.ops.devices import DEVICES

# What fills a bucket up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [0, 0, 0, 11]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize("device", DEVICES)
def test_batches_and_changed_weights(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids on the device and on the host; a live model whose weights change between two calls."""
    seen: list[tuple[bool, tuple[int, ...]]] = []
    step = WalkGraphs.step

    def seeing(self: WalkGraphs, inputs: StepInputs, *, head: bool) -> tuple[Tensor, Tensor | None]:
        seen.append((inputs.checked, inputs.lengths))
        return step(self, inputs, head=head)

    monkeypatch.setattr(WalkGraphs, "step", seeing)
    model = copy.deepcopy(tiny("bert", "embedding").model).to(device)
    options = {"device": device, "precision": "fp32"}
    ours = Engine({**options, "kernels": "generic"}, model=model)
    eager = Engine({**options, "kernels": "eager"}, model=model)
    ids, mask = IDS.to(device), MASK.to(device)
    for change in (1.0, 1.5):
        with torch.no_grad():
            model.get_parameter("encoder.layer.0.output.dense.weight").mul_(change)
        wanted = eager(ids, attention_mask=mask)
        for found in (
            ours(ids, attention_mask=mask),
            ours({"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()}),
        ):
            assert found.last_hidden_state.device.type == device
            for name in ("last_hidden_state", "pooler_output"):
                assert torch.allclose(getattr(found, name), getattr(wanted, name), atol=3e-4)
    assert seen == [(False, (4, 2, 1)), (True, (4, 2, 1))] * 2
