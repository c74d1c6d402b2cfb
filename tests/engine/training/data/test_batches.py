"""The order of samples: every one once an epoch, the same on all ranks, and gone on with exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.errors import EngineError
from engine.training.data.batches import Batches
from engine.training.data.samples import Samples


class Numbers:
    """Samples whose inputs say which sample, epoch and seed they are made of."""

    def __init__(self, count: int, fingerprint: int = 0) -> None:
        self.count, self.fingerprint = count, fingerprint

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, torch.Tensor]:
        return {"x": torch.from_numpy(np.stack([indices, epochs, np.full(len(indices), seed)], 1))}


def take(batches: Batches, count: int) -> list[tuple[int, int]]:
    """The next ``count`` batches' (epoch, sample)."""
    found = []
    for _ in range(count):
        batch = next(batches)
        assert batch.inputs["x"][:, 0].tolist() == batch.indices.tolist()
        assert batch.inputs["x"][:, 1].tolist() == batch.epochs.tolist()
        found += list(zip(batch.epochs.tolist(), batch.indices.tolist(), strict=True))
    return found


def whole(
    world: int, size: int, count: int, state: dict[str, Any] | None = None, **options: Any
) -> list[tuple[int, int]]:
    """What ``world`` ranks get in ``count`` steps, in global order."""
    ranks = [Batches(Numbers(10), size, 5, rank, world, **options) for rank in range(world)]
    for rank in ranks:
        if state is not None:
            rank.load_state_dict(state)
    return [one for _ in range(count) for rank in ranks for one in take(rank, 1)]


def test_each_epoch_has_each_sample_once_in_another_order() -> None:
    assert isinstance(Numbers(1), Samples)
    found = take(Batches(Numbers(10), 4, 5), 10)
    epochs = [[index for epoch, index in found if epoch == number] for number in range(4)]
    assert [epoch for epoch, _ in found] == [number for number in range(4) for _ in range(10)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert take(Batches(Numbers(10), 4, 6), 10) != found
    plain = take(Batches(Numbers(10), 4, 5, shuffle=False), 5)
    assert [index for _, index in plain] == [*range(10), *range(10)]


@pytest.mark.parametrize(("world", "size"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_ranks_share_one_order(world: int, size: int) -> None:
    assert whole(world, size, 7) == take(Batches(Numbers(10), 1, 5), 42)


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_a_resumed_iterator_goes_on_exactly(done: int, threads: int) -> None:
    never, stopped = (Batches(Numbers(10), 3, 5, threads=threads) for _ in range(2))
    take(never, done)
    take(stopped, done)
    state = stopped.state_dict()
    take(stopped, 2)
    resumed = Batches(Numbers(10), 3, 5, threads=threads)
    take(resumed, 1)
    resumed.load_state_dict(state)
    stopped.load_state_dict(state)
    wanted = take(never, 8)
    assert take(resumed, 8) == wanted
    assert take(stopped, 8) == wanted
    for batches in (never, stopped, resumed):
        batches.close()


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 2), (2, 5), (3, 1)])
def test_another_world_goes_on_at_the_same_sample(world: int, size: int) -> None:
    before = Batches(Numbers(10), 2, 5, rank=1, world=2)
    take(before, 3)
    state = before.state_dict()
    assert state["position"] == 12
    steps = 24 // (world * size)
    everything = take(Batches(Numbers(10), 1, 5), 12 + steps * world * size)
    assert whole(world, size, steps, state) == everything[12:]


def test_threads_change_nothing() -> None:
    plain, threaded = Batches(Numbers(50), 7, 5), Batches(Numbers(50), 7, 5, threads=4, ahead=9)
    assert take(threaded, 40) == take(plain, 40)
    assert threaded.position == plain.position, "batches made ahead are not counted"
    threaded.close()
    assert take(threaded, 3) == take(plain, 3), "closed, it goes on by itself"


def test_an_error_in_a_thread_comes_out_and_costs_no_batch() -> None:
    class Fails(Numbers):
        broken = True

        def batch(self, indices: NDArray[np.int64], epochs: NDArray[np.int64], seed: int) -> dict[str, torch.Tensor]:
            if self.broken and 7 in indices:
                raise EngineError("sample 7")
            return super().batch(indices, epochs, seed)

    samples = Fails(10)
    batches = Batches(samples, 2, 5, shuffle=False, threads=2)
    take(batches, 3)
    for _ in range(2):
        with pytest.raises(EngineError, match="sample 7"):
            next(batches)
    samples.broken = False
    assert [index for _, index in take(batches, 2)] == [6, 7, 8, 9]
    batches.close()


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(("world", "size"), [(1, 3), (2, 4), (3, 4), (4, 3), (12, 1)])
def test_a_finite_iteration_counts_each_sample_once(world: int, size: int, threads: int) -> None:
    ranks = [Batches(Numbers(10), size, 5, rank, world, passes=1, threads=threads) for rank in range(world)]
    lengths = {len(rank) for rank in ranks}
    every = [list(rank) for rank in ranks]
    assert {len(batches) for batches in every} == lengths == {-(-10 // (world * size))}, "all ranks make as many steps"
    counted = [index for batches in every for batch in batches for index in batch.indices[: batch.real].tolist()]
    assert sorted(counted) == list(range(10))
    assert all(len(batch.indices) >= 1 for batches in every for batch in batches)
    assert all(len(rank) == 0 and rank.position == 10 for rank in ranks)
    for rank in ranks:
        rank.close()
    if world == 12:
        assert [batches[0].real for batches in every] == [1] * 10 + [0] * 2


def test_passes() -> None:
    batches = Batches(Numbers(10), 4, 5, passes=2)
    assert len(batches) == 5
    next(batches)
    assert (len(batches), batches.epoch) == (4, 0.4)
    assert len(list(batches)) == 4
    with pytest.raises(TypeError):
        len(Batches(Numbers(10), 4, 5))


def test_the_seed_reaches_the_samples() -> None:
    assert set(next(Batches(Numbers(10), 4, 5)).inputs["x"][:, 2].tolist()) == {5}


def test_states_of_other_data_are_refused() -> None:
    state = Batches(Numbers(10, 1), 4, 5).state_dict()
    for other, message in (
        (Batches(Numbers(11, 1), 4, 5), "another samples in the data: 10, here it is 11"),
        (Batches(Numbers(10, 1), 4, 6), "another seed: 5, here it is 6"),
        (Batches(Numbers(10, 1), 4, 5, shuffle=False), "another shuffle"),
        (Batches(Numbers(10, 2), 4, 5), "belongs to other data"),
    ):
        with pytest.raises(EngineError, match=message):
            other.load_state_dict(state)
        assert other.position == 0


def test_what_cannot_be_iterated_is_told() -> None:
    for arguments, message in (
        ((Numbers(0), 1), "the data set is empty"),
        ((Numbers(1), 0), "batch_size: got 0"),
        ((Numbers(1), 1, -1), "seed: got -1"),
        ((Numbers(1), 1, 0, 2, 2), "rank 2 is none of 2 processes"),
    ):
        with pytest.raises(EngineError, match=message):
            Batches(*arguments)  # type: ignore[arg-type]
