"""What each rank serves of a buffer's parts, and which of them each block of a kernel meets: no more than these."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.compression import triton_signs
from ops.compression.errors import served
from ops.compression.parts import cut


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 5))
def test_a_cut_by_its_definition(parts: list[int], size: int) -> None:
    """Element by element: pieces begin with the part of the chunk's first element and end with that of its last."""
    found = cut(tuple(parts), size)
    of = [index for index, part in enumerate(parts) for _ in range(part)]
    for rank in range(size):
        mine = of[served(len(of), rank, size)]
        if mine:
            assert found.firsts[rank] == mine[0]
            assert list(found.pieces[rank]) == [mine.count(index) for index in range(mine[0], mine[-1] + 1)]
        else:
            assert found.pieces[rank] == (0,)
    assert found.most == max(len(pieces) for pieces in found.pieces)
    assert found.sent == 2 * found.row + 4 * (len(parts) + found.most)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("parts", [(64,), (16, 48), (5, 0, 11, 100), (0, 0, 7, 1, 0, 200, 0), (1,) * 40])
def test_spans_by_their_definition(parts: tuple[int, ...], size: int) -> None:
    """Of each block of 16 elements from a row's beginning on; rows' parts are numbered as if all had the most."""
    found = cut(parts, size)
    table = triton_signs._made(found.pieces, 8 * found.row, 16, torch.device("cpu"))
    of = [
        (row, row * found.most + i)
        for row, each in enumerate(found.pieces)
        for i, n in enumerate(each)
        for _ in range(n)
    ]
    first_of = {number: of.index((row, number)) for row, number in of}
    assert table.starts[list(first_of)].tolist() == list(first_of.values())
    assert table.starts[-1] == sum(parts)
    blocks = -(-8 * found.row // 16)
    for row in range(size):
        for block in range(blocks):
            start = 8 * found.row * row + 16 * block
            met = [number for at, number in of[start : start + 16] if at == row]
            if met:
                assert table.spans[row * blocks + block].tolist() == [met[0], met[-1] + 1]
    # Where nothing is, one that may be read.
    assert (table.spans[:, 0] >= 0).all()
    assert (table.spans[:, 1] <= size * found.most).all()
    assert (table.spans[:, 1] > table.spans[:, 0]).all()
