"""Matrix products and convolutions: 2 M N K by the dense convention, K multiply-accumulates for each result.

Where ``torch.utils.flop_counter`` has a formula, ``flops`` is what it says (``_dense``); convolutions' backward passes
are the exception, whose gradient of grouped weights torch takes for dense. ``executed_flops`` adds what the convention
leaves out: bias, and beta times what is added.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from torch.utils.flop_counter import flop_registry

from ops.costs import Cost
from profiler.formulas.call import Call


def product(flops: int, extra: int = 0) -> Cost:
    """A product of ``flops`` and ``extra`` operations beside it, which the dense convention leaves out."""
    return Cost(flops, macs=flops // 2, executed_flops=flops + extra)


def torch_flops(call: Call) -> int:
    """What torch's own counter says."""
    formula: Any = flop_registry[getattr(call.op, "_overloadpacket", call.op)]
    return int(formula(*call.args, **call.kwargs, out_val=call.result if call.result is not None else call.output))


def torch_product(call: Call) -> Cost:
    """The cost of an operator that torch's registry alone knows: it holds products only."""
    return product(torch_flops(call))


def _sums(call: Call) -> int:
    """Of beta self + alpha (a @ b), for each result: a sum unless beta is 0, a product each where beta or alpha is not
    1; of an operator that adds nothing, 0."""
    beta, alpha = call.get("beta", 0), call.get("alpha", 1)
    return sum((bool(beta != 0), beta not in (0, 1), bool(alpha != 1)))


def _added(call: Call) -> Cost:
    return product(torch_flops(call), _sums(call) * call.output.numel())


def _inner(left: str, right: str) -> Callable[[Call], Cost]:
    """Vectors and matrices: every element of the first meets one of the second for each of the second's columns."""

    def formula(call: Call) -> Cost:
        a, b = call[left], call[right]
        columns = b.shape[-1] if b.dim() > 1 else 1
        flops = 2 * a.numel() * columns
        return product(flops, _sums(call) * call.output.numel())

    return formula


def _addr(call: Call) -> Cost:
    """An outer product is a product with K = 1."""
    return product(2 * call["vec1"].numel() * call["vec2"].numel())


def _fused_activation(call: Call) -> Cost:
    """addmm and relu or gelu in one: bias and activation beside the product."""
    a, b = call["mat1"], call["mat2"]
    size = call.output.numel()
    return product(2 * a.numel() * b.shape[-1], (1 + (9 if call["use_gelu"] else 1)) * size)


def _trilinear(call: Call) -> Cost:
    """Two products of pairs, as ATen's ``_trilinear`` makes them (native/Linear.cpp): i1 with i2, then with i3."""
    full = [call[name] for name in ("i1", "i2", "i3")]
    for place, name in enumerate(("expand1", "expand2", "expand3")):
        for axis in call[name]:
            full[place] = full[place].unsqueeze(axis)
    sizes = [max(axis) for axis in zip(*(tensor.shape for tensor in full), strict=True)]
    third = set(call["expand3"])
    first = [axis for axis in range(len(sizes)) if not (full[0].shape[axis] == 1 and full[1].shape[axis] == 1)]
    summed = {axis for axis in call["sumdim"] if axis in third}
    second = [axis for axis in range(len(sizes)) if axis not in summed]
    return product(2 * prod(sizes[axis] for axis in first) + 2 * prod(sizes[axis] for axis in second))


def _grouped(call: Call) -> Cost:
    """``torch._grouped_mm``: each row of a 2-D ``self`` meets one matrix; two 2-D operands share K out among groups;
    a 3-D ``self`` meets the 3-D ``mat2`` as in bmm."""
    a, b = call["self"], call["mat2"]
    if a.dim() == 2 and b.dim() == 2:
        return product(2 * a.shape[0] * a.shape[1] * b.shape[1])
    if a.dim() == 3 and b.dim() == 2:
        return product(2 * a.shape[1] * a.shape[2] * b.shape[1])
    return product(2 * a.numel() * b.shape[-1])


def _cdist(call: Call) -> Cost:
    """Difference, power and sum for each pair and element, a root for each pair; no matrix product is assumed."""
    return Cost(3 * call["x1"].shape[-1] * call.output.numel() + call.output.numel())


def _cdist_backward(call: Call) -> Cost:
    """For each pair and element: difference, power, quotient by the distance, product with g, sum."""
    return Cost(5 * call["x1"].shape[-1] * call["cdist"].numel())


def _convolution(call: Call) -> Cost:
    bias = call.output.numel() if call["bias"] is not None else 0
    return product(torch_flops(call), bias)


def _convolution_backward(call: Call) -> Cost:
    """Each gradient is a convolution of as many products as the forward one: Dumoulin and Visin (2016), chapter 4.

    Forward: every weight of a filter meets every position of the result (of the input, if transposed) once an image.
    Bias gradients are sums over the incoming gradient.
    """
    gradient, weight = call["grad_output"], call["weight"]
    positions = (call["input"] if call["transposed"] else gradient).shape[2:]
    once = 2 * gradient.shape[0] * prod(positions) * weight.numel()
    wanted = call["output_mask"]
    return product((wanted[0] + wanted[1]) * once, gradient.numel() if wanted[2] else 0)


def _mkldnn_convolution(call: Call) -> Cost:
    """``mkldnn_convolution`` and ``_convolution_pointwise``: never transposed."""
    weight, out = call["weight"], call.output
    return product(
        2 * out.shape[0] * prod(out.shape[2:]) * weight.numel(), out.numel() if call["bias"] is not None else 0
    )


def _rows_by_out(weight: str, bias: str | None = None) -> Callable[[Call], Cost]:
    """x [.., K] with a weight packed somehow: 2 K for each result."""

    def formula(call: Call) -> Cost:
        given = call.args[0]
        flops = 2 * given.shape[-1] * call.output.numel()
        return product(flops, call.output.numel() if bias and call.get(bias) is not None else 0)

    return formula


FORMULAS: dict[str, Callable[[Call], Cost]] = {
    "mm": torch_product,
    "bmm": torch_product,
    "addmm": _added,
    "baddbmm": _added,
    "_scaled_mm": torch_product,
    "mv": _inner("self", "vec"),
    "dot": _inner("self", "tensor"),
    "vdot": _inner("self", "other"),
    "addmv": _inner("mat", "vec"),
    "addbmm": _inner("batch1", "batch2"),
    "_int_mm": _inner("self", "mat2"),
    "addr": _addr,
    "_addmm_activation": _fused_activation,
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped,
    "_scaled_grouped_mm": _grouped,
    "_cdist_forward": _cdist,
    "_cdist_backward": _cdist_backward,
    **dict.fromkeys(("convolution", "_convolution", "cudnn_convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(("_slow_conv2d_forward",), torch_product),
    "convolution_backward": _convolution_backward,
    "convolution_backward_overrideable": _convolution_backward,
    "mkldnn_convolution": _mkldnn_convolution,
    "_convolution_pointwise": _mkldnn_convolution,
    **dict.fromkeys(("_linear_pointwise", "mkldnn_linear"), _rows_by_out("weight", "bias")),
    **dict.fromkeys(
        ("_weight_int8pack_mm", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu"), _rows_by_out("mat2")
    ),
}
