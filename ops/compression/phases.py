"""The steps of one rank between its exchanges: what real and virtual ranks share."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from ops.compression import signs
from ops.compression.errors import Errors, chunk_of

#: Bytes of the server's scale behind its signs.
SCALE = 4


class Kernels(Protocol):
    """The four passes, as :mod:`ops.compression.signs` defines them."""

    def measure(self, x: Tensor, error: Tensor) -> Tensor:
        """The scale."""
        ...

    def pack(self, x: Tensor, error: Tensor, scale: Tensor, sound: Tensor, packed: Tensor) -> None:
        """Signs and error."""
        ...

    def mean_of_signs(self, packed: Tensor, scales: Tensor, out: Tensor) -> None:
        """Of several ranks."""
        ...

    def unpack(self, packed: Tensor, scales: Tensor, chunk: int, out: Tensor) -> None:
        """Chunk by chunk."""
        ...


def kernels_for(device: torch.device) -> Kernels:
    """Triton's on a GPU, plain PyTorch's elsewhere."""
    if device.type == "cuda":
        from ops.compression import triton_signs

        return cast(Kernels, triton_signs)
    return cast(Kernels, signs)


class Phases:
    """One rank's part in one compressed mean, in the order of its methods."""

    def __init__(self, buffer: Tensor, errors: Errors, size: int) -> None:
        self._buffer, self._errors, self._size = buffer, errors, size
        self._kernels = kernels_for(buffer.device)
        self.row = chunk_of(buffer.numel(), size) // 8

    def scale(self) -> Tensor:
        """The worker's scale, fp32 [1]: every rank must know all of them. The errors are untouched yet."""
        self._scale = self._kernels.measure(self._buffer, self._errors.worker)
        return self._scale

    def signs(self, scales: Tensor) -> Tensor:
        """All ranks' scales (fp32 [size]) in; this rank's signs out, uint8 [size, row], row ``j`` for rank ``j``."""
        self._scales = scales
        self.sound = torch.isfinite(scales).all()
        packed = torch.empty(self._size * self.row, dtype=torch.uint8, device=self._buffer.device)
        self._kernels.pack(self._buffer, self._errors.worker, self._scale, self.sound, packed)
        return packed.view(self._size, self.row)

    def serve(self, votes: Tensor) -> Tensor:
        """All ranks' signs of this rank's chunk (uint8 [size, row]) in; signs of their mean and its scale out, uint8
        [row + 4]."""
        error = self._errors.server
        mean = torch.empty_like(error)
        self._kernels.mean_of_signs(votes, self._scales, mean)
        scale = self._kernels.measure(mean, error)
        # An empty chunk has the scale 0, and must tell of a fault as well.
        scale = torch.where(self.sound, scale, torch.nan)
        out = torch.empty(self.row + SCALE, dtype=torch.uint8, device=error.device)
        self._kernels.pack(mean, error, scale, self.sound & torch.isfinite(scale).all(), out[: self.row])
        out[self.row :] = scale.view(torch.uint8)
        return out

    def finish(self, served: Tensor) -> Tensor:
        """What all ranks serve (uint8 [size, row + 4]) in, the mean to the buffer; whether all was finite."""
        # A copy, because four bytes anywhere in a row are not aligned.
        scales = served[:, self.row :].clone(memory_format=torch.contiguous_format).view(torch.float32).view(-1)
        self._kernels.unpack(served[:, : self.row], scales, self.row * 8, self._buffer)
        return torch.isfinite(scales).all()
