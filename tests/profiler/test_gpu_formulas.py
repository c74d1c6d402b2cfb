"""Operators that only a GPU has, as their arguments would be: formulas against closed forms, without running them."""

from __future__ import annotations

import pytest
import torch

from profiler import count
from profiler.formulas import cost_of
from profiler.formulas.call import Call

aten = torch.ops.aten


def t(*shape):
    return torch.empty(shape)


def cost(op, *args, result=None, **kwargs):
    return cost_of(Call(op.default, args, kwargs, result))


GATES, POINTWISE = {0: 1, 1: 1, 2: 4, 3: 3}, {0: 2, 1: 2, 2: 22, 3: 16}


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("packed", [False, True])
def test_cudnn_layers(mode, packed):
    """Two layers in two directions; sequences as [T, B, I] or packed end to end."""
    gates, hidden, inside = GATES[mode], 5, 7
    weights, products = [], 0
    for width in (inside, 2 * hidden):
        for _ in range(2):
            weights += [t(gates * hidden, width), t(gates * hidden, hidden), t(gates * hidden), t(gates * hidden)]
            products += 12 * gates * hidden * (width + hidden)
    x = t(12, inside) if packed else t(4, 3, inside)
    state = t(4, 3, hidden)
    shared = (mode, hidden, 0, 2, False, 0.0, True, True, [], None)
    forward = cost(aten._cudnn_rnn, x, weights, 4, None, state, state, *shared, result=(t(4, 3, 10),))
    units = 12 * 4 * hidden
    assert forward.macs == products
    assert forward.flops == 2 * products + POINTWISE[mode] * units
    assert forward.executed_flops - forward.flops == 2 * gates * units
    rest = (t(4, 3, 10), t(4, 3, 10), None, None, *shared, t(9))
    for mask, times in (([True, True, True, True], 2), ([True, True, True, False], 1)):
        back = cost(aten._cudnn_rnn_backward, x, weights, 4, t(1), state, state, *rest, mask, result=(x,))
        assert back.macs == times * products


def test_fused_cells():
    gates, state = t(3, 20), t(3, 5)
    lstm = cost(aten._thnn_fused_lstm_cell, gates, gates, state, t(20), t(20), result=(state, state, gates))
    assert (lstm.flops, lstm.executed_flops, lstm.macs) == (22 * 15, 22 * 15 + 2 * 60, 0)
    gru = cost(aten._thnn_fused_gru_cell, t(3, 15), t(3, 15), state, result=(state, t(3, 25)))
    assert (gru.flops, gru.executed_flops) == (16 * 15, 16 * 15)


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_backward(name, causal):
    q, k, v = t(2, 6, 8, 4), t(2, 3, 8, 4), t(2, 3, 8, 4)
    n = t(0)
    rest = {
        "flash": (q, n, n, n, 8, 8, 0.0, causal, n, n),
        "cudnn": (q, n, n, n, n, n, n, 8, 8, 0.0, causal),
        "efficient": (None, q, n, n, n, 0.0, [True] * 4, causal),
    }[name]
    found = cost(getattr(aten, f"_scaled_dot_product_{name}_attention_backward"), q, q, k, v, *rest, result=(q, k, v))
    pairs = 36 if causal else 64
    assert (found.flops, found.macs) == (2 * 12 * 64 * 5 * 4, 12 * 64 * 5 * 4)
    assert found.executed_flops == 2 * 12 * pairs * 5 * 4


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_of_sequences_end_to_end(causal):
    """Without the fifth argument set, [B, S, H, D]; the mask ends in the lower right corner."""
    x, offsets = t(7, 2, 4), torch.tensor([0, 3, 7])
    rest = (offsets, offsets, 4, 4, 0.0, causal, False)
    found = cost(aten._flash_attention_forward, x, x, x, *rest, result=(x,))
    assert found.flops == 2 * 2 * (9 + 16) * 8
    assert found.executed_flops == 2 * 2 * (6 + 10 if causal else 25) * 8
    y = t(2, 7, 3, 4)
    found = cost(aten._flash_attention_forward, y, y, y, None, None, 7, 7, 0.0, causal, False, result=(y,))
    assert found.flops == 2 * 6 * 49 * 8
    back = cost(
        aten._flash_attention_backward, y, y, y, y, y, t(0), None, None, 7, 7, 0.0, causal, t(0), t(0), result=y
    )
    assert back.flops == 2 * 6 * 49 * 20


