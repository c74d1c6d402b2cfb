"""The shapes and the measuring that benchmarks of the skinny GEMM share: cases, weights rotated beyond L2, graphs,
bandwidth."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ops import reference
from ops.gemm.config import key
from ops.spec import Activation, NormKind
from ops.weights import Norm

#: Copies of a weight that take turns hold together at least so many bytes, several times the L2.
ROTATED_BYTES = 400_000_000
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Relative error (norm of the difference over norm of the fp32 product) up to which a result is right.
RIGHT = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """One linear layer: K inputs, N outputs (2 N rows if gated), what is fused in front and behind."""

    name: str
    inner: int
    columns: int
    norm: NormKind | None = None
    bias: bool = False
    activation: Activation | None = None
    gated: bool = False
    residual: bool = False
    dtype: torch.dtype = torch.float16

    @property
    def bare(self) -> Case:
        """Its product alone."""
        return Case(f"{self.inner} x {self.columns}", self.inner, self.columns, gated=self.gated, dtype=self.dtype)

    @property
    def height(self) -> int:
        """Rows of the weight."""
        return self.columns * (2 if self.gated else 1)

    @property
    def bytes(self) -> int:
        """Bytes of the weight."""
        return self.height * self.inner * self.dtype.itemsize

    def key(self, rows: int) -> str:
        """Its name in a table of tuned configs."""
        return key(self.dtype, rows, self.columns, self.inner, self.gated, self.norm is not None)


def plain_cases(dtype: torch.dtype) -> list[Case]:
    """Linear layers of well-known models, alone: K x N."""
    shapes = {
        "GPT-2 qkv": (768, 2304),
        "GPT-2 fc1": (768, 3072),
        "GPT-2 fc2": (3072, 768),
        "BERT-large fc": (1024, 4096),
        "XL qkv": (1600, 4800),
        "XL fc1": (1600, 6400),
        "XL fc2": (6400, 1600),
        "Neo fc": (2560, 10240),
        "17B fc": (4256, 17024),
        "175B qkv": (12288, 36864),
        "175B fc2": (49152, 12288),
        "175B/8 fc1": (12288, 6144),
    }
    return [Case(name, inner, columns, dtype=dtype) for name, (inner, columns) in shapes.items()]


def _layers(
    name: str, hidden: int, qkv: int, ffn: int, norm: NormKind | None, activation: Activation, dtype: torch.dtype
) -> list[Case]:
    """A layer's four linear layers as decode runs them; RMSNorm goes with a gate and without biases, as in Llama."""
    llama = norm == "rmsnorm"
    up = Case(f"{name} up", hidden, ffn, norm, not llama, activation, gated=llama, dtype=dtype)
    return [
        Case(f"{name} qkv", hidden, qkv, norm, not llama, dtype=dtype),
        Case(f"{name} out", hidden, hidden, bias=not llama, residual=True, dtype=dtype),
        up,
        Case(f"{name} down", ffn, hidden, bias=not llama, residual=True, dtype=dtype),
    ]


def model_cases(dtype: torch.dtype) -> list[Case]:
    """The linear layers of whole models, with what decode fuses to them."""
    gelu: Activation = "gelu_tanh"
    cases = [
        *_layers("GPT-2", 768, 2304, 3072, "layernorm", gelu, dtype),
        Case("GPT-2 head", 768, 50257, "layernorm", dtype=dtype),
        *_layers("XL", 1600, 4800, 6400, "layernorm", gelu, dtype),
        Case("XL head", 1600, 50257, "layernorm", dtype=dtype),
        *_layers("Neo", 2560, 7680, 10240, "layernorm", gelu, dtype),
        Case("Neo head", 2560, 50257, "layernorm", dtype=dtype),
        *_layers("Llama-1B", 2048, 3072, 8192, "rmsnorm", "silu", dtype),
        Case("Llama-1B head", 2048, 128256, "rmsnorm", dtype=dtype),
        *_layers("Llama-7B", 4096, 12288, 11008, "rmsnorm", "silu", dtype),
        Case("Llama-7B head", 4096, 32000, "rmsnorm", dtype=dtype),
        *_layers("BERT-base", 768, 2304, 3072, None, "gelu", dtype),
        *_layers("BERT-large", 1024, 3072, 4096, None, "gelu", dtype),
    ]
    return cases


