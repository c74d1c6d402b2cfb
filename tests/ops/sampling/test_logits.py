from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ops.sampling.logits import (
    apply_temperature,
    first_maximum,
    keep_top_k,
    keep_top_p,
    largest,
    masses,
    penalize_repetition,
    suppress_eos,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)


def logits(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """fp32, as Hugging Face hands them to its processors; from bf16 and fp16 many are equal."""
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype).float()


def by_row(processors: list[Any], scores: Tensor, ids: Tensor | None = None) -> Tensor:
    """Hugging Face's processors, one list a row."""
    rows = []
    for i, processor in enumerate(processors):
        rows.append(processor(NO_IDS if ids is None else ids[i : i + 1], scores[i : i + 1].clone()))
    return torch.cat(rows)


def warpers(top_k: int, top_p: float) -> Any:
    """As ``generate`` builds them: what is off is left out."""
    chosen = LogitsProcessorList()
    if top_k:
        chosen.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chosen.append(TopPLogitsWarper(top_p))
    return chosen


def kept(scores: Tensor, top_ks: list[int], top_ps: list[float], count: int) -> Tensor:
    """Top-k, then top-p, through the ``count`` largest logits."""
    ordered = largest(scores, count)
    keep = keep_top_k(scores, torch.tensor(top_ks), ordered)
    mass = masses(scores, ordered[:, :1]) * keep
    return keep & keep_top_p(scores, mass, torch.tensor(top_ps, dtype=torch.float64), ordered)


def assert_same_up_to_ties(got: Tensor, wanted: Tensor, scores: Tensor) -> None:
    """The same tokens; of those that tie with the last one kept, as many (Hugging Face's sort is not stable)."""
    assert got.sum(1).tolist() == wanted.sum(1).tolist()
    cut = scores.masked_fill(~wanted, float("inf")).amin(1, keepdim=True)
    assert torch.equal(got & (scores > cut), wanted & (scores > cut))
    assert not bool((got & (scores < cut)).any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_repetition_penalty_is_hugging_faces(dtype: torch.dtype) -> None:
    scores = logits(4, 50, dtype)
    ids = torch.randint(0, 50, (4, 30), generator=torch.Generator().manual_seed(1))
    penalties = [1.0, 1.3, 0.7, 5.0]
    wanted = by_row([LogitsProcessorList([RepetitionPenaltyLogitsProcessor(p)]) for p in penalties], scores, ids)
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, ids, True)
    assert torch.equal(penalize_repetition(scores, seen, torch.tensor(penalties)), wanted)


