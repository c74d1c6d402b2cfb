"""Operators that are whole layers: recurrent layers, and torch's fast path of a Transformer encoder layer.

Counted as the operators they would be made of: products by 2 M N K with every weight matrix, element-wise work as in
``pointwise``. The sums of biases are in ``executed_flops`` alone, as for ``addmm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ops.costs import Cost
from profiler.formulas.call import Call
from profiler.formulas.products import product

#: Of a cell, by ``mode`` of torch's recurrent kernels (0 ReLU, 1 tanh, 2 LSTM, 3 GRU): gates; element-wise operations
#: for each hidden unit forward (LSTM: 4 sums of gates, 3 sigmoids of 4, 2 tanh, 3 products, 1 sum) and backward (its
#: derivatives: 3 sigmoids and 2 tanh of 3, 5 products, 1 sum), as torch's own decompositions have them.
_CELLS = {0: (1, 2, 1), 1: (1, 2, 3), 2: (4, 22, 21), 3: (3, 16, 15)}


def _recurrent(
    tokens: int, weights: Sequence[Tensor], call: Call, units: int, backward: tuple[bool, bool] | None
) -> Cost:
    """``tokens`` run through each layer and direction; ``units`` hidden units a token in all of them together;
    ``backward``: whether gradients of inputs and of weights are made."""
    _, forward_ops, backward_ops = _CELLS[call["mode"]]
    matrices = 2 * tokens * sum(weight.numel() for weight in weights if weight.dim() == 2)
    biases = tokens * sum(weight.numel() for weight in weights if weight.dim() == 1)
    if backward is None:
        flops, extra, cell = matrices, biases, forward_ops
    else:
        flops, extra, cell = sum(backward) * matrices, backward[1] * biases, backward_ops
    pointwise = cell * tokens * units
    return Cost(flops + pointwise, macs=flops // 2, executed_flops=flops + pointwise + extra)


def _mkldnn_rnn(backward: bool) -> Callable[[Call], Cost]:
    """One layer in one direction; input [T, B, I]. The backward pass makes every gradient."""
    names = [f"weight{number}" for number in (range(1, 5) if backward else range(4))]

    def formula(call: Call) -> Cost:
        given = call["input"]
        tokens = given.numel() // given.shape[-1]
        weights = [call[name] for name in names]
        biased = weights if call["has_biases"] else weights[:2]
        return _recurrent(tokens, biased, call, call["hidden_size"], (True, True) if backward else None)

    return formula


def _cudnn_rnn(backward: bool) -> Callable[[Call], Cost]:
    """All layers and directions at once; input [T, B, I], or [tokens, I] of packed sequences."""

    def formula(call: Call) -> Cost:
        given = call["input"]
        tokens = given.numel() // given.shape[-1]
        units = call["hidden_size"] * call["num_layers"] * (1 + call["bidirectional"])
        mask = (True, bool(call["output_mask"][3])) if backward else None
        return _recurrent(tokens, call["weight"], call, units, mask)

    return formula


def _cell(count: int, gates: int) -> Callable[[Call], Cost]:
    """The element-wise half of a cell on a GPU; biases, where they are given, are sums for each gate."""

    def formula(call: Call) -> Cost:
        units = call["cx"].numel() if gates == 4 else call["hx"].numel()
        biases = sum(call[name] is not None for name in ("input_bias", "hidden_bias"))
        return Cost(count * units, executed_flops=(count + biases * gates) * units)

    return formula


def _cell_backward(count: int, units: Callable[[Call], int]) -> Callable[[Call], Cost]:
    return lambda call: Cost(count * units(call))


def _shapes(given: Tensor) -> tuple[int, int]:
    """Tokens, and the sum of squared lengths, of [B, S, D] or of a nested tensor of sequences."""
    if given.is_nested:
        lengths = given._nested_tensor_size()[:, 0].tolist()
        return sum(lengths), sum(length * length for length in lengths)
    batch, length = given.shape[:2]
    return batch * length, batch * length * length


def _self_attention(call: Call, given: Tensor, heads: int) -> Cost:
    """Projections, the scores and their softmax (5, and the scaling of the query), and the weighted sum."""
    tokens, squares = _shapes(given)
    width = call["embed_dim"]
    flops = 2 * tokens * (call["qkv_weight"].numel() + call["proj_weight"].numel()) + 4 * squares * width
    biases = tokens * (call["qkv_bias"].numel() + call["proj_bias"].numel())
    pointwise = 5 * heads * squares + tokens * width
    return Cost(flops + pointwise, macs=flops // 2, executed_flops=flops + pointwise + biases)


def _native_attention(call: Call) -> Cost:
    return _self_attention(call, call["query"], call["num_head"])


def _encoder_layer(call: Call) -> Cost:
    """``nn.TransformerEncoderLayer`` without gradients: attention, two norms, two residual sums, the feed-forward."""
    attention = _self_attention(call, call["src"], call["num_heads"])
    tokens, _ = _shapes(call["src"])
    width, inner = call["embed_dim"], call["ffn_bias_1"].numel()
    ffn = product(2 * tokens * (call["ffn_weight_1"].numel() + call["ffn_weight_2"].numel()), tokens * (inner + width))
    norms = 2 * (7 * tokens * width + 4 * tokens) + 2 * tokens * width
    pointwise = norms + (5 if call["use_gelu"] else 1) * tokens * inner
    return Cost(
        attention.flops + ffn.flops + pointwise,
        macs=attention.macs + ffn.macs,
        executed_flops=(attention.executed_flops or 0) + (ffn.executed_flops or 0) + pointwise,
    )


FORMULAS: dict[str, Callable[[Call], Cost]] = {
    "mkldnn_rnn_layer": _mkldnn_rnn(backward=False),
    "mkldnn_rnn_layer_backward": _mkldnn_rnn(backward=True),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _cudnn_rnn(backward=False)),
    **dict.fromkeys(("_cudnn_rnn_backward", "miopen_rnn_backward"), _cudnn_rnn(backward=True)),
    "_thnn_fused_lstm_cell": _cell(22, 4),
    "_thnn_fused_gru_cell": _cell(16, 3),
    "_thnn_fused_lstm_cell_backward_impl": _cell_backward(21, lambda call: call["cx"].numel()),
    "_thnn_fused_gru_cell_backward": _cell_backward(15, lambda call: call["grad_hy"].numel()),
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
