"""The three numbers of a batch: what a step trains on, what one process computes at a time, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import EngineError


@dataclass(frozen=True)
class BatchSizes:
    """train = micro * accumulation * world, in samples.

    train: of an optimizer step, over all processes. micro: of a forward pass of one process. accumulation: forward
    passes a step. world: processes.
    """

    train: int
    micro: int
    accumulation: int
    world: int


def resolve_batch_sizes(
    train: int | None = None, micro: int | None = None, accumulation: int | None = None, world: int = 1
) -> BatchSizes:
    """Fills in what is missing: without ``accumulation`` it follows from the other two (or is 1), without ``micro``
    likewise, without ``train`` it is the product.

    Raises :class:`EngineError` with the numbers if they contradict each other, or if none says a size.
    """
    for name, value in (("train_batch_size", train), ("micro_batch_size", micro), ("accumulation_steps", accumulation)):
        if value is not None and value < 1:
            raise EngineError(f"{name} is {value}: it must be at least 1")
    if train is None and micro is None:
        raise EngineError("set train_batch_size or micro_batch_size: neither is there")
    if train is None:
        assert micro is not None
        return BatchSizes(micro * (accumulation or 1) * world, micro, accumulation or 1, world)
    known = (micro or 1) * (accumulation or 1) * world
    if train % known:
        raise EngineError(_contradiction(train, micro, accumulation, world))
    rest = train // known
    if micro is not None and accumulation is not None and rest != 1:
        raise EngineError(_contradiction(train, micro, accumulation, world))
    if micro is None:
        return BatchSizes(train, rest, accumulation or 1, world)
    return BatchSizes(train, micro, accumulation or rest, world)


def _contradiction(train: int, micro: int | None, accumulation: int | None, world: int) -> str:
    given = [
        f"{value} {words}"
        for value, words in (
            (micro, "samples a micro-batch (micro_batch_size)"),
            (accumulation, "micro-batches a step (accumulation_steps)"),
            (world, "processes"),
        )
        if value is not None
    ]
    return f"train_batch_size is {train}, which is not {' x '.join(given)}: change one of them"
