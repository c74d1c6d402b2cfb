"""On a GPU: backward passes run in threads of their own, operators are others, graphs are captured."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from profiler import Counter, ProfilerError, Work, count
from tests.profiler.test_counter import Net, train

pytestmark = pytest.mark.gpu


def counted(model):
    with Counter(model) as counter:
        torch.manual_seed(0)
        loss = F.mse_loss(model(torch.randn(3, 4, device="cuda", requires_grad=True)), torch.zeros(3, 2, device="cuda"))
        loss.backward()
    return counter.counts()


@pytest.mark.parametrize("kind", [None, "reentrant", "plain"])
def test_modules_have_the_products_that_they_have_on_a_cpu(kind):
    with Counter(model := Net(kind)) as counter:
        train(model)
    expected, found = counter.counts(), counted(Net(kind).cuda())
    assert not found.unknown
    for module in expected.root.walk():
        for phase in ("forward", "recompute", "backward"):
            assert found.module(module.name).own_work(phase).macs == module.own_work(phase).macs, (module.name, phase)
        assert found.module(module.name).calls == module.calls


@pytest.mark.parametrize("name", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(name, causal):
    q, k, v = (torch.randn(2, 4, 64, 32, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    products = 2 * 4 * 64 * 64 * 32

    def run():
        with sdpa_kernel(getattr(SDPBackend, name)):
            F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()

    with Counter() as counter:
        run()
    counts = counter.counts()
    with FlopCounterMode(display=False) as theirs:
        run()
    assert not counts.unknown
    assert counts.total("forward").macs == 2 * products
    assert counts.total("backward").macs == (4 if name == "MATH" else 5) * products
    assert 2 * counts.total().macs == theirs.get_total_flops()
    if name != "MATH":
        executed = [work.executed_flops for work in counts.root.operators("forward").values() if work.macs]
        assert executed == [4 * products * (65 if causal else 128) // 128]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(layer):
    module, x = layer(12, 8, 2, bidirectional=True), torch.randn(5, 3, 12)
    _, expected = count(module, x)
    with Counter(module.cuda()) as counter:
        module(x.cuda().requires_grad_())[0].sum().backward()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.total("forward").macs == expected.total().macs
    assert counts.total("forward").executed_flops - counts.total("forward").flops > 0
    assert counts.total("backward").macs == 2 * expected.total().macs


def test_common_layers_are_known():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.Flatten(),
    )
    model = nn.Sequential(model, nn.Linear(72, 16), nn.RMSNorm(16), nn.LayerNorm(16)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with Counter(model) as counter:
        with torch.autocast("cuda", dtype=torch.float16):
            loss = F.cross_entropy(model(torch.randn(2, 3, 8, 8, device="cuda")), torch.tensor([0, 1], device="cuda"))
        scaler = torch.amp.GradScaler()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.total("step") != Work()


def test_capturing_and_graphed_callables_are_refused():
    model, x = nn.Linear(4, 4).cuda(), torch.randn(2, 4, device="cuda")
    model(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with Counter(model), pytest.raises(ProfilerError, match="a CUDA graph is being captured"), torch.cuda.graph(graph):
        model(x)
    graphed = torch.cuda.make_graphed_callables(nn.Linear(4, 4).cuda(), (x,))
    with pytest.raises(ProfilerError, match="replays a CUDA graph"):
        count(graphed, x)


def test_flex_attention_backward():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (torch.randn(1, 2, 256, 32, device="cuda", requires_grad=True) for _ in range(3))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cuda")
    with Counter() as counter:
        flex_attention(q, k, v, block_mask=mask).sum().backward()
    counts = counter.counts()
    assert not counts.unknown
    assert counts.root.operators("forward")["flex_attention"].executed_flops == 4 * 2 * 3 * 128 * 128 * 32
    assert counts.total("backward").macs in (4 * 2 * 256 * 256 * 32, 5 * 2 * 256 * 256 * 32)
