"""Element-wise operators: so many operations for each element of the result.

An operation is one step of the operator's definition in PyTorch's documentation: an addition, a product, a quotient, a
comparison, or one evaluation of exp, log, tanh, erf, a root or a power. Integers and booleans alone cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from ops.costs import Cost
from profiler.formulas.call import Call, tensors_in

_ONE = """
    add sub rsub mul div neg abs sgn sign maximum minimum fmax fmin clamp_min clamp_max relu threshold
    eq ne lt le gt ge isnan isinf isfinite isposinf isneginf isclose logical_and logical_or logical_xor logical_not
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square pow float_power sin cos tan asin acos atan atan2
    sinh cosh tanh asinh acosh atanh erf erfc erfinv lgamma digamma polygamma special_erfcx special_i0 special_i0e
    special_i1 special_i1e special_ndtri special_entr special_log_ndtr special_xlog1py special_zeta i0 igamma igammac
    mvlgamma floor ceil round trunc frac fmod remainder floor_divide copysign nextafter heaviside nan_to_num ldexp
    threshold_backward polar angle _amp_update_scale cumsum cumprod cummax cummin
"""

#: Name: operations an element; the definition they are counted from.
_MORE = {
    "relu6": 2,
    "hardtanh": 2,
    "hardtanh_backward": 2,
    "leaky_relu": 2,  # x > 0, slope x
    "leaky_relu_backward": 2,
    "_prelu_kernel": 2,
    "_prelu_kernel_backward": 3,  # x > 0, weight g, x g
    "rrelu_with_noise": 2,
    "rrelu_with_noise_backward": 2,
    "hardshrink": 2,  # two comparisons
    "hardshrink_backward": 2,
    "softshrink": 3,
    "softshrink_backward": 2,
    "sigmoid": 4,  # 1 / (1 + exp(-x))
    "sigmoid_backward": 3,  # g (1 - y) y
    "tanh_backward": 3,  # g (1 - y y)
    "silu": 5,  # x sigmoid(x)
    "silu_backward": 9,  # g s (1 + x (1 - s)), s = sigmoid(x)
    "mish": 4,  # x tanh(log1p(exp(x)))
    "mish_backward": 10,
    "softplus": 5,  # log1p(exp(beta x)) / beta beyond a comparison
    "softplus_backward": 6,
    "elu": 5,  # x > 0, scale alpha expm1(input_scale x)
    "elu_backward": 5,
    "celu": 4,
    "log_sigmoid_forward": 6,  # min(x, 0) - log1p(exp(-|x|))
    "log_sigmoid_backward": 6,
    "hardsigmoid": 4,  # clamp(x + 3, 0, 6) / 6
    "hardsigmoid_backward": 3,
    "hardswish": 5,
    "hardswish_backward": 5,
    "glu": 5,  # a sigmoid(b), for an element of the result
    "logaddexp": 5,  # max + log1p(exp(-|a - b|))
    "logaddexp2": 5,
    "logit": 3,  # log(x / (1 - x))
    "logit_backward": 3,
    "sinc": 3,
    "xlogy": 2,
    "special_logit": 3,
    "hypot": 4,
    "lerp": 3,  # a + w (b - a)
    "dropout": 2,
    "native_dropout": 2,  # x mask / (1 - p)
    "_fused_dropout": 2,
    "native_dropout_backward": 2,
    "_masked_scale": 2,
    "fake_quantize_per_tensor_affine_cachemask": 6,  # (clamp(round(x / s) + z, a, b) - z) s, a clamp being two
    "fake_quantize_per_channel_affine_cachemask": 6,
    "quantize_per_tensor": 4,
    "quantize_per_channel": 4,
    "dequantize": 2,
    "linalg_cross": 3,
    "cross": 3,
    # losses, for an element of the input; the sum of reduced ones is added by ``_loss``
    "mse_loss_backward": 3,  # 2 (x - y) g
    "smooth_l1_loss_backward": 4,
    "huber_loss_backward": 4,
    "soft_margin_loss_backward": 6,
    "binary_cross_entropy_backward": 5,  # g (x - t) / (x (1 - x))
}

#: Element-wise losses: operations an element of the input, and the sum over them unless it is not asked for.
_LOSSES = {
    "mse_loss": 2,  # (x - y)^2
    "l1_loss": 2,
    "smooth_l1_loss": 5,  # |x - y|, a comparison, half its square over beta
    "huber_loss": 5,
    "soft_margin_loss": 4,  # log(1 + exp(-t x))
    "binary_cross_entropy": 8,  # -(t log(x) + (1 - t) log(1 - x))
    "binary_cross_entropy_with_logits": 9,  # (1 - t) x + m + log(exp(-m) + exp(-x - m)), m = max(-x, 0)
}


def elements(call: Call) -> int:
    """Elements of the result: the first tensor that is returned, or all tensors of a list."""
    result = call.result if call.result is not None else call.outputs
    if isinstance(result, list):
        return sum(tensor.numel() for tensor in tensors_in(result))
    if isinstance(result, tuple) and not result:
        return sum(tensor.numel() for tensor in tensors_in(call.args[0]))
    return call.output.numel()


def elementwise(count: int) -> Callable[[Call], Cost]:
    """``count`` operations for each element of the result, if floating point numbers take part."""
    return lambda call: Cost(count * elements(call) if call.floating else 0)


def _scaled(count: int, factor: str) -> Callable[[Call], Cost]:
    """One operation more if the argument ``factor`` is not 1."""

    def formula(call: Call) -> Cost:
        return elementwise(count + (call.get(factor, 1) not in (1, None)))(call)

    return formula


def _clamp(call: Call) -> Cost:
    bounds = (call.get("min") is not None) + (call.get("max") is not None)
    return elementwise(bounds)(call)


def _gelu(exact: int, tanh: int) -> Callable[[Call], Cost]:
    """0.5 x (1 + erf(x / sqrt 2)), or 0.5 x (1 + tanh(c (x + 0.044715 x^3))), and what their derivatives take."""
    return lambda call: elementwise(exact if call["approximate"] == "none" else tanh)(call)


def _loss(count: int) -> Callable[[Call], Cost]:
    def formula(call: Call) -> Cost:
        size = call["self"].numel()
        reduced = call["reduction"] != 0
        weights = (call.get("weight") is not None) + 2 * (call.get("pos_weight") is not None)
        return Cost((count + weights + reduced) * size + (call["reduction"] == 1))

    return formula


def _adam(decoupled: bool) -> Callable[[Call], Cost]:
    """A step of Adam (Kingma and Ba, 2015) or AdamW (Loshchilov and Hutter, 2019), element by element:

    weight decay 2; each moment a lerp or 4; root, quotient by the bias correction, sum, quotient, step 6; amsgrad 1.
    Gradients are written only where they are unscaled.
    """

    def formula(call: Call) -> Cost:
        size = sum(tensor.numel() for tensor in call["self"])
        scaled = call["grad_scale"] is not None
        count = 3 + 4 + 6 + 2 * (decoupled or call["weight_decay"] != 0) + bool(call["amsgrad"]) + scaled
        return Cost(count * size, bytes_written=_fused_writes(call))

    return formula


def _fused_writes(call: Call) -> int:
    """What a fused optimizer writes: unscaled gradients only where there is a scale."""
    _, written = call.traffic()
    kept = sum(tensor.nbytes for tensor in call["grads"]) if call["grad_scale"] is None else 0
    return written - kept


def _sgd(call: Call) -> Cost:
    """torch.optim.SGD: weight decay 2, momentum 3, Nesterov's 2, the step 2."""
    size = sum(tensor.numel() for tensor in call["self"])
    momentum = call["momentum"] != 0
    count = 2 + 2 * (call["weight_decay"] != 0) + 3 * momentum + 2 * (momentum and bool(call["nesterov"]))
    return Cost((count + (call["grad_scale"] is not None)) * size, bytes_written=_fused_writes(call))


