"""Exact against closed forms over random shapes: products, convolutions, attention, recurrent layers, and the rest."""

from __future__ import annotations

from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from profiler import Counter, count

size = st.integers(1, 6)
examples = settings(max_examples=15, deadline=None, derandomize=True)


def work(function, *operators, phase="forward"):
    """Work of the operators of that name (all that cost anything if none is given) in one call, with its backward."""
    with Counter() as counter:
        result = function()
        result = result[0] if isinstance(result, tuple) else result
        if result.requires_grad:
            result.sum().backward()
    found = counter.counts().root.operators(phase)
    return sum(value.flops for name, value in found.items() if not operators or name.removeprefix("aten.") in operators)


def macs(function, phase=None):
    with Counter() as counter:
        result = function()
        result = result[0] if isinstance(result, tuple) else result
        if result.requires_grad:
            result.sum().backward()
    return counter.counts().total(phase).macs


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


# ---- products ----


@examples
@given(size, size, size, size)
def test_products(b, m, n, k):
    left, right = torch.randn(b, m, k), torch.randn(b, k, n)
    once = 2 * m * n * k
    assert work(lambda: left[0] @ right[0]) == once
    assert work(lambda: torch.bmm(left, right)) == b * once
    assert work(lambda: torch.addmm(torch.randn(n), left[0], right[0]), "addmm") == once
    assert work(lambda: torch.baddbmm(torch.randn(b, m, n), left, right, beta=0.5), "baddbmm") == b * once
    assert work(lambda: torch.addbmm(torch.randn(m, n), left, right), "addbmm") == b * once
    assert work(lambda: left[0] @ right[0, :, 0]) == 2 * m * k  # matrix @ vector
    assert work(lambda: torch.dot(left[0, 0], right[0, :, 0])) == 2 * k
    assert work(lambda: torch.addmv(torch.randn(m), left[0], right[0, :, 0]), "addmv") == 2 * m * k


wide = st.integers(2, 6)


@examples
@given(wide, wide, wide, wide)
def test_einsum(b, m, n, k):
    """A sum over one element is no product for torch, which multiplies then: sizes from 2 on."""
    left, right = torch.randn(b, m, k), torch.randn(b, k, n)
    for function in (
        lambda: torch.einsum("bmk,bkn->bmn", left, right),
        lambda: torch.einsum("bmk,bkn->mn", left, right),
        lambda: torch.einsum(left, [0, 1, 2], right, [0, 2, 3], [0, 1, 3]),  # operands as lists
    ):
        assert work(function) == 2 * b * m * n * k
        assert macs(function) == b * m * n * k


@examples
@given(size, size, size, size, size)
def test_broadcast_products_forward_and_backward(a, b, m, n, k):
    left, right = leaf(a, 1, m, k), leaf(b, k, n)
    once = a * b * m * n * k
    assert macs(lambda: left @ right, "forward") == once
    assert macs(lambda: left @ right, "backward") == 2 * once


@examples
@given(size, size, size, size, st.booleans())
def test_linear(a, b, n, k, bias):
    layer, x = nn.Linear(k, n, bias=bias), leaf(a, b, k)
    _, counts = count(layer, x)
    assert counts.total().flops == 2 * a * b * n * k
    assert counts.total().macs == a * b * n * k
    assert counts.total().executed_flops == 2 * a * b * n * k + bias * a * b * n
    assert macs(lambda: layer(x), "backward") == 2 * a * b * n * k


@examples
@given(size, size, size, st.sampled_from([0, 0.5, 1]), st.sampled_from([1, 2]))
def test_bias_and_factors_of_addmm_are_executed(m, n, k, beta, alpha):
    _, counts = count(torch.addmm, torch.randn(m, n), torch.randn(m, k), torch.randn(k, n), beta=beta, alpha=alpha)
    extra = (beta != 0) + (beta == 0.5) + (alpha == 2)
    assert counts.total().executed_flops - counts.total().flops == extra * m * n


@examples
@given(size, size, size, size)
def test_bilinear(b, i, j, o):
    layer = nn.Bilinear(i, j, o, bias=False)
    assert work(lambda: layer(torch.randn(b, i), torch.randn(b, j)), "_trilinear") == 2 * b * o * (i * j + j)


