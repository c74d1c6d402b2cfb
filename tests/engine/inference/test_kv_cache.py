"""The paged cache: who gets which page, and where tokens go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine.errors import EngineError
from engine.inference.kv_cache import PagedCache
from tests.ops.specs import spec


def cache(pages: int = 8, page_size: int = 4) -> PagedCache:
    return PagedCache(spec(), pages=pages, page_size=page_size, device=torch.device("cpu"), dtype=torch.float32)


def test_a_sequence_gets_consecutive_pages_while_there_are_any() -> None:
    pool = cache()
    first, second = pool.allocate(9), pool.allocate(1)
    assert (first.pages, first.start, first.capacity) == ([0, 1, 2], 0, 12)
    assert (second.pages, second.start) == ([3], 12)
    pool.release(first)
    assert pool.allocate(16).pages == [4, 5, 6, 7]


def test_scattered_pages_are_used_when_no_run_is_left() -> None:
    pool = cache(pages=4)
    held = [pool.allocate(4) for _ in range(4)]
    pool.release(held[0])
    pool.release(held[2])
    sequence = pool.allocate(8)
    assert sequence.pages == [0, 2]
    assert sequence.start is None
    assert sequence.slots(6) == [0, 1, 2, 3, 8, 9]


def test_every_page_comes_back() -> None:
    pool = cache()
    held = [pool.allocate(5) for _ in range(4)]
    assert pool.free_pages == 0
    for sequence in reversed(held):
        pool.release(sequence)
    assert pool.free_pages == 8
    assert pool.allocate(32).start == 0


def test_too_many_tokens_name_what_to_set() -> None:
    pool = cache()
    pool.allocate(20)
    with pytest.raises(EngineError, match=r"12 tokens free, 13 are needed: raise inference.max_tokens"):
        pool.allocate(13)


def test_a_view_counts_tokens_and_pads_the_block_table() -> None:
    pool = cache()
    long, short = pool.allocate(10), pool.allocate(3)
    view = pool.view([long, short], [6, 2])
    assert view.lengths == (6, 2)
    assert view.block_table.tolist() == [[0, 1, 2], [3, 0, 0]]
    assert view.slots.tolist() == [0, 1, 2, 3, 4, 5, 12, 13]
    assert view.starts == (0, 12)
    again = pool.view([long, short], [1, 1])
    assert again.slots.tolist() == [6, 14]
    assert again.lengths == (7, 3)
    assert all(a is b for a, b in zip(view.keys, again.keys, strict=True)), "the pools never move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_pool_takes_memory_only_as_it_is_used(dtype: torch.dtype) -> None:
    """4 GB of pool, of which two pages are touched."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    tokens = 4 * 10**9 // (2 * 2 * spec().kv_size * dtype.itemsize)
    pool = PagedCache(spec(), pages=tokens // 256, page_size=256, device=torch.device("cpu"), dtype=dtype)
    pool.keys[1][7].fill_(1)
    assert float(pool.keys[1][8].abs().max()) == 0
    assert float(pool.keys[1][7].sum()) > 0
    assert resident() - before < 50e6
