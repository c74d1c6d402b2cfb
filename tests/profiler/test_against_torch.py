"""``flops`` on what both count is what ``torch.utils.flop_counter`` says: forward and backward, module by module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from profiler import Counter, count

IDS = torch.arange(34).reshape(2, 17) % 30


class UNetBlock(nn.Module):
    """Down, middle with attention, up with a skip; group norms, a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.time = nn.Linear(16, 8)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.query, self.key, self.value = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.up = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, image, time):
        entered = F.silu(self.norm(self.enter(image)) + self.time(time)[:, :, None, None])
        low = self.down(entered)
        query, key, value = (layer(low).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        low = low + (torch.softmax(query @ key.transpose(1, 2) / 4, -1) @ value).transpose(1, 2).reshape(low.shape)
        return self.leave(torch.cat([self.up(low), entered], 1))


class Recurrent(nn.Module):
    """An LSTM written with cells, which torch takes apart, and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(12, 8)
        self.gru = nn.GRU(8, 6, num_layers=2, bidirectional=True)

    def forward(self, given):
        state, outputs = None, []
        for step in given:
            state = self.cell(step, state)
            outputs.append(state[0])
        return self.gru(torch.stack(outputs))[0]


def language_model(kind, config, attention):
    model = kind._from_config(config, attn_implementation=attention)
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


TEXT = {"vocab_size": 30, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}


def make(name):
    family, _, attention = name.partition("-")
    if family == "bert":
        return language_model(BertForMaskedLM, BertConfig(**TEXT, max_position_embeddings=32), attention)
    if family == "gpt2":
        config = GPT2Config(vocab_size=30, n_layer=2, n_head=4, n_embd=32, n_positions=32)
        return language_model(GPT2LMHeadModel, config, attention)
    if family == "llama":
        return language_model(LlamaForCausalLM, LlamaConfig(**TEXT, num_key_value_heads=2), attention)
    if family == "vit":
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32
        )
        model = ViTForImageClassification._from_config(config, attn_implementation=attention)
        return model, lambda: model(torch.randn(2, 3, 32, 32)).logits.sum()
    if family == "resnet50":
        model = ResNetForImageClassification(ResNetConfig())
        return model, lambda: model(torch.randn(2, 3, 32, 32)).logits.sum()
    if family == "unet":
        model = UNetBlock()
        return model, lambda: model(torch.randn(2, 3, 16, 16), torch.randn(2, 16)).sum()
    model = Recurrent()
    return model, lambda: model(torch.randn(5, 3, 12)).sum()


MODELS = ["bert-eager", "bert-sdpa", "gpt2-eager", "gpt2-sdpa", "llama-eager", "llama-sdpa", "vit-eager", "vit-sdpa"]
MODELS += ["resnet50", "unet", "lstm"]


def by_operator(counts, phase, known):
    return {name: work.flops for name, work in counts.root.operators(phase).items() if name in known}


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name):
    model, loss = make(name)
    with FlopCounterMode(display=False) as forward:
        result = loss()
    with FlopCounterMode(display=False) as backward:
        result.backward()
    with Counter(model) as counter:
        loss().backward()
    counts = counter.counts()

    assert not counts.unknown
    for phase, theirs in (("forward", forward), ("backward", backward)):
        expected = {str(operator): flops for operator, flops in theirs.get_flop_counts()["Global"].items()}
        assert sum(expected.values()) > 0
        assert by_operator(counts, phase, expected) == expected
    products = [
        work for phase in ("forward", "backward") for work in counts.root.operators(phase).values() if work.macs
    ]
    assert 2 * counts.total().macs <= sum(work.flops for work in products)

    top = type(model).__name__
    modules = {module.name: module for module in counts.root.walk()}
    checked = 0
    for their_name, operators in forward.get_flop_counts().items():
        ours = modules.get(their_name.removeprefix(f"{top}."))
        if ours is not None:
            known = {str(operator) for operator in operators}
            found = {name: work.flops for name, work in ours.operators("forward").items() if name in known}
            assert found == {str(operator): flops for operator, flops in operators.items()}, their_name
            checked += 1
    assert checked > 2


@pytest.mark.parametrize("name", ["gpt2-eager", "unet", "resnet50"])
def test_backward_belongs_to_the_module_of_the_forward(name):
    """A module's weight gradient and input gradient each take the products of its forward pass; the first module of
    all needs no input gradient."""
    model, loss = make(name)
    with Counter(model) as counter:
        loss().backward()
    first = True
    for module in counter.counts().root.walk():
        if module.kind in ("Linear", "Conv2d", "ConvTranspose2d", "Conv1D"):
            passes = 1 if first and name != "gpt2-eager" else 2
            shared = module.name == "time"  # its input needs no gradient either
            assert module.own_work("backward").macs == (1 if shared else passes) * module.own_work("forward").macs
            assert module.own_work("forward").macs > 0, module.name
            first = False


def test_every_operation_of_a_model_lies_in_its_tree():
    model, loss = make("llama-sdpa")
    with Counter(model) as counter:
        loss().backward()
    counts = counter.counts()
    assert counts.root.own_work("backward").flops == 0
    assert counts.root.own_work("forward").flops == 0
    assert counts.total("forward").flops == counts.module("LlamaForCausalLM").total("forward").flops > 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_weight_gradient_in_groups_is_where_torch_counts_too_much(groups):
    """Its products are those of the forward pass; torch takes the weight for dense, ``groups`` times as many."""
    layer, x = nn.Conv2d(4, 8, 3, groups=groups, bias=False), torch.randn(2, 4, 8, 8)
    result = layer(x)
    with FlopCounterMode(display=False) as theirs:
        result.sum().backward()
    with Counter(layer) as counter:
        layer(x).sum().backward()
    total = counter.counts().total
    assert total("backward").macs == total("forward").macs
    assert theirs.get_total_flops() == groups * 2 * total("backward").macs


def test_an_lstm_in_one_operator_is_the_sum_of_its_cells():
    """oneDNN's layer, of which torch counts nothing, costs what the decomposed cells cost."""
    layer, cell = nn.LSTM(12, 8), nn.LSTMCell(12, 8)
    given = torch.randn(5, 3, 12)

    def by_cells():
        state = None
        for step in given:
            state = cell(step, state)
        return state[0]

    _, whole = count(layer, given)
    _, apart = count(by_cells)
    assert "aten.mkldnn_rnn_layer" in whole.root.operators()
    for field in ("flops", "macs", "executed_flops"):
        assert getattr(whole.total(), field) == getattr(apart.total(), field)


def test_the_fast_path_of_an_encoder_layer_is_the_sum_of_its_parts():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    given = torch.randn(2, 5, 16)
    with torch.no_grad():
        _, fast = count(layer, given)
    _, slow = count(layer, given)
    assert list(fast.root.operators()) == ["aten._transformer_encoder_layer_fwd"]
    assert fast.total().macs == slow.total().macs
    # Softmax of the scores and scaling of the queries, which a fused attention does not count; the bias of q, k and v,
    # which the slow path adds with an operator of its own.
    inside, bias = 5 * 2 * 2 * 25 + 2 * 5 * 16, 2 * 5 * 3 * 16
    assert fast.total().flops == slow.total().flops + inside - bias
    assert fast.total().executed_flops == slow.total().executed_flops + inside