def _adagrad(call: Call) -> Cost:
    """torch.optim.Adagrad: weight decay 2, the sum of squares 2, root, eps, quotient, step 2."""
    size = sum(tensor.numel() for tensor in call["self"])
    count = 7 + 2 * (call["weight_decay"] != 0) + (call["grad_scale"] is not None)
    return Cost(count * size, bytes_written=_fused_writes(call))


def _unscale(call: Call) -> Cost:
    """A comparison and a product for each gradient."""
    return Cost(2 * sum(tensor.numel() for tensor in call["self"]))


FORMULAS: dict[str, Callable[[Call], Cost]] = {
    **{name: elementwise(1) for name in _ONE.split()},
    **{name: elementwise(count) for name, count in _MORE.items()},
    **{name: _loss(count) for name, count in _LOSSES.items()},
    "add": _scaled(1, "alpha"),
    "sub": _scaled(1, "alpha"),
    "rsub": _scaled(1, "alpha"),
    "addcmul": _scaled(2, "value"),
    "addcdiv": _scaled(2, "value"),
    "clamp": _clamp,
    "gelu": _gelu(5, 9),
    "gelu_backward": _gelu(11, 18),
    "glu_backward": lambda call: Cost(9 * (call["self"].numel() // 2)),
    "_fused_adam": _adam(decoupled=False),
    "_fused_adamw": _adam(decoupled=True),
    "_fused_sgd": _sgd,
    "_fused_adagrad": _adagrad,
    "_amp_foreach_non_finite_check_and_unscale": _unscale,
}
