"""The three numbers of a batch."""

from __future__ import annotations

import pytest

from engine.errors import EngineError
from engine.training.batch_size import BatchSizes, resolve_batch_sizes


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"micro": 4}, (4, 4, 1, 1)),
        ({"micro": 4, "world": 3}, (12, 4, 1, 3)),
        ({"micro": 4, "accumulation": 5, "world": 2}, (40, 4, 5, 2)),
        ({"train": 32}, (32, 32, 1, 1)),
        ({"train": 32, "world": 4}, (32, 8, 1, 4)),
        ({"train": 32, "accumulation": 4, "world": 2}, (32, 4, 4, 2)),
        ({"train": 32, "micro": 4}, (32, 4, 8, 1)),
        ({"train": 32, "micro": 4, "world": 2}, (32, 4, 4, 2)),
        ({"train": 32, "micro": 4, "accumulation": 4, "world": 2}, (32, 4, 4, 2)),
    ],
)
def test_what_is_missing_follows(given: dict[str, int], wanted: tuple[int, int, int, int]) -> None:
    found = resolve_batch_sizes(**given)
    assert found == BatchSizes(*wanted)
    assert found.train == found.micro * found.accumulation * found.world


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "neither is there"),
        ({"accumulation": 2}, "neither is there"),
        ({"micro": 0}, "micro_batch_size is 0"),
        ({"train": -1}, "train_batch_size is -1"),
        (
            {"train": 30, "micro": 4, "world": 2},
            r"train_batch_size is 30, which is not 4 samples a micro-batch \(micro_batch_size\) x 2 processes",
        ),
        (
            {"train": 32, "micro": 4, "accumulation": 3, "world": 2},
            r"is 32, which is not 4 samples .* x 3 micro-batches a step \(accumulation_steps\) x 2 processes",
        ),
        ({"train": 32, "micro": 4, "accumulation": 4}, "is 32, which is not 4 samples .* x 4 micro-batches"),
    ],
)
def test_contradictions_are_told_with_their_numbers(given: dict[str, int], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        resolve_batch_sizes(**given)
