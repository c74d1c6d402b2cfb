"""Closed forms that the costs beside our kernels are sums of, in the convention of the profiler's own tables
(docs/profiler.md): each step of an operator's definition is one operation, however a kernel gets there.

``flops`` is the dense number, as torch's operators would count for the same work: 2 M N K a product, without the bias
that a fused product adds; masks are not taken off. ``executed_flops`` has both.
"""

from __future__ import annotations

from ops.costs import Cost
from ops.spec import Activation, NormKind

#: Operations an element: docs/profiler.md says what a step is, ``ops.spec.Activation`` defines the functions.
ACTIVATION_FLOPS: dict[Activation, int] = {
    "gelu": 5,  # 0.5 x (1 + erf(x / sqrt 2))
    "gelu_tanh": 9,  # 0.5 x (1 + tanh(c (x + 0.044715 x^3)))
    "quick_gelu": 6,  # x sigmoid(1.702 x)
    "relu": 1,
    "silu": 5,  # x sigmoid(x)
    "tanh": 1,
}


def norm_flops(rows: int, n: int, kind: NormKind, biased: bool) -> int:
    """Of ``rows`` norms of ``n`` elements. Per element: mean, difference, square, sum, times 1 / sigma, weight, bias
    (an RMSNorm: square, sum, times 1 / rms, weight); per row two quotients (one), eps, a root."""
    per_element, per_row = (6 + biased, 4) if kind == "layernorm" else (4, 3)
    return rows * (per_element * n + per_row)


def product_cost(rows: int, n: int, k: int, *, bias: bool = False, beside: int = 0) -> Cost:
    """``rows`` by ``k`` times ``k`` by ``n``, a bias of the product, and so many operations ``beside`` it."""
    flops = 2 * rows * n * k
    return Cost(flops + beside, macs=flops // 2, executed_flops=flops + beside + bias * rows * n)


def pairs(new: int, total: int, *, causal: bool, window: int | None) -> int:
    """Pairs of query and key that attention of the last ``new`` of ``total`` tokens looks at: behind a causal mask the
    query at place p sees p + 1 keys, within a window the last ``window`` of them at most."""
    first = total - new

    def seen(last: int) -> int:
        """Keys of the queries at places 0 to ``last`` - 1 behind both masks."""
        wide = last if window is None else min(last, window)
        return wide * (wide + 1) // 2 + (last - wide) * wide

    both = seen(total) - seen(first)
    if causal:
        return both
    hidden = (total * (total + 1) - first * (first + 1)) // 2 - both  # what lies before the window
    return new * total - hidden


def attention_flops(heads: int, head_dim: int, pairs: int) -> int:
    """Two products, 2 d each, for each pair and head of the queries; the softmax is not counted, as in torch."""
    return 4 * heads * head_dim * pairs


def rotary_flops(tokens: int, heads: int, dim: int) -> int:
    """``x cos + partner sin`` of ``dim`` elements of each head; for each pair of elements of a token an angle, its
    cosine and sine, each times a factor."""
    return tokens * (3 * heads * dim + 5 * (dim // 2))
