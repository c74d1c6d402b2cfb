"""Which of the kernels' tests ``make sanitize`` runs: a few small cases of each kernel get the marker ``sanitize``.

compute-sanitizer slows kernels down up to a hundredfold, so sizes are the smallest that no tile divides. PyTorch's
caching allocator would hide what is read beyond a tensor; with it off nothing can be captured in a CUDA graph, so tests
that capture stay out, and those of the kernels that they capture are in.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch

#: Test by path below tests/ops and name, with the values that some of its parameters must have.
SANITIZED: Mapping[str, Mapping[str, Collection[Any]]] = {
    "compression/test_triton_signs.py::test_pack": {
        "dtype": [torch.float16],
        "block": [64],
        "more": [13, 5],
        "kind": ["odd", "empty"],
    },
    "compression/test_triton_signs.py::test_unpack": {
        "dtype": [torch.float16],
        "block": [64],
        "more": [9, 3],
        "kind": ["odd", "empty"],
    },
    "compression/test_triton_signs.py::test_many_sums_of_one_part": {},
    "gemm/test_skinny.py::test_products": {"dtype": [torch.float16], "shape": [(3, 9, 77), (20, 3, 40)]},
    "gemm/test_skinny.py::test_norms": {
        "dtype": [torch.bfloat16],
        "shape": [(3, 9, 77)],
        "norm": ["layernorm"],
        "gated": [True],
    },
    "gemm/test_skinny.py::test_where_tensors_begin": {"offset": [1]},
    "gemm/test_skinny.py::test_residual_may_be_out": {},
    "generic/test_activation.py::test_activate": {"dtype": [torch.float16], "activation": ["gelu"]},
    "generic/test_attention.py::test_decode": {"dtype": [torch.float16], "kind": ["groups", "all together"]},
    "generic/test_attention.py::test_decode_with_heads_of_any_size": {"dtype": [torch.float16], "size": [5, 152]},
    "generic/test_attention.py::test_a_context_beyond_the_table_reads_nothing_behind_it": {},
    "generic/test_attention.py::test_within_sequences": {"dtype": [torch.float16], "kind": ["all together"]},
    "generic/test_attention.py::test_sequences_with_heads_of_any_size": {"dtype": [torch.float16], "size": [5, 152]},
    "generic/test_attention.py::test_over_the_cache": {"dtype": [torch.float16], "kind": ["window", "all together"]},
    "generic/test_decoder.py::test_place": {},
    "generic/test_embed.py::test_embed": {"dtype": [torch.float16], "n": [33], "parts": ["all", "looked up"]},
    "generic/test_encoder.py::test_locate": {"rows": [31]},
    "generic/test_norm.py::test_norm": {"dtype": [torch.float16], "shape": [(7, 33), (2, 1)]},
    "generic/test_qkv.py::test_split": {
        "dtype": [torch.float16],
        "tokens": [5],
        "case": ["part in pairs", "norm and rotary"],
    },
    "generic/test_residual.py::test_add_residual": {"dtype": [torch.float16], "shape": [(5, 33), (2, 1)]},
    "generic/test_kernel_set.py::test_over_the_cache": {"model": ["norms of heads"]},
    "specialized/test_encoder_rows.py::test_embeddings": {"dtype": [torch.float16], "n": [50], "kind": ["all"]},
    "specialized/test_encoder_rows.py::test_an_id_outside_the_table_is_told": {},
    "specialized/test_encoder_rows.py::test_norm_of_rows": {"dtype": [torch.float16], "shape": [(7, 33)]},
    "specialized/test_tile_gemm.py::test_product": {"dtype": [torch.float16], "shape": [(21, 50, 70), (33, 17, 33)]},
    "specialized/test_tile_gemm.py::test_norm_of_the_input": {"dtype": [torch.float16], "kind": ["layernorm"]},
    "specialized/test_tile_gemm.py::test_norm_of_the_residual": {"dtype": [torch.float16], "kind": ["layernorm"]},
    "specialized/test_tile_gemm.py::test_statistics_of_the_result": {"dtype": [torch.float16], "n": [50]},
    "specialized/test_tile_gemm.py::test_a_workspace_serves_launch_after_launch": {},
    "specialized/test_persistent.py::test_steps_against_eager_in_fp32": {
        "dtype": [torch.float16],
        "name": ["ragged", "windows"],
        "rows": [1, 4],
        "context": [37, 50],
    },
    "specialized/test_persistent.py::test_greedy_steps_are_the_same_steps": {"name": ["ragged"], "rows": [2]},
}


def selected(nodeid: str, parameters: Mapping[str, Any]) -> str | None:
    """The entry of :data:`SANITIZED` that a test belongs to."""
    name = nodeid.partition("[")[0].removeprefix("tests/ops/")
    wanted = SANITIZED.get(name)
    if wanted is None or not all(parameters.get(key) in values for key, values in wanted.items()):
        return None
    return name


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives the marker, ahead of ``-m``."""
    for item in items:
        call = getattr(item, "callspec", None)
        if item.get_closest_marker("gpu") and selected(item.nodeid, {} if call is None else call.params):
            item.add_marker("sanitize")
