from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ops.sampling import SamplingState, philox_uniform, sample, token_logprobs

VOCAB = 40


def logits(rows: int, vocab: int = VOCAB, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def draws(row: Tensor, count: int, **parameters: Any) -> Tensor:
    """``count`` tokens drawn from one row of logits, as many rows with seeds 0, 1, 2 ..."""
    return sample(row.expand(count, -1), SamplingState.create(count, row.shape[-1], **parameters)).tokens


def assert_distributed(tokens: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-squared; tokens expected fewer than 5 times in all are one class. p is at least 1e-4."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat((counts[~rare], counts[rare].sum(0, keepdim=True)))
    expected = torch.cat((expected[~rare], expected[rare].sum(0, keepdim=True)))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    if len(counts) == 1:
        return
    freedom = torch.tensor(len(counts) - 1, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-4


# ==== Greedy ====


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_rows_take_the_first_largest_logit(dtype: torch.dtype) -> None:
    scores = logits(16, 1000).to(dtype)
    scores[3, [700, 20, 999]] = 50.0
    out = sample(scores, SamplingState.create(16, 1000))
    assert out.tokens.dtype == torch.int64
    assert out.tokens.tolist() == [row.index(max(row)) for row in scores.tolist()]
    assert out.tokens[3] == 20
    assert bool(out.valid.all())
    assert out.logprobs is None


def test_greedy_with_a_penalty_leaves_what_it_has_said() -> None:
    state = SamplingState.create(1, 4, repetition_penalty=2.0)
    state.observe(torch.tensor([[1]]))
    scores = torch.tensor([[2.5, 4.0, 2.4, -1.0]])
    assert [sample(scores, state).tokens.item() for _ in range(3)] == [0, 2, 1]  # 1 stands at 2 from the start


def test_eos_waits_for_the_minimum_of_new_tokens() -> None:
    state = SamplingState.create(2, 4, min_new_tokens=[2, 0], eos=[3, 0])
    scores = torch.tensor([[1.0, 0.5, 0.0, 9.0]]).repeat(2, 1)
    assert [sample(scores, state).tokens.tolist() for _ in range(3)] == [[1, 3], [1, 3], [3, 3]]


def test_a_vanishing_temperature_is_the_limit_of_greedy() -> None:
    scores = logits(8)
    cold = sample(scores, SamplingState.create(8, VOCAB, temperature=1e-6)).tokens
    assert torch.equal(cold, scores.argmax(1))


# ==== Drawing ====


def test_a_draw_inverts_the_cumulative_distribution_at_the_philox_number() -> None:
    """Probabilities of 1/4, 1/2 and 1/4 in the order of ids, whatever their logits' order."""
    row = torch.tensor([[0.25, 0.5, 0.25]]).log()
    seeds = torch.arange(1000)
    uniform = philox_uniform(seeds, torch.zeros_like(seeds))
    edges = torch.tensor([0.25, 0.75])
    assert (uniform[:, None] - edges).abs().min() > 1e-6
    assert torch.equal(draws(row, 1000, temperature=1.0), torch.bucketize(uniform, edges))


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.25, 1), (0.5, 3), (1 - 2**-24, 3)])
def test_a_removed_token_is_not_drawn_even_at_an_edge(
    monkeypatch: pytest.MonkeyPatch, uniform: float, token: int
) -> None:
    """Tokens 1 and 3 share the mass; a cumulative mass that equals the number belongs to the token before."""
    module = importlib.import_module("ops.sampling.sample")
    monkeypatch.setattr(module, "philox_uniform", lambda seed, counter: torch.full(seed.shape, uniform))
    row = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.0]]).log()
    assert draws(row, 1, temperature=1.0).item() == token


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.7},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
def test_tokens_follow_hugging_faces_distribution(parameters: dict[str, Any]) -> None:
    row = logits(1, seed=5)
    warpers: Any = LogitsProcessorList([TemperatureLogitsWarper(parameters["temperature"])])
    if "top_k" in parameters:
        warpers.append(TopKLogitsWarper(parameters["top_k"]))
    if "top_p" in parameters:
        warpers.append(TopPLogitsWarper(parameters["top_p"]))
    wanted = warpers(torch.zeros(1, 0, dtype=torch.int64), row.clone()).softmax(1)[0]
    assert_distributed(draws(row, 20_000, seed=11, **parameters), wanted)


def test_one_row_over_many_steps_is_distributed_as_many_rows_are() -> None:
    row = logits(1, 8)
    state = SamplingState.create(1, 8, temperature=1.0, seed=3)
    steps = torch.cat([sample(row, state).tokens for _ in range(2000)])
    assert_distributed(steps, row.softmax(1)[0])
    assert state.counter.tolist() == [2000]


