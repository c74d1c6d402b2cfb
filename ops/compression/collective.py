"""Means over the ranks of a data-parallel group, in full precision or as signs with carried errors. One process is an
object, not an ``if``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ops.compression.errors import Errors
from ops.compression.parts import Cut, parts_of

#: Elements of CPU tensors that a full-precision mean sends together: while some are on the wire, others are copied.
PIECE_ELEMENTS = 1 << 24


@dataclass
class Sent:
    """Bytes that left this rank; what a rank sends to itself is not counted."""

    full: int = 0
    """By full-precision means: 2 (size - 1) / size of the data, what a ring all-reduce sends."""
    compressed: int = 0
    """By compressed means: signs and scales of both phases."""

    def count_full(self, data: int, size: int) -> None:
        """One mean of ``data`` bytes."""
        self.full += 2 * (size - 1) * data // size

    def count_compressed(self, cut: Cut) -> None:
        """One compressed mean of a buffer so cut; of no elements nothing is sent."""
        if cut.row:
            self.compressed += (len(cut.pieces) - 1) * cut.sent


class Pending(Protocol):
    """A mean on its way."""

    def wait(self) -> Tensor:
        """Until the tensors hold the mean, in the order of the device's work (on a GPU the host does not wait). Returns
        a bool scalar on the tensors' device, the same on every rank: whether every rank's numbers were finite. May be
        called again."""
        ...


class GradientCollective(Protocol):
    """What an optimizer asks of the ranks that train the same parameters. All ranks make the same calls, and the same
    ``wait``, in the same order. Tensors in flight must not be read or written before ``wait``."""

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    @property
    def sent(self) -> Sent:
        """Bytes sent so far."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """Each tensor (floating point, any shape, the same on all ranks) becomes its mean over the ranks, in place;
        those of one dtype go together."""
        ...

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """``buffer`` [n] (fp32, bf16 or fp16; CPU or CUDA) becomes its compressed mean, in place, the same bits on
        every rank; ``errors`` take what that missed.

        parts: elements of consecutive parts of the buffer whose signs have a scale of their own each, the same on all
            ranks; they add up to n, and may be 0. None is one part.

        A number that is not finite, on any rank, makes the buffer NaN on all of them and leaves the errors as they
        were. Raises :class:`ops.errors.KernelError` for a buffer, errors or parts that do not fit.
        """
        ...


class Done:
    """A mean that is there already."""

    def __init__(self, sound: Tensor) -> None:
        self._sound = sound

    def wait(self) -> Tensor:
        """Whether all was finite."""
        return self._sound


class SingleProcess:
    """A group of one: every tensor is its own mean, nothing is compressed, errors stay as they are."""

    rank = 0
    size = 1

    def __init__(self) -> None:
        self.sent = Sent()

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """The tensors as they are."""
        return Done(all_finite(tensors))

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """The buffer as it is."""
        parts_of(buffer.numel(), parts)
        return Done(all_finite([buffer]))


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """A bool scalar on the first tensor's device. Tensors are of real floating point."""
    if not tensors:
        return torch.tensor(True)
    device = tensors[0].device
    # The least and the greatest element tell: both are NaN where one is. isfinite makes several tensors as large as its
    # own on the way: on a CPU that takes longer than sending fp16 over a fast network.
    ends = [end.to(device) for tensor in tensors if tensor.numel() for end in tensor.detach().aminmax()]
    return torch.isfinite(torch.stack(ends)).all() if ends else torch.tensor(True, device=device)


def flattened(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Tensors of one dtype and device with all their elements in one new tensor, already divided by ``size``: a sum of
    fp16 would overflow. On a CPU up to :data:`PIECE_ELEMENTS` together, or one larger tensor."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for (_, device), group in groups.items():
        for piece in _pieces(group) if device.type == "cpu" else [group]:
            yield piece, torch.cat([tensor.detach().reshape(-1) for tensor in piece]).div_(size)


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, as many together as may be."""
    piece: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if elements and elements + tensor.numel() > PIECE_ELEMENTS:
            yield piece
            piece, elements = [], 0
        piece.append(tensor)
        elements += tensor.numel()
    yield piece


def put_back(group: Sequence[Tensor], flat: Tensor) -> None:
    """Elements of ``flat`` to the tensors they came from."""
    parts = flat.split([tensor.numel() for tensor in group])
    for tensor, part in zip(group, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))
