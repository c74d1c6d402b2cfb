"""The skinny GEMM: a linear layer of 1 to 64 rows, with norm, bias, activation, gate and residual, in one launch.

>>> from ops.gemm import skinny_gemm
>>> y = skinny_gemm(x, weight, bias, activation="gelu")  # x [M, K], weight [N, K]

``python -m ops.gemm --shapes 768x2304,3072x768 --m 1,2,4,8`` tunes shapes for the GPU at hand.
"""

from ops.gemm.config import GemmConfig
from ops.gemm.skinny import skinny_gemm
from ops.gemm.timing import tune

__all__ = ["GemmConfig", "skinny_gemm", "tune"]