# ---- convolutions ----

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_convolutions(data):
    axes, transposed = data.draw(st.sampled_from(sorted(CONVOLUTIONS)))
    groups = data.draw(st.integers(1, 3))
    inside, outside, batch, kernel = (data.draw(st.integers(1, 3)) for _ in range(4))
    stride, padding, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 1)), data.draw(st.integers(1, 2))
    bias = data.draw(st.booleans())
    layer = CONVOLUTIONS[axes, transposed](
        groups * inside, groups * outside, kernel, stride, padding, groups=groups, bias=bias, dilation=dilation
    )
    x = leaf(batch, groups * inside, *(data.draw(st.integers(7, 8)) for _ in range(axes)))
    with Counter() as counter:
        y = layer(x)
        y.backward(torch.ones_like(y))
    found = counter.counts().root
    forward = found.operators("forward")["aten.convolution"]
    backward = found.operators("backward")["aten.convolution_backward"]
    positions = prod((x if transposed else y).shape[2:])
    each = batch * positions * groups * inside * outside * kernel**axes
    assert (forward.flops, forward.macs) == (2 * each, each)
    assert forward.executed_flops == 2 * each + bias * y.numel()
    assert (backward.flops, backward.macs) == (4 * each, 2 * each)
    assert backward.executed_flops == 4 * each + bias * y.numel()


def test_the_weights_of_a_convolution_alone():
    layer = nn.Conv2d(3, 5, 3)
    assert macs(lambda: layer(torch.randn(2, 3, 8, 8)), "backward") == 2 * 36 * 3 * 5 * 9  # no gradient of the input


# ---- attention ----


@settings(max_examples=25, deadline=None, derandomize=True)
@given(size, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), size, st.booleans())
def test_attention(b, kv, group, sq, sk, d, causal):
    heads = kv * group
    q, k, v = leaf(b, heads, sq, d), leaf(b, kv, sk, d), leaf(b, kv, sk, d)
    pairs = sum(j <= i for i in range(sq) for j in range(sk)) if causal else sq * sk
    with Counter() as counter:
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=causal, enable_gqa=group > 1)
        y.sum().backward()
    total = counter.counts().total
    assert total("forward").macs == 2 * b * heads * sq * sk * d
    fused = "flash" in " ".join(counter.counts().root.operators())
    assert total("backward").macs == (5 if fused else 4) * b * heads * sq * sk * d
    if fused:
        found = counter.counts().root.operators("forward")["aten._scaled_dot_product_flash_attention_for_cpu"]
        assert found.flops == 4 * b * heads * sq * sk * d
        assert found.executed_flops == 4 * b * heads * pairs * d


@examples
@given(size, st.integers(1, 3), st.integers(1, 9), size)
def test_causal_attention_executes_the_triangle(b, heads, s, d):
    q = leaf(b, heads, s, d)
    with Counter() as counter:
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    total = counter.counts().total
    names = counter.counts().root.operators
    each = b * heads * d * s * (s + 1) // 2
    assert names("forward")["aten._scaled_dot_product_flash_attention_for_cpu"].executed_flops == 4 * each
    assert names("backward")["aten._scaled_dot_product_flash_attention_for_cpu_backward"].executed_flops == 10 * each
    assert total("forward").macs == 2 * b * heads * s * s * d
    assert total("backward").macs == 5 * b * heads * s * s * d


def test_attention_by_products_counts_the_same_products():
    q = torch.randn(2, 3, 7, 4)
    with sdpa_kernel(SDPBackend.MATH):
        _, counts = count(F.scaled_dot_product_attention, q, q, q, is_causal=True)
    assert "aten.bmm" in counts.root.operators()
    assert counts.total().macs == 2 * 2 * 3 * 7 * 7 * 4


