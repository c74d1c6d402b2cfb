"""``skinny_gemm``: a linear layer of 1 to 64 rows with what stands before and after it, in one launch.

A plain function rather than a ``torch.library`` op: inference needs no autograd, and the dispatcher's microseconds buy
nothing to a caller that captures its launches in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, get_args

import torch
import triton
from torch import Tensor

from ops.closed_forms import ACTIVATION_FLOPS, norm_flops, product_cost
from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.gemm.config import DTYPES, MAX_ROWS, GemmConfig
from ops.gemm.kernels import KERNELS
from ops.gemm.tuning import automatic, choose, known
from ops.quantization.tensor import QuantizedTensor
from ops.spec import Activation, NormKind
from ops.triton_support import check, dependent_launch, interpreted, launch_options
from ops.weights import Norm

_OP = "skinny_gemm"


def _skinny_cost(
    result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, norm: Norm | None = None,
    norm_kind: NormKind = "layernorm", activation: Activation | None = None, gated: bool = False,
    residual: Tensor | None = None, **_: object,
) -> Cost:  # fmt: skip
    """The norm counts once, though every program computes it for itself."""
    rows, k = x.shape
    beside = 0 if activation is None else ACTIVATION_FLOPS[activation]
    beside = (beside + gated + (residual is not None)) * result.numel()
    read = sum(one.nbytes for one in (x, weight, bias, residual) if one is not None)
    if norm is not None:
        beside += norm_flops(rows, k, norm_kind, norm.bias is not None)
        read += sum(one.nbytes for one in (norm.weight, norm.bias) if one is not None)
    cost = product_cost(rows, weight.shape[0], k, bias=bias is not None, beside=beside)
    return replace(cost, bytes_read=read, bytes_written=result.nbytes)


@priced(_skinny_cost)
def skinny_gemm(
    x: Tensor,
    weight: Tensor | QuantizedTensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    norm_kind: NormKind = "layernorm",
    eps: float = 1e-5,
    activation: Activation | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    config: GemmConfig | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """``activation(norm(x) @ weight^T + bias) + residual``; sums in fp32, rounded once at the end.

    Args:
        x: [M, K] in fp16, bf16 or fp32, M from 0 to 64. All tensors are contiguous, of x's dtype and on its device.
        weight: [N, K] as in a checkpoint ([out, in]); with ``gated`` [2 N, K], the gate's rows first.
        bias: [N], with ``gated`` [2 N].
        norm: weight [K] and bias [K] or None of a norm of x's rows, which every program computes for itself.
        norm_kind: which norm that is.
        eps: added to the variance (LayerNorm) or to the mean square (RMSNorm).
        activation: a name of ``ops.spec.Activation``.
        gated: the result is ``activation(x @ gate^T + gate's bias) * (x @ up^T + up's bias) + residual``.
        residual: [M, N], added last; may be ``out``.
        out: [M, N] to write to; must share no memory with x.
        config: how to launch; None takes the tuned one.
        pdl: launch dependently (Hopper): the kernel may start while those before it on the stream still run, and reads
            weight, bias and norm at once. Only for constants: not if a kernel just before this one writes them. None is
            False.

    Returns:
        [M, N] in x's dtype: ``out`` if given.

    Raises:
        KernelError: an argument that the kernels cannot take; the line names it.
    """
    if isinstance(weight, QuantizedTensor):
        raise KernelError(f"{_OP}: int8 and int4 weights are not supported yet: dequantize the weight")
    columns = _check_product(x, weight, gated)
    _check_rest(x, columns, bias, norm, norm_kind, activation, gated, residual, out)
    if pdl and not dependent_launch(x.device):
        raise KernelError(f"{_OP}: dependent launch needs a Hopper GPU or newer: leave pdl out")
    rows, inner = x.shape
    y = out if out is not None else torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if rows == 0 or columns == 0:
        return y
    if config is None:
        options = {"bias": bias, "norm": norm, "norm_kind": norm_kind, "eps": eps, "activation": activation}
        config = _chosen(x, weight, columns, gated, options)
    if config.kind == "mma" and x.dtype == torch.float32:
        raise KernelError(f'{_OP}: kind "mma" takes fp16 and bf16, x is {x.dtype}: choose kind "fma" or "ring"')
    tensors = (x, weight, y, bias, residual, norm.weight if norm else None, norm.bias if norm else None)
    flags: dict[str, bool | str] = {"ACT": activation or "none", "GATED": gated, "PDL": bool(pdl)}
    _launch(tensors, (rows, columns, inner), config, norm_kind, float(eps), flags)
    return y


def _chosen(x: Tensor, weight: Tensor, columns: int, gated: bool, options: dict[str, Any]) -> GemmConfig:
    """The config to run with; tunes the shape first if it is new and that was asked for."""
    normed = options["norm"] is not None
    if automatic(x) and known(x, columns, gated, normed) is None:
        from ops.gemm.timing import tune

        tune(x, weight, gated=gated, **options)
    return choose(x, columns, gated, normed)


def _check_product(x: Tensor, weight: Tensor, gated: bool) -> int:
    """N of an acceptable pair."""
    if x.dtype not in DTYPES:
        raise KernelError(f"{_OP}: x is {x.dtype}; fp16, bf16 and fp32 are supported")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise KernelError(
            f"{_OP}: x {list(x.shape)} and weight {list(weight.shape)} must be [M, K] and [N, K] with K > 0"
        )
    if x.shape[0] > MAX_ROWS:
        raise KernelError(f"{_OP}: x has {x.shape[0]} rows, at most {MAX_ROWS} are supported: use F.linear")
    if gated and weight.shape[0] % 2:
        raise KernelError(f"{_OP}: a gated weight holds two halves, but has {weight.shape[0]} rows")
    if not x.is_cuda and not interpreted():
        raise KernelError(f"{_OP}: x is on {x.device}, the kernels need a CUDA GPU: use F.linear")
    check(_OP, x, weight=weight)
    return weight.shape[0] // (2 if gated else 1)


def _check_rest(
    x: Tensor,
    columns: int,
    bias: Tensor | None,
    norm: Norm | None,
    norm_kind: NormKind,
    activation: Activation | None,
    gated: bool,
    residual: Tensor | None,
    out: Tensor | None,
) -> None:
    if activation is not None and activation not in get_args(Activation):
        raise KernelError(f"{_OP}: activation {activation!r} is unknown; one of {', '.join(get_args(Activation))}")
    if norm_kind not in get_args(NormKind):
        raise KernelError(f"{_OP}: norm kind {norm_kind!r} is unknown; one of {', '.join(get_args(NormKind))}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "bias": (bias, (2 * columns if gated else columns,)),
        "norm_weight": (norm.weight if norm else None, (x.shape[1],)),
        "norm_bias": (norm.bias if norm else None, (x.shape[1],)),
        "residual": (residual, (x.shape[0], columns)),
        "out": (out, (x.shape[0], columns)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise KernelError(f"{_OP}: {name} has shape {list(tensor.shape)}, {list(shape)} expected")
    check(_OP, x, **{name: tensor for name, (tensor, _) in expected.items()})
    if out is not None and _overlap(x, out):
        raise KernelError(f"{_OP}: out shares memory with x, which other programs still read: give another out")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.numel() * b.itemsize and second < first + a.numel() * a.itemsize


def _launch(
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int, int],
    config: GemmConfig,
    norm_kind: NormKind,
    eps: float,
    flags: dict[str, bool | str],
) -> None:
    """``tensors`` are x, weight, y, bias, residual, norm weight and norm bias; ``shape`` is (M, N, K)."""
    x, _, _, bias, residual, norm_weight, norm_bias = tensors
    assert x is not None
    rows, columns, inner = shape
    tile = config.rows(rows)
    vectors = all(one is None or one.data_ptr() % 16 == 0 for one in (*tensors[:2], *tensors[5:]))
    aligned = vectors and inner * x.itemsize % 16 == 0
    grid = (-(-columns // config.block_n) * -(-rows // tile),)
    where: AbstractContextManager[object] = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    try:
        with where:
            KERNELS[config.kind][grid](
                *(x if one is None else one for one in tensors), eps, rows, columns, inner,
                BM=tile, BN=config.block_n, BK=config.block_k,
                S=config.warps if config.kind == "mma" else config.slices, STAGES=config.stages,
                BS=_statistics_step(config, inner, tile) if norm_weight is not None else 16,
                BIAS=bias is not None, RESIDUAL=residual is not None, NORM_BIAS=norm_bias is not None,
                NORM="none" if norm_weight is None else norm_kind,
                PACK=2 if aligned and x.itemsize == 2 else 1, ALIGNED=aligned, ONCE=config.once(inner),
                WIDE=interpreted(), num_warps=config.warps, **flags, **launch_options(bool(flags["PDL"])),
            )  # fmt: skip
    except triton.runtime.errors.OutOfResources as error:
        raise KernelError(f"{config} does not fit this GPU ({error}): choose smaller blocks or fewer stages") from error


def _statistics_step(config: GemmConfig, inner: int, tile: int) -> int:
    """Elements of each row that the norm's own pass over x takes at a time: 64 of a thread, if the rows are so long."""
    return max(16, min(1 << (inner - 1).bit_length(), 2048 * config.warps // tile))