@pytest.mark.parametrize("generated", [0, 2, 3, 7])
def test_suppressed_eos_is_hugging_faces(generated: int) -> None:
    scores, minima, eos = logits(4, 20, torch.float32), [0, 3, 4, 8], [5, 19]
    ids = torch.zeros(4, 6 + generated, dtype=torch.int64)
    wanted = by_row(
        [LogitsProcessorList([MinNewTokensLengthLogitsProcessor(6, minimum, eos)]) for minimum in minima], scores, ids
    )
    before = scores.clone()
    got = suppress_eos(scores, torch.full((4,), generated), torch.tensor(minima), torch.tensor(eos))
    assert torch.equal(got, wanted)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_is_hugging_faces_and_zero_changes_nothing(dtype: torch.dtype) -> None:
    scores = logits(4, 50, dtype)
    wanted = by_row([LogitsProcessorList([TemperatureLogitsWarper(t)]) for t in (0.7, 1.3, 1e-3)], scores)
    got = apply_temperature(scores, torch.tensor([0.7, 1.3, 1e-3, 0.0]))
    assert torch.equal(got, torch.cat((wanted, scores[3:])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_top_k_is_hugging_faces_ties_and_large_k_included(dtype: torch.dtype, seed: int) -> None:
    vocab = 300
    scores = logits(6, vocab, dtype, seed)
    top_ks = [1, 5, 40, 299, 300, 0]
    wanted = by_row([warpers(k, 1.0) for k in (*top_ks[:4], 10_000, 0)], scores).isfinite()
    for count in (vocab, 300):
        assert torch.equal(keep_top_k(scores, torch.tensor(top_ks), largest(scores, count)), wanted)
    short = keep_top_k(scores[:3], torch.tensor(top_ks[:3]), largest(scores[:3], 40))
    assert torch.equal(short, wanted[:3])


def test_top_k_keeps_every_tie_with_the_last() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert keep_top_k(scores, torch.tensor([2]), largest(scores, 2)).tolist() == [
        [False, True, True, True, True, False]
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_top_p_is_hugging_faces_ties_and_extremes_included(dtype: torch.dtype, seed: int) -> None:
    top_ps = [0.0, 1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]
    scores = logits(len(top_ps), 300, dtype, seed)
    wanted = by_row([warpers(0, p) for p in top_ps], scores).isfinite()
    got = kept(scores, [0] * len(top_ps), top_ps, 300)
    assert_same_up_to_ties(got, wanted, scores)
    assert got.sum(1)[:2].tolist() == [1, 1]
    assert bool(got[-1].all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_top_p_after_top_k_is_hugging_faces_also_through_the_top_k_alone(dtype: torch.dtype, seed: int) -> None:
    top_ks, top_ps = [1, 2, 10, 50, 50, 50, 20], [0.5, 0.6, 0.9, 0.3, 0.95, 0.999, 1.0]
    scores = logits(len(top_ks), 300, dtype, seed) / 4
    wanted = by_row([warpers(*pair) for pair in zip(top_ks, top_ps, strict=True)], scores).isfinite()
    got = kept(scores, top_ks, top_ps, 50)
    assert_same_up_to_ties(got, wanted, scores)
    assert torch.equal(kept(scores, top_ks, top_ps, 300), got)


@pytest.mark.parametrize(
    ("top_k", "top_p", "tokens"),
    [
        (0, 0.5, [3, 4, 5]),
        (0, 0.51, [2, 3, 4, 5]),
        (0, 0.01, [5]),
        (2, 0.5, [3, 4, 5]),  # all six tie with the second
        (2, 0.9, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_among_equal_logits_top_p_keeps_those_of_the_higher_ids(top_k: int, top_p: float, tokens: list[int]) -> None:
    scores = torch.full((1, 6), 2.5)
    for count in {top_k or 6, 6}:
        assert kept(scores, [top_k], [top_p], count)[0].nonzero().flatten().tolist() == tokens
    assert warpers(top_k, top_p)(NO_IDS, scores.clone())[0].isfinite().nonzero().flatten().tolist() == tokens


def test_a_limit_that_is_met_exactly_needs_no_further_token() -> None:
    scores = torch.tensor([[0.5, 1.0, 0.5]]).log()
    assert kept(scores, [0], [0.5], 3).tolist() == [[False, True, False]]
    assert warpers(0, 0.5)(NO_IDS, scores.clone()).isfinite().tolist() == [[False, True, False]]


def test_removed_tokens_stay_removed() -> None:
    scores = torch.tensor([[2.0, -float("inf"), 1.0, -float("inf")]])
    assert kept(scores, [0], [0.999], 4).tolist() == [[True, False, True, False]]
    assert masses(scores, scores.amax(1, keepdim=True))[0, 1] == 0


def test_masses_are_proportional_to_probabilities() -> None:
    scores = logits(3, 1000, torch.float32)
    mass = masses(scores, scores.amax(1, keepdim=True))
    assert mass.max() == 2**40
    torch.testing.assert_close(mass / mass.sum(1, keepdim=True), scores.softmax(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_first_maximum_is_the_first_of_equal_ones(vocab: int, dtype: torch.dtype) -> None:
    scores = logits(3, vocab, dtype, vocab).round()
    values, places = first_maximum(scores)
    for row in range(3):
        assert values[row] == max(scores[row].tolist())
        assert places[row] == scores[row].tolist().index(values[row].item())


def test_first_maximum_of_nan_and_infinite_rows() -> None:
    scores = torch.full((3, 300), -float("inf"))
    scores[0, 270] = float("nan")
    scores[1, 299] = float("inf")
    values, places = first_maximum(scores)
    assert values.isnan().tolist() == [True, False, False]
    assert places.tolist() == [270, 299, 0]
