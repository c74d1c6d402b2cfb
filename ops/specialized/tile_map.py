"""How Hopper's copy engine finds the tiles of a matrix: the driver's tensor maps, asked for without a toolkit."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ops.errors import KernelError

#: Columns of a tile, and rows of a tile of x. 64 columns of 16 bits are the 128 bytes in which a tile is swizzled.
TILE = 64


class Driver:
    """``cuTensorMapEncodeTiled`` of the driver: how the copy engine finds tiles of a matrix."""

    FLOAT16, BFLOAT16, SWIZZLE_128, PROMOTE_256 = 6, 9, 3, 3
    BYTES = 128

    def __init__(self) -> None:
        self._encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled

    def tile_map(self, matrix: Tensor, rows: int) -> bytes:
        """For tiles of ``rows`` rows by 64 columns of a contiguous 16-bit matrix [N, K]. What lies outside is zero."""
        assert matrix.is_contiguous()
        assert matrix.element_size() == 2
        n, k = matrix.shape
        room = ctypes.create_string_buffer(self.BYTES + 64)
        at = -(-ctypes.addressof(room) // 64) * 64
        kind = self.BFLOAT16 if matrix.dtype == torch.bfloat16 else self.FLOAT16
        code = self._encode(
            ctypes.c_void_p(at), kind, 2, ctypes.c_void_p(matrix.data_ptr()), (ctypes.c_uint64 * 2)(k, n),
            (ctypes.c_uint64 * 1)(2 * k), (ctypes.c_uint32 * 2)(TILE, rows), (ctypes.c_uint32 * 2)(1, 1),
            0, self.SWIZZLE_128, self.PROMOTE_256, 0,
        )  # fmt: skip
        if code != 0:
            raise KernelError(f"the driver refused a tile map of [{n}, {k}]: error {code}")
        return ctypes.string_at(at, self.BYTES)
