"""The Triton kernels of the skinny GEMM: ``y[M, N] = epilogue(prologue(x)[M, K] @ weight[N, K]^T)``.

A program computes ``BM`` rows by ``BN`` columns of y, reads its rows of the weight once, and keeps sums in fp32.

``_fma_kernel``: multiplies and adds in plain registers. For one to four rows, where nothing but loads should limit.
``_mma_kernel``: the matrix units, on tiles that go from memory into their registers past shared memory (see
``_operand``). For up to 16 rows.
``_ring_kernel``: the matrix units, on a ring of asynchronous copies in shared memory. For more rows and wide tiles.

The matrix units want 16 rows of their first operand and 8 columns of the second: the weight is the first and x,
transposed, the second, but for BN = 8 in ``_mma_kernel``. The ``S`` slices of a program lie along K and become its
warps, since Triton deals the batch of a 3-D product to the warps; so a narrow output keeps many bytes in flight.

Programmatic dependent launch (``PDL``, Hopper): the next kernel may start as soon as every program of this one has
begun. A program touches what the kernel before it wrote (x, the residual, the buffers it overwrites) only after
``gdc_wait``. Weights, biases and norms are constants: the first tile of the weight is asked for before the wait. The
interpreter knows neither instruction; ``PDL`` is off there.

Loops hold two tiles: one is asked for while the other is used, and each is read again into the registers that its last
use has left. Every load and store is masked by M, N and K; offsets of rows are 64-bit.
"""

from __future__ import annotations

from typing import Any

from ops.gemm.fma import _fma_kernel
from ops.gemm.mma import _mma_kernel
from ops.gemm.ring import _ring_kernel

#: The kernels by the ``kind`` of a :class:`ops.gemm.config.GemmConfig`; all take the same arguments.
KERNELS: dict[str, Any] = {"fma": _fma_kernel, "mma": _mma_kernel, "ring": _ring_kernel}
