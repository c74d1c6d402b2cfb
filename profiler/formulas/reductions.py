"""Reductions, softmax, norms, pooling, sums of scattered rows: so many operations for each element of the input.

A sum of n numbers is n operations, as in the dense convention of products (2 M N K, not M N (2 K - 1)).
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from ops.costs import Cost
from profiler.formulas.call import Call, tensors_in

#: Name: operations for an element of the first tensor, and for an element of the result.
_REDUCTIONS = {
    "sum": (1, 0),
    "nansum": (2, 0),
    "mean": (1, 1),
    "prod": (1, 0),
    "amax": (1, 0),
    "amin": (1, 0),
    "aminmax": (2, 0),
    "max": (1, 0),
    "min": (1, 0),
    "argmax": (1, 0),
    "argmin": (1, 0),
    "median": (1, 0),
    "any": (1, 0),
    "all": (1, 0),
    "count_nonzero": (1, 0),
    "norm": (2, 1),  # squares and their sum, a root
    "linalg_vector_norm": (2, 1),
    "var": (4, 1),  # mean; difference, square, sum
    "std": (4, 2),
    "var_mean": (4, 2),
    "std_mean": (4, 3),
    "logsumexp": (4, 2),  # max, difference, exp, sum; log, sum
    "_logcumsumexp": (5, 0),
    "trace": (0, 1),
    "_softmax": (5, 0),  # max, difference, exp, sum, quotient
    "_safe_softmax": (5, 0),
    "_softmax_backward_data": (4, 0),  # y (g - sum(g y))
    "_log_softmax_backward_data": (4, 0),  # g - exp(y) sum(g)
    "_masked_softmax": (5, 0),
    "_masked_softmax_backward": (4, 0),
    "renorm": (3, 0),
}


def _reduction(inner: int, outer: int) -> Callable[[Call], Cost]:
    def formula(call: Call) -> Cost:
        if not call.floating:
            return Cost(0)
        source = call.args[0]
        size = sum(tensor.numel() for tensor in tensors_in(source))
        return Cost(
            inner * size
            + outer * (sum(t.numel() for t in call.outputs) if isinstance(source, list) else call.output.numel())
        )

    return formula


def _log_softmax(call: Call) -> Cost:
    """max, difference, exp, sum, difference; a logarithm for each row."""
    given = call["self"]
    width = given.shape[call["dim"]] if given.dim() else 1
    return Cost(5 * given.numel() + (given.numel() // width if width else 0))


# ---- norms. Per element: mean, difference, square, sum, times 1 / sigma; per row: two quotients, eps, a root. ----


def _layer_norm(call: Call) -> Cost:
    given = call["input"]
    affine = (call["weight"] is not None) + (call["bias"] is not None)
    return Cost((5 + affine) * given.numel() + 4 * call.outputs[1].numel())


def _rms_norm(call: Call) -> Cost:
    """Square, sum, times 1 / rms, and the weight; per row a quotient, eps and a root."""
    given = call["input"]
    return Cost((3 + (call["weight"] is not None)) * given.numel() + 3 * call.outputs[1].numel())


def _norm_backward(mask: str = "output_mask", given: str = "input") -> Callable[[Call], Cost]:
    """dx = (g w - mean(g w) - x' mean(g w x')) / sigma with x' made again: 9 and one for the weight; dw: 2; db: 1."""

    def formula(call: Call) -> Cost:
        size = call[given].numel()
        wanted = list(call.get(mask) or (True, True, True))
        count = (9 + (call.get("weight") is not None)) * wanted[0] + 2 * wanted[1]
        return Cost((count + (wanted[2] if len(wanted) > 2 else False)) * size)

    return formula


def _rms_norm_backward(call: Call) -> Cost:
    """dx = (g w - x' mean(g w x')) / rms: x' 1, product, sum, product, difference, quotient, the weight; dw: 2."""
    wanted = list(call["output_mask"])
    count = (6 + (call["weight"] is not None)) * wanted[0] + 2 * wanted[1]
    return Cost(count * call["input"].numel())


