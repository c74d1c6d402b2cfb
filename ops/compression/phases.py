"""The steps of one rank between its exchanges: what real and virtual ranks share."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from ops.compression import signs
from ops.compression.errors import Errors
from ops.compression.parts import SCALE, Cut


class Kernels(Protocol):
    """The four passes, as :mod:`ops.compression.signs` defines them."""

    def measure(self, x: Tensor, error: Tensor, parts: tuple[int, ...]) -> Tensor:
        """The scale of each part."""
        ...

    def pack(
        self, x: Tensor, error: Tensor, parts: tuple[int, ...], scales: Tensor, sound: Tensor, packed: Tensor
    ) -> None:
        """Signs and error."""
        ...

    def mean_of_signs(self, packed: Tensor, scales: Tensor, parts: tuple[int, ...], out: Tensor) -> None:
        """Of several ranks."""
        ...

    def unpack(self, packed: Tensor, scales: Tensor, pieces: tuple[tuple[int, ...], ...], out: Tensor) -> None:
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

    def __init__(self, buffer: Tensor, errors: Errors, cut: Cut, rank: int) -> None:
        self._buffer, self._errors, self._cut, self._rank = buffer, errors, cut, rank
        self._size = len(cut.pieces)
        self._kernels = kernels_for(buffer.device)

    def scales(self) -> Tensor:
        """The worker's scales, fp32 [parts]: every rank must know all of them. The errors are untouched yet."""
        self._own = self._kernels.measure(self._buffer, self._errors.worker, self._cut.parts)
        return self._own

    def signs(self, scales: Tensor) -> Tensor:
        """All ranks' scales (fp32 [size, parts]) in; this rank's signs out, uint8 [size, row], row ``j`` for rank
        ``j``."""
        self._scales = scales
        self.sound = torch.isfinite(scales).all()
        packed = torch.empty(self._size * self._cut.row, dtype=torch.uint8, device=self._buffer.device)
        self._kernels.pack(self._buffer, self._errors.worker, self._cut.parts, self._own, self.sound, packed)
        return packed.view(self._size, self._cut.row)

    def serve(self, votes: Tensor) -> Tensor:
        """All ranks' signs of this rank's chunk (uint8 [size, row]) in; signs of their mean and the scales of its
        pieces out, uint8 [row + 4 most]."""
        error, pieces, first = self._errors.server, self._cut.pieces[self._rank], self._cut.firsts[self._rank]
        mean = torch.empty_like(error)
        self._kernels.mean_of_signs(votes, self._scales[:, first : first + len(pieces)], pieces, mean)
        scales = self._kernels.measure(mean, error, pieces)
        sound = self.sound & torch.isfinite(scales).all()
        # All of them: a chunk that is empty must tell of a fault as well, and a fault in one piece is one of the chunk.
        scales = torch.where(sound, scales, torch.nan)
        out = torch.zeros(self._cut.row + SCALE * self._cut.most, dtype=torch.uint8, device=error.device)
        self._kernels.pack(mean, error, pieces, scales, sound, out[: self._cut.row])
        out[self._cut.row :][: SCALE * len(pieces)] = scales.view(torch.uint8)
        return out

    def finish(self, served: Tensor) -> Tensor:
        """What all ranks serve (uint8 [size, row + 4 most]) in, the mean to the buffer; whether all was finite."""
        row = self._cut.row
        # A copy, because four bytes anywhere in a row are not aligned.
        scales = served[:, row:].clone(memory_format=torch.contiguous_format).view(torch.float32)
        self._kernels.unpack(served[:, :row], scales, self._cut.pieces, self._buffer)
        return torch.isfinite(scales).all()
