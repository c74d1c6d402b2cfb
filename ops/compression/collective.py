"""What an optimizer that compresses asks of the processes that train together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from config_schema.errors import SlipstreamError
from ops.compression.signs import left_behind, pack, root_mean_square, unpack

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CompressionError(SlipstreamError, ValueError):
    """A tensor that cannot be exchanged: the message says what to give."""


def chunk_of(numel: int, size: int) -> int:
    """Elements that each of ``size`` processes averages for all: a multiple of 8, so that chunks are whole bytes."""
    return -(-numel // (8 * size)) * 8


@dataclass
class Errors:
    """What one process has not said yet, of one buffer. It belongs to the training's state.

    worker: of the buffer [n] fp32. server: of this process's chunk of the mean [:func:`chunk_of`] fp32.
    """

    worker: Tensor
    server: Tensor

    @classmethod
    def zeros(cls, numel: int, size: int, device: torch.device | str = "cpu") -> Errors:
        """For a buffer that has not been exchanged yet."""
        return cls(torch.zeros(numel, device=device), torch.zeros(chunk_of(numel, size), device=device))

    @property
    def numel(self) -> int:
        """Of the buffer."""
        return self.worker.numel()


class Pending:
    """An exchange on its way."""

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        """Until the result is there; a second time does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class GradientCollective(Protocol):
    """Processes that call the same methods in the same order, with tensors of the same shapes."""

    @property
    def rank(self) -> int:
        """This process's place."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    @property
    def sent(self) -> int:
        """Bytes that this process has sent so far."""
        ...

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """The processes' mean of each tensor, in place and in full precision."""
        ...

    def compressed_mean(self, buffer: Tensor, errors: Errors) -> Pending:
        """The processes' mean of ``buffer`` [n] in place, at one bit an element each way (see :func:`first_half`).

        fp32, fp16 or bf16, one-dimensional and contiguous; ``errors`` are this buffer's, and are updated. Where any
        process
        has a number that is none, the result is NaN everywhere and no error changes.
        """
        ...


class SingleProcess:
    """A group of one: means are what is there. Signs are taken all the same, so that one process trains as several
    do."""

    rank = 0
    size = 1
    sent = 0

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """Leaves them as they are."""
        return Pending()

    def compressed_mean(self, buffer: Tensor, errors: Errors) -> Pending:
        """As of several processes."""
        half = first_half(buffer, errors, 1)
        scales = half.scale.reshape(1)
        mean = average([half.packed], scales, errors, 0)
        settle(buffer, [mean.packed], mean.scale.reshape(1), scales, errors, half, mean)
        return Pending()


@dataclass
class Half:
    """Signs on their way: ``packed`` uint8, their ``scale``, and the ``error`` that is left if all goes well."""

    packed: Tensor
    scale: Tensor
    error: Tensor


def first_half(buffer: Tensor, errors: Errors, size: int) -> Half:
    """What a process sends of its buffer: with b = buffer + worker error, sign(b) and the root mean square of b.

    This and :func:`average` are the two halves of the error-compensated all-reduce (arXiv 2102.02888, section 4.2).
    Raises
    :class:`CompressionError` for a buffer or errors that do not fit.
    """
    chunk = chunk_of(buffer.numel(), size)
    if buffer.dtype not in DTYPES or buffer.ndim != 1 or not buffer.is_contiguous():
        what = f"{buffer.dtype} {list(buffer.shape)}"
        raise CompressionError(f"compressed_mean takes a contiguous fp32, fp16 or bf16 tensor [n], got {what}")
    for name, error, wanted in (("worker", errors.worker, buffer.numel()), ("server", errors.server, chunk)):
        if error.dtype != torch.float32 or error.device != buffer.device or error.shape != (wanted,):
            what = f"{error.dtype} {list(error.shape)} on {error.device}"
            raise CompressionError(f"the {name} error is {what}, wanted fp32 [{wanted}] on {buffer.device}")
    values = buffer.float() + errors.worker
    scale = root_mean_square(values)
    return Half(pack(values, chunk * size), scale, left_behind(values, scale))


def average(received: Sequence[Tensor], scales: Tensor, errors: Errors, rank: int) -> Half:
    """What process ``rank`` sends of its chunk: the mean of what it ``received`` from each with its scale, plus the
    server
    error, as signs again."""
    chunk = errors.server.numel()
    count = max(min(errors.numel - rank * chunk, chunk), 0)
    total = errors.server[:count].clone()
    for packed, scale in zip(received, scales.unbind(), strict=True):
        total += unpack(packed, scale / len(received), count)
    scale = root_mean_square(total)
    return Half(pack(total, chunk), scale, left_behind(total, scale))


def settle(
    buffer: Tensor, chunks: Sequence[Tensor], scales: Tensor, sent: Tensor, errors: Errors, own: Half, mean: Half
) -> None:
    """Writes the mean, which lies in ``chunks`` with their ``scales``, and the errors, if all that was ``sent`` were
    numbers."""
    chunk, end = errors.server.numel(), buffer.numel()
    fine = torch.isfinite(sent).all()
    for index, (packed, scale) in enumerate(zip(chunks, scales.unbind(), strict=True)):
        begin = index * chunk
        if begin < end:
            count = min(chunk, end - begin)
            buffer[begin : begin + count] = unpack(packed, torch.where(fine, scale, torch.nan), count)
    errors.worker.copy_(torch.where(fine, own.error, errors.worker))
    count = mean.error.numel()
    errors.server[:count] = torch.where(fine, mean.error, errors.server[:count])
