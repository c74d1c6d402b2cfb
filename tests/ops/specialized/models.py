"""Small decoders that between them use everything the persistent kernel computes, with random weights."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.plan import Bucket, CacheView, DecodeState, StepInputs
from ops.spec import ALiBiPositions, HeadSpec, LearnedPositions, ModelSpec, RotaryPositions
from ops.weights import ModelWeights, Packer


def rotary(dim: int, *, interleaved: bool = False, factor: float = 1.0) -> RotaryPositions:
    return RotaryPositions(dim, tuple(10000 ** (-2 * i / dim) for i in range(dim // 2)), factor, interleaved)


def decoder(**changes: Any) -> ModelSpec:
    """A small GPT-2 with ``changes``."""
    values: dict[str, Any] = {
        "family": "test", "vocab_size": 1000, "hidden": 256, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 64,
        "ffn": 1024, "activation": "gelu_tanh", "norm": "layernorm", "norm_eps": 1e-5, "placement": "pre",
        "positions": LearnedPositions(2048), "max_positions": 2048, "attention_scale": 0.125, "causal": True,
        "qkv_bias": True, "out_bias": True, "ffn_bias": True, "final_norm": True,
        "head": HeadSpec(task="causal_lm", outputs=1000, tied=True),
    }  # fmt: skip
    return ModelSpec(**{**values, **changes})


BARE = {"qkv_bias": False, "out_bias": False, "ffn_bias": False}
SPECS: dict[str, ModelSpec] = {
    "gpt2": decoder(),
    "llama": decoder(
        norm="rmsnorm", gated=True, activation="silu", positions=rotary(64), heads=8, kv_heads=2, hidden=320, ffn=704,
        vocab_size=3003, **BARE,
    ),
    "windows": decoder(
        windows=(None, 20, None), attention_scale=1.0, scores_in_fp32=True, head_dim=128, heads=3, kv_heads=3,
        hidden=384,
    ),
    "ragged": decoder(
        hidden=200, head_dim=40, heads=6, kv_heads=2, ffn=328, vocab_size=517, activation="relu",
        positions=ALiBiPositions(tuple(2.0**-i for i in range(1, 7))), attention_softcap=20.0, final_softcap=30.0,
    ),
    "one kv head": decoder(
        heads=6, kv_heads=1, positions=rotary(16, interleaved=True, factor=1.3), activation="quick_gelu"
    ),
    "wide heads": decoder(hidden=456, heads=3, kv_heads=3, head_dim=152, activation="gelu", embedding_scale=2.0),
    "offset": decoder(
        positions=LearnedPositions(2050, offset=2), activation="tanh", head=HeadSpec(task="causal_lm", outputs=1000)
    ),
}  # fmt: skip


class Noise:
    """A WeightSource of normal numbers, the same for the same name, rounded to ``dtype``."""

    version = 0

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self.shapes, self._dtype = spec.weight_shapes(), dtype

    def names(self) -> Collection[str]:
        return self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        shape = self.shapes[name]
        found = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        found *= 0.5 / shape[-1] ** 0.5 if len(shape) == 2 and "embed" not in name else 0.3
        return (found + 1 if name.endswith("norm.weight") else found).to(self._dtype)

    def locate(self, name: str) -> str:
        return name


def packed(spec: ModelSpec, dtype: torch.dtype, held: torch.dtype, device: str) -> ModelWeights:
    """Weights rounded to ``dtype`` and held in ``held``."""
    return Packer(spec, Noise(spec, dtype), torch.device(device), held).pack()


def state(
    spec: ModelSpec, rows: int, context: int, dtype: torch.dtype, device: str, page_size: int = 16
) -> DecodeState:
    """Rows of different lengths up to ``context`` over scattered pages; what lies behind a row's end is NaN."""
    widest = -(-(context + 16) // page_size)
    generator = torch.Generator().manual_seed(3)
    table = torch.randperm(rows * widest, generator=generator).view(rows, widest).to(torch.int32)
    positions = torch.tensor([max(context - 7 * row, 0) for row in range(rows)])

    def pool() -> Tensor:
        found = torch.full((rows * widest + 1, page_size, spec.kv_heads, spec.head_dim), torch.nan)
        for row in range(rows):
            for at in range(int(positions[row])):
                found[int(table[row, at // page_size]), at % page_size] = torch.randn(
                    spec.kv_heads, spec.head_dim, generator=generator
                )
        return found.to(device, dtype)

    tokens = torch.randint(0, spec.vocab_size, (rows,), generator=generator)
    keys, values = (tuple(pool() for _ in range(spec.layers)) for _ in range(2))
    return DecodeState(tokens.to(device), positions.to(device), table.to(device), keys, values)


def copied(one: DecodeState, dtype: torch.dtype) -> DecodeState:
    """A copy to compute the same steps on; without NaN, which a masked product of plain PyTorch would let through."""
    keys, values = (tuple(pool.nan_to_num(0).to(dtype) for pool in pools) for pools in (one.keys, one.values))
    return DecodeState(one.tokens.clone(), one.positions.clone(), one.block_table, keys, values)


def eager_logits(spec: ModelSpec, weights: ModelWeights, one: DecodeState) -> Tensor:
    """The eager set's decode step: appends to the pools, gives the logits in fp32."""
    lengths = tuple(int(at) + 1 for at in one.positions)
    size = one.keys[0].shape[1]
    slots = [int(one.block_table[row, (n - 1) // size]) * size + (n - 1) % size for row, n in enumerate(lengths)]
    device = one.tokens.device
    context = torch.tensor(lengths, dtype=torch.int32, device=device)
    pools = (one.keys, one.values, one.block_table, torch.tensor(slots, device=device), context)
    view = CacheView(*pools, lengths, (None,) * one.rows)
    plan = EagerKernels().plan(spec, weights, Bucket("decode"), SingleProcess())
    out = plan.run(StepInputs(one.tokens, one.positions, (1,) * one.rows, None, view)).outputs
    assert out is not None
    return out.float()


def filled(one: DecodeState) -> Tensor:
    """[pages, page size] bool: the slots that hold a token of some row."""
    page_size = one.keys[0].shape[1]
    found = torch.zeros(one.keys[0].shape[:2], dtype=torch.bool)
    for row, length in enumerate(one.positions.tolist()):
        for at in range(length):
            found[int(one.block_table[row, at // page_size]), at % page_size] = True
    return found.to(one.tokens.device)