@dataclass(frozen=True)
class Data:
    """Tensors of a case: weights that take turns, the rest, x [64, K], and the fp32 result [64, N]."""

    case: Case
    weights: Sequence[Tensor]
    bias: Tensor | None
    norm: Norm | None
    residual: Tensor | None
    x: Tensor
    exact: Tensor

    def options(self, rows: int) -> dict[str, Any]:
        """What ``skinny_gemm`` takes beside x and the weight."""
        return {
            "bias": self.bias,
            "norm": self.norm,
            "norm_kind": self.case.norm or "layernorm",
            "activation": self.case.activation,
            "gated": self.case.gated,
            "residual": None if self.residual is None else self.residual[:rows],
        }

    def error(self, y: Tensor) -> float:
        """Relative error of a result [rows, N] of the first weight."""
        exact = self.exact[: y.shape[0]]
        return float((y.float() - exact).norm() / exact.norm())


def data(case: Case, rows: int, copies: int | None = None) -> Data:
    """Random tensors for up to ``rows`` rows."""

    def noise(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=case.dtype) * scale

    count = copies or max(2, min(64, -(-ROTATED_BYTES // case.bytes)))
    weights = [noise(case.height, case.inner, scale=case.inner**-0.5) for _ in range(count)]
    bias = noise(case.height) if case.bias else None
    norm = None
    if case.norm is not None:
        norm = Norm(1 + noise(case.inner, scale=0.1), noise(case.inner) if case.norm == "layernorm" else None)
    residual = noise(rows, case.columns) if case.residual else None
    x = noise(rows, case.inner)
    exact = reference.skinny_gemm(
        x.float(),
        weights[0].float(),
        None if bias is None else bias.float(),
        norm_weight=None if norm is None else norm.weight.float(),
        norm_bias=None if norm is None or norm.bias is None else norm.bias.float(),
        norm_kind=case.norm or "layernorm",
        activate=case.activation,
        gated=case.gated,
        residual=None if residual is None else residual.float(),
    )
    return Data(case, weights, bias, norm, residual, x, exact)


def cublas(one: Data, rows: int) -> Callable[[], object]:
    """The products alone, by cuBLAS, of every weight."""
    x = one.x[:rows]
    return lambda: [F.linear(x, weight) for weight in one.weights]


def graph(run: Callable[[], object], warm: bool = False) -> torch.cuda.CUDAGraph:
    """``run`` captured, after a call that compiles and allocates unless that is done."""
    if not warm:
        run()
        torch.cuda.synchronize()
    found = torch.cuda.CUDAGraph()
    with torch.cuda.graph(found):
        run()
    return found


def replays(graphs: Sequence[torch.cuda.CUDAGraph], calls: int, rounds: int) -> list[float]:
    """Microseconds of one of the ``calls`` launches in each graph: median over rounds that replay all of them in
    turn."""
    times: list[list[float]] = [[] for _ in graphs]
    for index in range(rounds + 1):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in graphs]
        for (before, after), one in zip(events, graphs, strict=True):
            before.record()
            one.replay()
            after.record()
        torch.cuda.synchronize()
        if index:
            for found, (before, after) in zip(times, events, strict=True):
                found.append(before.elapsed_time(after) * 1e3 / calls)
    return [statistics.median(found) for found in times]


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(source, sink, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + at, mask=at < size, other=0, eviction_policy="evict_first")
    tl.store(sink + tl.program_id(0), tl.sum(value, 0))


def read_bandwidth(size: int = 4_000_000_000) -> float:
    """Bytes a second that the GPU reads from its memory: the best of several launches over ``size`` bytes."""
    source = torch.zeros(size // 4, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps in ((4096, 4), (8192, 8), (8192, 4), (16384, 8)):
        blocks = -(-source.numel() // block)
        sink = torch.empty(blocks, dtype=torch.int32, device="cuda")

        def run(block: int = block, warps: int = warps, blocks: int = blocks, sink: Tensor = sink) -> None:
            _read_kernel[(blocks,)](source, sink, source.numel(), BLOCK=block, num_warps=warps)

        (micros,) = replays([graph(run)], 1, 5)
        best = max(best, size / micros * 1e6)
    return best