def _batch_norm(call: Call) -> Cost:
    """As layer norm with a channel as a row, and two running averages of three operations; in evaluation a
    difference and a product with 1 / sigma (eps and a root for each channel)."""
    given = call["input"]
    channels = given.shape[1]
    affine = (call["weight"] is not None) + (call["bias"] is not None)
    if not call.get("training", "no_training" not in call.name):
        return Cost((2 + affine) * given.numel() + 2 * channels)
    running = 6 if call.get("running_mean") is not None else 0
    return Cost((5 + affine) * given.numel() + (4 + running) * channels)


def _batch_norm_backward(call: Call) -> Cost:
    if not call.get("train", call.get("update", True)):
        wanted = list(call["output_mask"])
        return Cost(
            ((1 + (call["weight"] is not None)) * wanted[0] + 4 * wanted[1] + wanted[2]) * call["input"].numel()
        )
    return _norm_backward()(call)


# ---- pooling and resampling ----


def _window(call: Call) -> int:
    """Elements of a pooling window."""
    kernel = call["kernel_size"]
    axes = int(call.name[call.name.index("pool") + 4])
    return prod(kernel) if len(kernel) == axes else kernel[0] ** axes


def _pool(per_output: int) -> Callable[[Call], Cost]:
    """An operation for each element of each window, and ``per_output`` for each result."""
    return lambda call: Cost((_window(call) + per_output) * call.output.numel())


def _average_backward(call: Call) -> Cost:
    """A quotient for each gradient, a sum for each element of its window."""
    return Cost((_window(call) + 1) * call["grad_output"].numel())


def _adaptive(per_output: int) -> Callable[[Call], Cost]:
    """Windows that share the input out: an operation for each of its elements."""
    return lambda call: Cost(call["self"].numel() + per_output * call.output.numel())


def _gradient(per_element: int) -> Callable[[Call], Cost]:
    """Operations for each element of the incoming gradient."""
    return lambda call: Cost(per_element * next(tensors_in(call.args)).numel())


#: Points that one result is interpolated from: so many products and their sum.
_POINTS = {"upsample_linear1d": 2, "upsample_bilinear2d": 4, "upsample_trilinear3d": 8, "upsample_bicubic2d": 16}
_POINTS |= {"grid_sampler_2d": 4, "grid_sampler_3d": 8}


def _interpolation(points: int) -> Callable[[Call], Cost]:
    return lambda call: Cost((2 * points - 1) * call.output.numel())


# ---- rows that are gathered and summed, losses over classes ----


def _embedding_bag(call: Call) -> Cost:
    """A sum for each element that is gathered; a product for weights of samples; mode 1 divides."""
    gathered = call["indices"].numel() * call["weight"].shape[-1]
    weighted = call["per_sample_weights"] is not None
    return Cost((1 + weighted) * gathered + (call["mode"] == 1) * call.output.numel())


def _embedding_bag_backward(call: Call) -> Cost:
    return Cost(call["indices"].numel() * call["grad"].shape[-1] * (1 + (call["mode"] == 1)))


def _scatter_sum(amount: str) -> Callable[[Call], Cost]:
    """A sum for each element that is scattered."""
    return lambda call: Cost(next(tensors_in(call[amount])).numel() if call.floating else 0)


def _index_put(call: Call) -> Cost:
    return Cost(call["values"].numel() if call["accumulate"] and call.floating else 0)


def _nll(call: Call) -> Cost:
    """A product with the class's weight and a sum for each target; a mean divides."""
    return Cost(2 * call["target"].numel() + (call["reduction"] == 1))


