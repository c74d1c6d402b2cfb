"""Compiles the attention kernels for Hopper, which needs no GPU: the interpreter takes what the compiler refuses.

``python -m tests.ops.generic.compile_attention`` prints the shared memory each takes. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops.generic import attention, attention_decode

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Arguments by type; "pool" ones are of the dtype that is tried, all others are int32 scalars.
POOL = ("q", "k", "v", "k_pool", "v_pool", "out")
POINTERS = {"table": "*i32", "context": "*i32", "starts": "*i32", "slopes": "*fp32", "sums": "*fp32", "maxima": "*fp32"}
FLOATS = ("factor", "cap")


def compiled(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], warps: int, stages: int) -> int:
    """Bytes of shared memory of ``kernel`` where pointers and strides are aligned to 16, as they are in models."""
    names = kernel.arg_names
    types = {**dict.fromkeys(POOL, f"*{TYPES[dtype]}"), **POINTERS, **dict.fromkeys(FLOATS, "fp32")}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name.endswith("_stride")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True}
    return int(triton.compile(source, target=HOPPER, options=options).metadata.shared)


def decode(dtype: torch.dtype, size: int, split: bool) -> int:
    """Decode attention with four query heads a KV head, all features on."""
    width = attention_decode.power_of_two(size)
    tile = attention_decode.Tile.of(4, width, dtype)
    constants = {
        "KV_HEADS": 8, "GROUP": 4, "HEAD": size, "D": width, "PAGE": 16, "ROWS": tile.rows, "PARTS": tile.parts,
        "LANES": tile.lanes, "EXACT": dtype == torch.float32, "SPLIT": split, "WINDOWED": True, "CAPPED": True,
        "WIDEN": False, "PDL": True,
    }  # fmt: skip
    return compiled(attention_decode._decode_kernel, dtype, constants, attention_decode.WARPS, tile.stages)


def combine(size: int) -> int:
    """The second launch of split decode attention."""
    width = attention_decode.power_of_two(size)
    constants = {
        "HEADS": 32, "HEAD": size, "D": width, "PAGE": 16, "PARTS": 4, "KEYS": 64, "BLOCK": 32, "CHUNK": 4096 // width,
        "WINDOWED": True, "PDL": True,
    }  # fmt: skip
    return compiled(attention_decode._combine_kernel, torch.float16, constants, attention_decode.WARPS, 3)


def flash(dtype: torch.dtype, size: int, page: int, sequences: int) -> int:
    """Attention of sequences of 1024 tokens, causal, all features but the window on."""
    width = attention.power_of_two(size)
    tile = attention.Tile.of(sequences, 32, 1024, width, torch.empty(0, dtype=dtype))
    constants = {
        "HEADS": 32, "KV_HEADS": 8, "HEAD": size, "D": width, "PAGE": page, "QUERIES": tile.queries, "KEYS": tile.keys,
        "CAUSAL": True, "WINDOWED": False, "CAPPED": True, "PHASES": dtype != torch.float32, "WIDEN": False,
        "PDL": True, **({} if page else {"table": None, "context": None}),
    }  # fmt: skip
    return compiled(attention._flash_kernel, dtype, constants, tile.warps, tile.stages)


def main() -> None:
    """Compiles what differs most."""
    for dtype, size in ((torch.float16, 64), (torch.bfloat16, 152), (torch.float32, 128)):
        for split in (False, True):
            print("decode", TYPES[dtype], size, decode(dtype, size, split))
        for page, sequences in ((0, 1), (16, 16)):
            print("flash", TYPES[dtype], size, flash(dtype, size, page, sequences))
    print("combine", combine(80))


if __name__ == "__main__":
    main()
