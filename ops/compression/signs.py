"""Signs of numbers, eight a byte, and the error that they leave.

Bit i of byte j is 1 where element ``8 j + i`` is 0 or more. All in whole-tensor operations of PyTorch, on any device.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

#: Times eight bytes of 0 and 1, this has byte i's bit at place 56 + i; no two of the other products meet, so none
#: carries.
_GATHER = 0x0102040810204080


def pack(values: Tensor, size: int) -> Tensor:
    """The signs of ``values`` [n] as uint8 [size // 8]; beyond n they are as of zeros. ``size`` is a multiple of 8."""
    positive = values >= 0
    if values.numel() < size:
        positive = F.pad(positive, (0, size - values.numel()), value=True)
    packed: Tensor = (positive.view(torch.int64) * _GATHER).bitwise_right_shift(56).to(torch.uint8)
    return packed


def unpack(packed: Tensor, scale: Tensor, count: int) -> Tensor:
    """``scale`` (0-dim fp32) or minus that for each of the first ``count`` bits of uint8 ``packed``: fp32 [count]."""
    return F.embedding(packed.int(), _table(packed.device) * scale).view(-1)[:count]


@cache
def _table(device: torch.device) -> Tensor:
    """[256, 8]: 1 or -1 for each bit of each byte."""
    rows = [[1.0 if byte >> bit & 1 else -1.0 for bit in range(8)] for byte in range(256)]
    return torch.tensor(rows, device=device)


def root_mean_square(values: Tensor) -> Tensor:
    """0-dim fp32; 0 of none. NaN and infinity stay what they are."""
    if not values.numel():
        return torch.zeros((), device=values.device)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm / math.sqrt(values.numel())


def left_behind(values: Tensor, scale: Tensor) -> Tensor:
    """``values - scale * sign(values)``, what :func:`pack` and ``scale`` do not say."""
    return torch.where(values >= 0, values - scale, values + scale)