def _ctc(passes: int) -> Callable[[Call], Cost]:
    """Graves et al. 2006, eq. 6: log of a sum of three exponentials (13) for each time and state (2 S + 1)."""

    def formula(call: Call) -> Cost:
        steps, batch = call["log_probs"].shape[0], call["log_probs"].numel() // call["log_probs"].shape[0]
        lengths = call["target_lengths"]
        longest = max(lengths if isinstance(lengths, list | tuple) else lengths.tolist())
        return Cost(passes * 13 * steps * (batch // call["log_probs"].shape[-1]) * (2 * longest + 1))

    return formula


FORMULAS: dict[str, Callable[[Call], Cost]] = {
    **{name: _reduction(inner, outer) for name, (inner, outer) in _REDUCTIONS.items()},
    "_log_softmax": _log_softmax,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_layer_norm_backward": _norm_backward(),
    "native_group_norm_backward": _norm_backward(),
    "_fused_rms_norm_backward": _rms_norm_backward,
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit", "_native_batch_norm_legit_functional"), _batch_norm),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_batch_norm_with_update"), _batch_norm),
    **dict.fromkeys(("native_batch_norm_backward", "batch_norm_backward"), _batch_norm_backward),
    **dict.fromkeys(("cudnn_batch_norm_backward", "miopen_batch_norm_backward"), _norm_backward()),
    **{f"max_pool{n}d_with_indices": _pool(0) for n in (2, 3)},
    **{f"max_pool{n}d_with_indices_backward": _gradient(1) for n in (2, 3)},
    **{f"avg_pool{n}d": _pool(1) for n in (1, 2, 3)},
    **{f"avg_pool{n}d_backward": _average_backward for n in (2, 3)},
    **{f"fractional_max_pool{n}d": _pool(0) for n in (2, 3)},
    **{f"fractional_max_pool{n}d_backward": _gradient(1) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive(0) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d_backward": _gradient(1) for n in (2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive(1) for n in (2, 3)},
    **{
        f"_adaptive_avg_pool{n}d_backward": lambda call: Cost(call["self"].numel() + call["grad_output"].numel())
        for n in (2, 3)
    },
    **{name: _interpolation(points) for name, points in _POINTS.items()},
    **{f"{name}_backward": _gradient(2 * points) for name, points in _POINTS.items()},
    **{f"upsample_nearest{n}d_backward": _gradient(1) for n in (1, 2, 3)},
    **{f"{kind}_pad{n}d_backward": _gradient(1) for n in (1, 2, 3) for kind in ("reflection", "replication")},
    "_weight_norm_interface": lambda call: Cost(3 * call["v"].numel() + 2 * call["g"].numel()),  # g v / |v|
    "_weight_norm_interface_backward": lambda call: Cost(6 * call["saved_v"].numel() + 4 * call["saved_g"].numel()),
    "col2im": _gradient(1),
    "embedding_dense_backward": _gradient(1),
    "embedding_renorm": lambda call: Cost(3 * call["indices"].numel() * call["self"].shape[-1]),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), _embedding_bag),
    **dict.fromkeys(("_embedding_bag_backward", "_embedding_bag_dense_backward"), _embedding_bag_backward),
    "_embedding_bag_per_sample_weights_backward": lambda call: Cost(
        2 * call["indices"].numel() * call["weight"].shape[-1]
    ),
    "scatter_add": _scatter_sum("src"),
    "scatter_reduce": _scatter_sum("src"),
    "index_add": _scatter_sum("source"),
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "_unsafe_index_put": _index_put,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _nll),
    "multi_margin_loss": lambda call: Cost(4 * call["self"].numel()),
    "multi_margin_loss_backward": lambda call: Cost(4 * call["self"].numel()),
    "multilabel_margin_loss_forward": lambda call: Cost(4 * call["self"].numel() * call["self"].shape[-1]),
    "multilabel_margin_loss_backward": lambda call: Cost(4 * call["self"].numel() * call["self"].shape[-1]),
    "_ctc_loss": _ctc(1),
    "_ctc_loss_backward": _ctc(2),
}
