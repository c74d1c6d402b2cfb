"""Bytes: each operand read once and each result written once, at the storage that is really touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from profiler import Counter, count
from profiler.formulas.call import touched_bytes


def traffic(function, *args, **kwargs):
    work = count(function, *args, **kwargs)[1].total()
    return work.bytes_read, work.bytes_written


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_touched_elements_of_views(data):
    """Against the set of addresses, for views of a buffer by expansion, slices, permutation and windows."""
    buffer = torch.arange(200)
    view = buffer[: data.draw(st.integers(6, 200))]
    for kind in data.draw(st.lists(st.sampled_from(["expand", "slice", "unflatten", "permute", "flat"]), max_size=4)):
        if kind == "expand":
            view = view.expand(data.draw(st.integers(1, 3)), *view.shape)
        elif kind == "slice":
            view = view[..., :: data.draw(st.integers(1, 3))]
        elif kind == "unflatten" and view.dim() and view.shape[-1] % 2 == 0 and view.shape[-1]:
            view = view.unflatten(-1, (2, -1))
        elif kind == "permute":
            view = view.permute(*reversed(range(view.dim())))
        elif view.dim() == 1 and view.numel() > 4:
            view = view[1:-1]
    addresses = {int(value) for value in view.reshape(-1)}
    assert touched_bytes(view) == 8 * len(addresses)


def test_windows_that_overlap_touch_the_stretch_they_lie_in():
    assert touched_bytes(torch.zeros(10).unfold(0, 4, 1)) == 40
    assert touched_bytes(torch.zeros(5).as_strided((3, 3), (1, 1))) == 20
    assert touched_bytes(torch.zeros(3, 0).expand(3, 0)) == 0


f32, ROW = torch.zeros(3, 4), torch.zeros(4)
CASES = {
    "two operands": (lambda: f32 + torch.broadcast_to(f32[0], (3, 4)), 48 + 16, 48),
    "one operand twice": (lambda: f32 * f32, 48, 48),
    "a number": (lambda: f32 + 1, 48, 48),
    "half precision": (lambda: f32.bfloat16(), 48, 24),
    "an expanded operand": (lambda: f32[:1].expand(100, 4).sum(), 16, 4),
    "a strided operand": (lambda: f32[:, ::2].exp(), 24, 24),
    "views": (lambda: f32.t().reshape(4, 3)[1:].unsqueeze(0).expand(2, 3, 3).detach().unbind(), 0, 0),
    "views in place": (lambda: torch.empty(3, 1, 4).squeeze_(1).t_().unsqueeze_(0).detach_(), 0, 0),
    "a copy of a view": (lambda: f32.t().contiguous(), 48, 48),
    "nothing to copy": (lambda: f32.contiguous().to(torch.float32), 0, 0),
    "product": (lambda: f32 @ f32.t(), 48 + 48, 36),
    "in place": (lambda: f32.add_(1), 48, 48),
    "overwritten": (lambda: f32.fill_(1), 0, 48),
    "zeroed": (lambda: f32.zero_(), 0, 48),
    "copied": (lambda: f32.copy_(ROW), 16, 48),
    "part of a buffer": (lambda: f32[1].mul_(2), 16, 16),
    "out": (lambda: torch.exp(f32, out=torch.empty(3, 4)), 48, 48),
    "allocated": (lambda: torch.empty(3, 4).new_empty(5), 0, 0),
    "filled": (lambda: torch.zeros(3, 4), 0, 48),
    "like": (lambda: torch.ones_like(f32), 0, 48),
    "foreach": (lambda: torch._foreach_add_([f32, f32.clone()], 1), 48 + 96, 48 + 96),
    "item": (lambda: f32[0, 0].item(), 4, 0),
    "cat": (lambda: torch.cat([f32, f32[:1]]), 48 + 16, 64),
}


@pytest.mark.parametrize("name", CASES)
def test_traffic(name):
    function, read, written = CASES[name]
    assert traffic(function) == (read, written)


def test_gathers_read_what_they_take_and_scatters_write_what_they_put():
    table, ids = torch.zeros(1000, 4), torch.tensor([1, 2, 1])
    assert traffic(F.embedding, ids, table) == (24 + 48, 48)
    assert traffic(torch.index_select, table, 0, ids) == (24 + 48, 48)
    assert traffic(lambda: table[ids]) == (24 + 48, 48)
    assert traffic(table.gather, 0, ids[:, None]) == (24 + 12, 12)
    rows = torch.ones(3, 4)
    assert traffic(table.index_copy_, 0, ids, rows) == (24 + 48, 48)
    assert traffic(table.index_put_, (ids,), rows) == (24 + 48, 48)
    assert traffic(table.index_put_, (ids,), rows, accumulate=True) == (24 + 48 + 48, 48)
    assert traffic(table.index_put_, (ids,), torch.ones(())) == (24 + 4, 48)
    assert traffic(table.index_put_, (ids, ids), torch.ones(3)) == (24 + 12, 12)
    assert traffic(table.index_add_, 0, ids, rows) == (24 + 48 + 48, 48)
    assert traffic(table.index_copy, 0, ids, rows) == (16000 + 24 + 48, 16000)
    bag = count(F.embedding_bag, ids[None], table, mode="sum")[1].root.operators()
    assert bag["aten._embedding_bag_forward_only"].bytes_read == 24 + 8 + 48


def test_sparse_gradients_are_their_values_and_indices():
    gradient = torch.sparse_coo_tensor([[1, 5]], torch.ones(2, 4), (1000, 4), check_invariants=True)
    assert touched_bytes(gradient) == 2 * 8 + 32
    read, written = traffic(torch.zeros(1000, 4).add_, gradient)
    assert (read, written) == (16000 + 48, 16000)


def test_a_linear_layer_reads_input_weight_and_bias():
    layer, x = torch.nn.Linear(8, 6), torch.randn(3, 8, requires_grad=True)
    with Counter(layer) as counter:
        layer(x).sum().backward()
    total = counter.counts().module("Linear").total
    assert (total("forward").bytes_read, total("forward").bytes_written) == (4 * (24 + 48 + 6), 4 * 18)
    # Both products read the gradient, which ``sum`` expanded from one number; so does the sum for the bias.
    assert total("backward").bytes_read == 4 * ((1 + 48) + (1 + 24) + 1)
    assert total("backward").bytes_written == 4 * (24 + 48 + 6)


def test_a_fused_optimizer_reads_and_writes_its_state():
    layer = torch.nn.Linear(8, 6)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    with Counter(layer) as counter:
        optimizer.step()
    step = counter.counts().root.own["step"]["aten._fused_adamw_"]
    assert step.bytes_written == 3 * 4 * 54
    assert step.bytes_read == 4 * 4 * 54 + 2 * 4  # and the number of the step of each


def test_casts_of_autocast_are_traffic():
    layer, x = torch.nn.Linear(8, 6, bias=False), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, counts = count(layer, x)
    casts = counts.root.operators()["aten._to_copy"]
    assert (casts.operators, casts.bytes_read, casts.bytes_written) == (2, 4 * (24 + 48), 2 * (24 + 48))
    assert counts.root.operators()["aten.mm"].bytes_read == 2 * (24 + 48)
