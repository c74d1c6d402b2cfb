from __future__ import annotations

from typing import Any

import pytest
import torch

from config_schema.errors import SlipstreamError
from ops.sampling import SamplingError, SamplingPlan, SamplingState


def plan(batch: int, **parameters: Any) -> SamplingPlan:
    return SamplingState.create(batch, 1000, **parameters).plan


def test_defaults_are_greedy_and_allocate_no_mask() -> None:
    state = SamplingState.create(3, 1000)
    assert state.plan == SamplingPlan(greedy=True, penalty=False, minimum=False, top_k=False, top_p=False, ordered=0)
    assert state.seen is None
    assert state.batch == 3
    assert state.counter.tolist() == [0, 0, 0]


def test_the_plan_sorts_only_as_much_as_some_row_needs() -> None:
    assert plan(2, temperature=1.0).ordered == 0
    assert plan(2, temperature=1.0, top_k=[5, 0]).ordered == 5
    assert plan(2, temperature=1.0, top_k=[5, 50], top_p=[0.9, 1.0]).ordered == 50
    assert plan(2, temperature=1.0, top_k=[5, 0], top_p=[1.0, 0.9]).ordered == 1000
    assert plan(2, temperature=1.0, top_k=[5, 0], top_p=[0.9, 1.0]).ordered == 5
    assert plan(2, temperature=1.0, top_k=10**9).ordered == 1000
    mixed = plan(2, temperature=[0.0, 1.0], top_k=[900, 7], top_p=[0.5, 1.0])
    assert (mixed.ordered, mixed.greedy, mixed.top_p) == (7, False, False)


def test_the_plan_knows_penalties_and_minima() -> None:
    assert plan(2, repetition_penalty=[1.0, 1.1]).penalty
    assert plan(2, min_new_tokens=[0, 3], eos=[7]).minimum
    assert not plan(2, min_new_tokens=[0, 3]).minimum
    assert not plan(2, eos=[7]).minimum


def test_one_seed_gives_each_row_its_own_stream_and_any_integer_will_do() -> None:
    assert SamplingState.create(3, 10, seed=7).seed.tolist() == [7, 8, 9]
    assert SamplingState.create(2, 10, seed=[7, 7]).seed.tolist() == [7, 7]
    assert SamplingState.create(2, 10, seed=2**63 - 1).seed.tolist() == [2**63 - 1, -(2**63)]
    assert SamplingState.create(2, 10, seed=[-1, 2**64 + 5]).seed.tolist() == [-1, 5]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: use 0"),
        ({"temperature": 1e-9}, "temperature is 1e-09"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"eos": [10]}, "from 0 to 9"),
        ({"eos": [-1]}, "from 0 to 9"),
        ({"temperature": [1.0, 1.0]}, "temperature has 2 values for a batch of 3"),
        ({"seed": [1]}, "seed has 1 values for a batch of 3"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        SamplingState.create(3, 10, **parameters)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SlipstreamError)


def test_observe_marks_the_prompt_without_padding_and_without_foreign_ids() -> None:
    state = SamplingState.create(3, 6, repetition_penalty=1.2)
    tokens = torch.tensor([[0, 0, 3, 3], [5, 1, 0, 0], [6, -100, 2, 10**9]])
    state.observe(tokens, torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool))
    assert state.seen is not None
    assert [row.nonzero().flatten().tolist() for row in state.seen] == [[3], [1, 5], [2]]
    state.observe(tokens)
    assert [row.nonzero().flatten().tolist() for row in state.seen] == [[0, 3], [0, 1, 5], [2]]


def test_observe_without_a_penalty_does_nothing() -> None:
    state = SamplingState.create(1, 6)
    state.observe(torch.tensor([[1, 2]]))
    assert state.seen is None


def test_advance_counts_and_remembers_in_place() -> None:
    state = SamplingState.create(2, 6, repetition_penalty=[1.0, 1.2])
    assert state.seen is not None
    addresses = state.counter.data_ptr(), state.seen.data_ptr()
    state.advance(torch.tensor([4, 5]))
    state.advance(torch.tensor([4, 0]))
    assert state.counter.tolist() == [2, 2]
    assert [row.nonzero().flatten().tolist() for row in state.seen] == [[4], [0, 5]]
    assert (state.counter.data_ptr(), state.seen.data_ptr()) == addresses


def test_select_copies_rows() -> None:
    state = SamplingState.create(
        3, 6, temperature=[0.0, 1.0, 2.0], top_k=[1, 2, 3], seed=[4, 5, 6], repetition_penalty=1.2, eos=[1]
    )
    state.advance(torch.tensor([1, 2, 3]))
    part = state.select([2, 0])
    state.advance(torch.tensor([0, 0, 0]))
    assert part.temperature.tolist() == [2.0, 0.0]
    assert part.top_k.tolist() == [3, 1]
    assert part.seed.tolist() == [6, 4]
    assert part.counter.tolist() == [1, 1]
    assert part.eos.tolist() == [1]
    assert part.seen is not None
    assert [row.nonzero().flatten().tolist() for row in part.seen] == [[3], [1]]