def test_norms():
    x, row, channel = t(2, 3, 8), t(8), t(3)
    rms = cost(aten._fused_rms_norm, x, [8], row, 1e-6, result=(x, t(2, 3, 1)))
    assert rms.flops == 4 * 48 + 3 * 6
    back = cost(aten._fused_rms_norm_backward, x, x, [8], t(2, 3, 1), row, [True, True], result=(x, row))
    assert back.flops == (7 + 2) * 48
    batch = cost(aten.cudnn_batch_norm, x, channel, channel, channel, channel, True, 0.1, 1e-5, result=(x, channel))
    assert batch.flops == 7 * 48 + (4 + 6) * 3
    empty = t(0)
    back = cost(
        aten.cudnn_batch_norm_backward, x, x, channel, *[channel] * 4, 1e-5, empty, result=(x, channel, channel)
    )
    assert back.flops == (10 + 2 + 1) * 48


def test_products():
    a, b = t(6, 4), t(4, 5)
    assert cost(aten._int_mm, a, b, result=t(6, 5)).macs == 120
    fused = cost(aten._addmm_activation, t(5), a, b, use_gelu=True, result=t(6, 5))
    assert (fused.flops, fused.executed_flops) == (240, 240 + 10 * 30)
    offsets = torch.tensor([2, 6])
    assert cost(aten._grouped_mm, a, t(2, 4, 5), offsets, result=t(6, 5)).macs == 120  # rows shared out
    assert cost(aten._grouped_mm, t(4, 6), t(6, 5), offsets, result=t(2, 4, 5)).macs == 120  # K shared out
    assert cost(aten._grouped_mm, t(2, 3, 4), t(2, 4, 5), result=t(2, 3, 5)).macs == 120
    assert cost(aten._grouped_mm, t(2, 6, 4), t(4, 5), offsets, result=t(6, 5)).macs == 120  # columns shared out
    assert cost(aten._weight_int8pack_mm, a, t(5, 4), t(5), result=t(6, 5)).macs == 120


def test_flex_attention_backward():
    q, kv, one = t(2, 4, 32, 8), t(2, 2, 32, 8), torch.ones(1, 1, 1, dtype=torch.int32)
    mask = (32, 32, one, one, None, None, *[None] * 8, 64, 64, None)
    call = Call(torch.ops.higher_order.flex_attention_backward, (q, kv, kv, q, t(0), q, t(0), None, None, mask), {}, q)
    found = cost_of(call)
    assert found.flops == found.executed_flops == 10 * 8 * 32 * 32 * 8


@pytest.mark.parametrize("queries", range(7))
@pytest.mark.parametrize("keys", range(7))
@pytest.mark.parametrize("bottom_right", [False, True])
def test_causal_pairs(queries, keys, bottom_right):
    from profiler.formulas.attention import causal_pairs

    shift = keys - queries if bottom_right else 0
    assert causal_pairs(queries, keys, bottom_right) == sum(j <= i + shift for i in range(queries) for j in range(keys))


def test_fake_tensors_have_no_lengths_to_read():
    x, offsets = torch.empty(7, 2, 4, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    found = cost_of(
        Call(aten._flash_attention_forward.default, (x, x, x, offsets, offsets, 4, 4, 0.0, False, False), {}, x)
    )
    assert found.flops == 2 * 2 * 2 * 16 * 8  # the longest for each
    assert count(torch.mm, torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta"))[1].total().macs == 60
