from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ops.sampling import philox4x32, philox_uniform

words = st.integers(0, 2**32 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)

# philox4x32-10 of Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

# tl.rand(seed, offset) with a 64-bit offset, computed by Triton 3.9: seed, counter, bits of the fp32 result.
TRITON = [
    (0, 0, 1061965777),
    (0, 1, 1029924458),
    (1, 0, 1046527947),
    (-1, 0, 1063602413),
    (42, 4294967295, 1063012389),
    (1099511627783, 4294967296, 1050439859),
    (-9223372036854775808, 5, 1058068292),
    (9223372036854775807, 4611686018427387907, 1057014240),
]


def python_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, as its authors define it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def columns(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64).T


def test_known_answers_of_random123() -> None:
    counters, keys, results = (
        [[int(word, 16) for word in part.split()] for part in parts] for parts in zip(*KNOWN, strict=True)
    )
    assert philox4x32(columns(counters), columns(keys)).T.tolist() == results
    assert [python_philox(*row) for row in zip(counters, keys, strict=True)] == results


@given(
    st.lists(
        st.tuples(st.lists(words, min_size=4, max_size=4), st.lists(words, min_size=2, max_size=2)),
        min_size=1,
        max_size=8,
    )
)
def test_rows_are_the_integer_algorithm_and_do_not_mix(rows: list[tuple[list[int], list[int]]]) -> None:
    counters, keys = [row[0] for row in rows], [row[1] for row in rows]
    assert philox4x32(columns(counters), columns(keys)).T.tolist() == [python_philox(*row) for row in rows]


@pytest.mark.parametrize(("seed", "counter", "bits"), TRITON)
def test_uniform_is_tritons_bit_for_bit(seed: int, counter: int, bits: int) -> None:
    drawn = philox_uniform(torch.tensor([seed]), torch.tensor([counter]))
    assert drawn.view(torch.int32).item() == bits


@given(int64s, st.integers(0, 2**63 - 1))
def test_uniform_is_in_the_unit_interval_and_follows_from_the_first_word(seed: int, counter: int) -> None:
    drawn = philox_uniform(torch.tensor([seed]), torch.tensor([counter])).item()
    assert 0 <= drawn < 1
    key, count = seed % 2**64, counter % 2**64
    word = python_philox([count % 2**32, count >> 32, 0, 0], [key % 2**32, key >> 32])[0]
    folded = word if word < 2**31 else 2**32 - 1 - word
    assert drawn == pytest.approx(folded / 2**31, abs=2**-23)


def test_uniform_numbers_are_uniform_and_seeds_and_counters_give_different_streams() -> None:
    """Chi-squared over 64 bins of 2^16 draws: 63 degrees of freedom, a standard deviation of sqrt(126); 5 allowed."""
    counter = torch.arange(2**16)
    draws = [philox_uniform(torch.full_like(counter, seed), counter) for seed in (0, 1, 2**32)]
    for draw in draws:
        bins = torch.histc(draw, 64, 0, 1)
        assert ((bins - 1024) ** 2 / 1024).sum() < 63 + 5 * 126**0.5
    correlation = torch.corrcoef(torch.stack((*draws, draws[0].roll(1))))
    assert (correlation - torch.eye(4)).abs().max() < 5 / 2**8


def test_the_largest_word_stays_below_one() -> None:
    assert torch.tensor([2**31 - 1]).to(torch.float32).mul(4.6566127342e-10).item() < 1