@pytest.mark.parametrize("name", ["efficient", "flash", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_a_gpu_on_meta_tensors(name, causal):
    q, v = torch.empty(2, 3, 8, 4, device="meta"), torch.empty(2, 3, 8, 6, device="meta")
    function = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention")
    extra = {"flash": (q, q, q, 0.0, causal), "efficient": (q, q, v, None, True, 0.0, causal)}
    _, counts = count(function, *extra.get(name, (q, q, v, None, True, 0.0, causal)))
    values = 4 if name == "flash" else 6
    pairs = 8 * 9 // 2 if causal else 64
    assert counts.total().flops == 2 * 6 * 64 * (4 + values)
    assert counts.total().executed_flops == 2 * 6 * pairs * (4 + values)


@pytest.mark.parametrize("blocks", [None, "causal"])
def test_flex_attention_executes_the_blocks_of_its_mask(blocks):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, kv = torch.randn(2, 4, 32, 8), torch.randn(2, 2, 32, 8)
    mask = None
    if blocks:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 32, 32, device="cpu", BLOCK_SIZE=8)
    _, counts = count(lambda: flex_attention(q, kv, kv, block_mask=mask, enable_gqa=True))
    found = counts.root.operators()["flex_attention"]
    assert not counts.unknown
    assert found.flops == 4 * 2 * 4 * 32 * 32 * 8
    assert found.executed_flops == 4 * 2 * 4 * 8 * (10 * 8 * 8 if blocks else 32 * 32)  # 10 of 16 blocks


@examples
@given(st.lists(st.tuples(size, size), min_size=1, max_size=4), st.sampled_from([0, 1, 2]))
def test_attention_of_sequences_end_to_end(lengths, kind):
    """Memory-efficient attention called directly; causal from the upper left (1) or the lower right corner (2)."""
    from profiler.formulas import cost_of
    from profiler.formulas.call import Call

    offsets = [torch.tensor([0, *(pair[side] for pair in lengths)]).cumsum(0) for side in (0, 1)]
    q, k = (torch.randn(1, int(ends[-1]), 2, 4) for ends in offsets)
    longest = [max(pair[side] for pair in lengths) for side in (0, 1)]
    op = torch.ops.aten._efficient_attention_forward.default
    cost = cost_of(Call(op, (q, k, k, None, *offsets, *longest, 0.0, kind), {}, (q,)))
    shifts = [(rows, columns, columns - rows if kind == 2 else 0) for rows, columns in lengths]
    kept = [kind == 0 or j <= i + shift for rows, columns, shift in shifts for i in range(rows) for j in range(columns)]
    assert cost.flops == 2 * 2 * 8 * len(kept)
    assert cost.executed_flops == 2 * 2 * 8 * sum(kept)


# ---- recurrent layers ----

RECURRENT = {
    "LSTM": (nn.LSTM, nn.LSTMCell, 4, 22),
    "GRU": (nn.GRU, nn.GRUCell, 3, 16),
    "RNN": (nn.RNN, nn.RNNCell, 1, 2),
}


@examples
@given(st.sampled_from(sorted(RECURRENT)), size, size, size, size, st.integers(1, 2), st.booleans(), st.booleans())
def test_recurrent_layers(kind, steps, batch, inside, hidden, layers, both, bias):
    layer, _, gates, pointwise = RECURRENT[kind]
    module = layer(inside, hidden, layers, bidirectional=both, bias=bias)
    _, counts = count(module, torch.randn(steps, batch, inside))
    directions = 1 + both
    inputs = [inside] + [directions * hidden] * (layers - 1)
    products = sum(directions * steps * batch * gates * hidden * (width + hidden) for width in inputs)
    units = layers * directions * steps * batch * hidden
    assert counts.total().macs == products
    assert counts.total().flops == 2 * products + pointwise * units
    assert counts.total().executed_flops - counts.total().flops == 2 * bias * gates * units


@examples
@given(st.sampled_from(sorted(RECURRENT)), size, size, size)
def test_recurrent_cells(kind, batch, inside, hidden):
    _, cell, gates, pointwise = RECURRENT[kind]
    _, counts = count(cell(inside, hidden), torch.randn(batch, inside))
    assert counts.total().macs == batch * gates * hidden * (inside + hidden)
    assert counts.total().flops == 2 * counts.total().macs + pointwise * batch * hidden


@pytest.mark.parametrize("kind", sorted(RECURRENT))
def test_the_backward_pass_of_recurrent_layers(kind):
    module, x = RECURRENT[kind][0](5, 4), leaf(6, 3, 5)
    forward = macs(lambda: module(x), "forward")
    # Both gradients of both products; cells on their own need none of the first state, which is zero.
    first = 0 if kind == "LSTM" else 3 * 4 * RECURRENT[kind][2] * 4
    assert macs(lambda: module(x), "backward") == 2 * forward - first


# ---- the rest ----


@examples
@given(size, size, size, st.booleans())
def test_norms(b, n, d, affine):
    x = leaf(b, n, d)
    assert work(lambda: nn.LayerNorm(d, elementwise_affine=affine)(x), "native_layer_norm") == (
        (5 + 2 * affine) * b * n * d + 4 * b * n
    )
    group = nn.GroupNorm(n, 2 * n, affine=affine)
    assert work(lambda: group(leaf(b, 2 * n, d)), "native_group_norm") == (5 + 2 * affine) * b * 2 * n * d + 4 * b * n
    rms = nn.RMSNorm(d, elementwise_affine=affine)  # pow, mean (with its quotient), eps, rsqrt, product, weight
    names = ("pow", "mean", "add_", "rsqrt", "mul")
    assert work(lambda: rms(x), *names) == (3 + affine) * b * n * d + 3 * b * n
    if b * d > 1:
        norm = nn.BatchNorm1d(n, affine=affine, track_running_stats=False)
        assert work(lambda: norm(x), "native_batch_norm") == (5 + 2 * affine) * b * n * d + 4 * n
    trained = nn.BatchNorm1d(n, affine=affine).eval()
    assert work(lambda: trained(x), "native_batch_norm") == (2 + 2 * affine) * b * n * d + 2 * n


@examples
@given(size, size, size)
def test_softmax_and_reductions(a, b, c):
    x = torch.randn(a, b, c)
    n = a * b * c
    assert work(lambda: x.softmax(1)) == 5 * n
    assert work(lambda: x.log_softmax(1)) == 5 * n + a * c
    assert work(lambda: leaf(a, b, c).softmax(-1), "_softmax_backward_data", phase="backward") == 4 * n
    assert work(lambda: x.sum(1)) == n
    assert work(lambda: x.mean()) == n + 1
    assert work(lambda: x.amax(0)) == n
    assert work(lambda: x.logsumexp(2)) == 4 * n + 2 * a * b
    assert work(lambda: x.cumsum(0)) == n
    assert work(lambda: torch.linalg.vector_norm(x, dim=-1)) == 2 * n + a * b


ELEMENTWISE = {
    torch.exp: 1,
    torch.tanh: 1,
    torch.sigmoid: 4,
    F.silu: 5,
    F.relu: 1,
    F.gelu: 5,
    torch.neg: 1,
    torch.sqrt: 1,
    torch.isnan: 1,
    torch.clone: 0,
    torch.zeros_like: 0,
    torch.Tensor.double: 0,
    torch.Tensor.t: 0,
}


@examples
@given(st.sampled_from(list(ELEMENTWISE)), size, size)
def test_elementwise(function, a, b):
    assert work(lambda: function(torch.randn(a, b))) == ELEMENTWISE[function] * a * b


@examples
@given(size, size)
def test_elementwise_operators_of_two(a, b):
    x, row = torch.randn(a, b), torch.randn(b)
    for function in (torch.add, torch.mul, torch.sub, torch.div, torch.maximum, torch.lt):
        assert work(lambda function=function: function(x, row)) == a * b
    assert work(lambda: x + 1) == a * b
    assert work(lambda: torch.add(x, row, alpha=2)) == 2 * a * b
    assert work(lambda: x.clone().mul_(row)) == a * b
    assert work(lambda: x.clamp(min=0)) == a * b
    assert work(lambda: x.clamp(0, 1)) == 2 * a * b
    assert work(lambda: torch.arange(a * b) + 1) == 0  # integers are no floating point numbers
    assert (
        sum(work.flops for work in count(torch._foreach_mul, [x, row], 2.0)[1].root.operators().values()) == a * b + b
    )


@examples
@given(size, st.integers(2, 6), st.integers(2, 6))
def test_losses(b, n, d):
    x, y = torch.randn(b, n), torch.randn(b, n)
    assert work(lambda: F.mse_loss(x, y)) == 3 * b * n + 1
    assert work(lambda: F.mse_loss(x, y, reduction="none")) == 2 * b * n
    assert work(lambda: F.mse_loss(x, y, reduction="sum")) == 3 * b * n
    assert work(lambda: F.l1_loss(x, y)) == 3 * b * n + 1  # difference, absolute value; sum
    assert work(lambda: F.huber_loss(x, y)) == 6 * b * n + 1
    classes = torch.zeros(b, dtype=torch.long)
    assert work(lambda: F.cross_entropy(x, classes)) == 5 * b * n + b + 2 * b + 1  # log_softmax; the classes' own
    assert work(
        lambda: F.binary_cross_entropy_with_logits(x, y.sigmoid().detach()), "binary_cross_entropy_with_logits"
    ) == (10 * b * n + 1)


@examples
@given(size, size, size, size)
def test_embeddings(b, n, rows, d):
    ids = torch.zeros(b, n, dtype=torch.long)
    table = leaf(rows, d)
    assert work(lambda: F.embedding(ids, table), "embedding") == 0
    assert work(lambda: F.embedding(ids, table), "embedding_dense_backward", phase="backward") == b * n * d
    assert work(lambda: F.embedding_bag(ids, table.detach(), mode="sum")) == b * n * d
    assert work(lambda: F.embedding_bag(ids, table.detach(), mode="mean")) == b * n * d + b * d
    weights = torch.rand(b, n)
    assert work(lambda: F.embedding_bag(ids, table.detach(), per_sample_weights=weights, mode="sum")) == 2 * b * n * d


@examples
@given(size, size)
def test_pooling(b, c):
    x = leaf(b, c, 6, 6)
    assert work(lambda: F.max_pool2d(x, 2), "max_pool2d_with_indices") == 4 * b * c * 9
    assert work(lambda: F.avg_pool2d(x, (2, 3)), "avg_pool2d") == 7 * b * c * 6
    assert work(lambda: F.adaptive_avg_pool2d(x, 2), "_adaptive_avg_pool2d") == b * c * (36 + 4)
    assert work(lambda: F.interpolate(x, scale_factor=2, mode="bilinear"), "upsample_bilinear2d") == 7 * b * c * 144
