"""Which cuts of the persistent encoder are tried."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from benchmarks.encoder_cuts import around, cut_of, cuts_of, layout_of, text_of
from benchmarks.encoder_kernels import bert
from ops.specialized.encoder_layout import Layout


def test_what_is_shipped_comes_first_then_what_is_asked_for() -> None:
    """Of what is asked for, what the kernel can do: 16 parts of BERT-base's 12 tiles would leave some without any."""
    wanted, wrong = cut_of("32/1 24/2 16/1 40/6"), cut_of("24/1 32/16 24/1 32/4")
    spec, options = bert("base"), argparse.Namespace(cut=[wrong, wanted], around=2)
    cuts = cuts_of(spec, 16, 132, options)
    assert cuts[:2] == [Layout.of(spec, 16, 132).units, wanted]
    assert len(cuts) == len(set(cuts)) == 2 + 4 * 2
    assert all(layout_of(spec, 16, 132, cut) is not None for cut in cuts)
    # Where nobody measured, the search begins at the cut for 16 rows.
    more = cuts_of(spec, 48, 132, options)
    assert more[:3] == [Layout.of(spec, 48, 132).units, cuts[0], wanted]


def test_neighbours_differ_in_one_product_and_keep_blocks_busy() -> None:
    spec = bert("base")
    start = cut_of("24/1 32/3 24/1 32/4")
    found = around(spec, 16, 132, start, 3)
    assert [sum(a != b for a, b in zip(one, start, strict=True)) for one in found] == [1] * 12
    assert text_of(found[3]) == "24/1 24/4 24/1 32/4", "128 of 132 blocks, in one round"
    assert around(replace(spec, layers=2), 16, 132, start, 0) == []


def test_parts_of_the_last_product_are_no_longer_than_a_row_of_x() -> None:
    assert layout_of(bert("base"), 16, 132, cut_of("24/1 32/3 24/1 32/4")) is not None
    assert layout_of(bert("base"), 16, 132, cut_of("24/1 32/3 24/1 32/3")) is None


@pytest.mark.parametrize("text", ["24/2 32/3 24/1 32/4", "24/1 32/3 24/3 32/4", "24/1 32/3 24/1"])
def test_a_cut_that_is_none_is_refused(text: str) -> None:
    assert text_of(cut_of("24/1 32/3 24/1 32/4")) == "24/1 32/3 24/1 32/4"
    with pytest.raises(argparse.ArgumentTypeError, match="is not like 24/1 32/3 24/1 32/4"):
        cut_of(text)
