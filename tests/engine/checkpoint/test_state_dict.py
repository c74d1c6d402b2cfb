"""Live weights: what is offered, and which changes ``version`` sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine.checkpoint import FileSource, StateDictSource
from ops.weights import WeightSource
from tests.engine.checkpoint.builders import refused


class Tied(nn.Module):
    """Embedding and head share their weight; one buffer persists, one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(4), persistent=False)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


def test_offers_what_a_saved_checkpoint_holds(model: Tied) -> None:
    source = StateDictSource(model)
    assert isinstance(source, WeightSource)
    assert list(source.names()) == list(model.state_dict())
    assert "mask" not in source.names()
    for name, tensor in model.state_dict().items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert source.read(name).data_ptr() == tensor.data_ptr()
        assert not source.read(name).requires_grad
    assert source.read("head.weight").data_ptr() == source.read("embed.weight").data_ptr()
    assert torch.equal(source.read("head.weight", slice(2, 5)), model.embed.weight.detach()[2:5])
    assert source.locate("table") == "live model: table"
    for name in ("mask", "embed", "layers.1.weight", "embed.weight.data", ""):
        with pytest.raises(KeyError):
            source.shape(name)


def replace_parameter(model: Tied) -> None:
    model.layers[0].weight = nn.Parameter(torch.zeros(4, 4))


def optimizer_step(model: Tied) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.head(model.embed(torch.tensor([1]))).sum().backward()
    optimizer.step()


def write_through_a_detached_view(model: Tied) -> None:
    model.get_parameter("layers.0.weight").detach()[0].zero_()


def write_in_place(model: Tied) -> None:
    with torch.no_grad():
        model.get_parameter("layers.0.bias").add_(1)


def swap_data(model: Tied) -> None:
    model.embed.weight.data = model.embed.weight.data.clone()


def load(model: Tied) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def add_module(model: Tied) -> None:
    model.layers.append(nn.Linear(4, 4))


SEEN: list[Callable[[Tied], object]] = [
    replace_parameter,
    optimizer_step,
    write_through_a_detached_view,
    write_in_place,
    swap_data,
    load,
    add_module,
    lambda model: model.get_buffer("table").fill_(0),
    lambda model: model.to(torch.bfloat16),
]


@pytest.mark.parametrize("change", SEEN)
def test_version_sees(change: Callable[[Tied], object], model: Tied) -> None:
    source = StateDictSource(model)
    before = source.version
    assert source.version == before
    change(model)
    after = source.version
    assert after != before
    assert source.version == after


def test_version_stays_while_the_model_is_only_used(model: Tied) -> None:
    source = StateDictSource(model)
    before = source.version
    model.head(model.embed(torch.tensor([1]))).sum().backward()
    model.eval()
    source.read("head.weight").clone()
    model.state_dict()
    assert source.version == before


def test_what_version_cannot_see_is_told_by_hand(model: Tied) -> None:
    source = StateDictSource(model)
    before = source.version
    model.get_parameter("layers.0.weight").data.add_(1)
    model.get_parameter("layers.0.bias").detach().numpy()[0] = 5
    assert source.version == before, "seen after all: the docstring of StateDictSource.version can be shortened"
    source.mark_changed()
    assert source.version != before


def test_reads_what_is_there_now(model: Tied) -> None:
    source = StateDictSource(model)
    replace_parameter(model)
    assert source.read("layers.0.weight").eq(0).all()
    model.layers[0] = nn.Linear(4, 2)
    assert source.shape("layers.0.weight") == (2, 4)


def test_no_two_sources_share_a_version(model: Tied) -> None:
    versions = [StateDictSource(model).version for _ in range(3)] + [FileSource({}).version]
    assert len(set(versions)) == 4


def test_a_plain_state_dict(model: Tied) -> None:
    state = dict(model.state_dict())
    source = StateDictSource(state, label="EMA")
    before = source.version
    assert source.locate("table") == "EMA: table"
    state["table"].add_(1)
    assert source.version != before
    before = source.version
    state["table"] = torch.zeros(4)
    assert source.version != before
    assert source.read("table").sum() == 0


def test_inference_tensors_can_be_read() -> None:
    with torch.inference_mode():
        linear = nn.Linear(2, 2)
    source = StateDictSource(linear)
    assert source.version == source.version
    assert torch.equal(source.read("weight"), linear.weight)


def test_extra_state_is_no_tensor(model: Tied) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> str:
            return "not a tensor"

    assert list(StateDictSource(Extra(2, 2, bias=False)).names()) == ["weight"]


def test_weights_without_values() -> None:
    with torch.device("meta"):
        source = StateDictSource(nn.Linear(2, 2))
    assert source.shape("weight") == (2, 2)
    refused(lambda: source.read("weight"), "live model: weight", "meta device")