def test_rare_tokens_are_drawn_as_often_as_they_should() -> None:
    """One token of half the mass, 50,000 that share the other half: inverse sampling loses none of them to rounding."""
    row = torch.zeros(1, 50_001)
    row[0, 0] = torch.tensor(50_000.0).log()
    tokens = torch.cat([draws(row, 250, temperature=1.0, seed=250 * i) for i in range(16)])
    rare = tokens[tokens > 0] - 1
    assert_distributed((tokens > 0).long(), torch.tensor([0.5, 0.5]))
    assert_distributed(rare // 1000, torch.full((50,), 0.02))


MIXED: dict[str, list[Any]] = {
    "temperature": [0.0, 1.0, 0.7, 1.3, 1.0, 0.9, 1.0, 0.0],
    "top_k": [0, 0, 5, 50, 0, 1, 20, 3],
    "top_p": [1.0, 1.0, 1.0, 0.9, 0.8, 0.5, 1.0, 0.2],
    "repetition_penalty": [1.0, 1.2, 1.0, 1.0, 0.8, 1.0, 1.0, 1.5],
    "seed": [1, 2, 3, 3, 5, 6, -7, 8],
    "min_new_tokens": [0, 0, 0, 3, 0, 0, 2, 0],
}


def continuation(rows: list[int], steps: int, dtype: torch.dtype, **off: Any) -> list[list[int]]:
    """Tokens of some of the rows of MIXED, in a batch of these rows alone, over fixed logits."""
    parameters: dict[str, Any] = {key: [values[row] for row in rows] for key, values in MIXED.items()} | off
    state = SamplingState.create(len(rows), 1003, eos=[7], **parameters)
    out = [sample(logits(8, 1003, seed)[rows].to(dtype), state).tokens for seed in range(steps)]
    return torch.stack(out, 1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_tokens_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    together = continuation(list(range(8)), 12, dtype)
    assert [continuation([row], 12, dtype)[0] for row in range(8)] == together
    assert continuation([3, 0, 5], 12, dtype) == [together[row] for row in (3, 0, 5)]
    assert continuation([1, 3, 2], 12, dtype) == [together[row] for row in (1, 3, 2)]  # no row needs a whole sort
    assert continuation([6, 6], 12, dtype) == [together[6]] * 2


def test_a_rows_tokens_depend_on_its_seed() -> None:
    assert continuation([1], 12, torch.float32) != continuation([1], 12, torch.float32, seed=[99])


def test_a_selected_row_goes_on_as_it_would_have() -> None:
    state, fork = (SamplingState.create(3, VOCAB, temperature=1.0, top_k=[0, 9, 9], seed=1) for _ in range(2))
    scores = [logits(3, seed=step) for step in range(8)]
    whole = torch.stack([sample(step, state).tokens for step in scores], 1)
    for step in scores[:4]:
        sample(step, fork)
    part = fork.select([2])
    rest = torch.stack([sample(step[2:], part).tokens for step in scores[4:]], 1)
    assert rest.tolist() == whole[2:, 4:].tolist()


def test_logits_are_not_changed() -> None:
    scores = logits(8, 1003)
    before = scores.clone()
    state = SamplingState.create(8, 1003, "cpu", eos=[7], **MIXED)
    sample(scores, state, logprobs=3)
    assert torch.equal(scores, before)


# ==== Broken logits ====


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_a_row_that_is_not_finite_is_flagged_and_harms_no_other(bad: float, parameters: dict[str, Any]) -> None:
    scores = logits(4)
    clean = sample(scores, SamplingState.create(4, VOCAB, **parameters)).tokens
    broken = scores.clone()
    broken[1, 7] = bad
    broken[2] = bad
    broken[3, 1:] = -float("inf")
    out = sample(broken, SamplingState.create(4, VOCAB, **parameters))
    assert out.valid.tolist() == [True, False, False, True]
    assert out.tokens[0] == clean[0]
    assert out.tokens[3] == 0
    assert bool(((out.tokens >= 0) & (out.tokens < VOCAB)).all())


def test_a_row_with_every_token_removed_is_flagged() -> None:
    out = sample(torch.full((1, 5), -float("inf")), SamplingState.create(1, 5, temperature=1.0))
    assert out.valid.tolist() == [False]


# ==== Log-probabilities ====


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_those_of_the_raw_logits_in_fp32(dtype: torch.dtype) -> None:
    scores = logits(3, 1000).to(dtype)
    tokens = torch.tensor([5, 999, 0])
    found = token_logprobs(scores, tokens, top_n=4)
    wanted = scores.double().log_softmax(1)
    torch.testing.assert_close(found.chosen.double(), wanted.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(found.top_logprobs.double(), wanted.topk(4).values, rtol=1e-6, atol=2e-6)
    assert torch.equal(scores.gather(1, found.top_tokens), scores.topk(4).values)
    assert found.chosen.dtype == found.top_logprobs.dtype == torch.float32


def test_sample_reports_logprobs_before_any_processor() -> None:
    scores = logits(2)
    state = SamplingState.create(2, VOCAB, temperature=[0.0, 0.3], top_k=2, repetition_penalty=1.5)
    state.observe(scores.topk(3).indices)
    out = sample(scores, state, logprobs=2)
    assert out.logprobs is not None
    assert torch.equal(out.logprobs.chosen, token_logprobs(scores, out.tokens).chosen)
    assert torch.equal(out.logprobs.top_tokens, scores.topk(2).indices)


def test_no_alternatives_and_more_than_there_are() -> None:
    scores = logits(2, 5)
    assert token_logprobs(scores, torch.tensor([0, 1])).top_tokens.shape == (2, 0)
    assert token_logprobs(scores, torch.tensor([0, 1]), top_n=9).top_tokens.shape == (2, 5)
