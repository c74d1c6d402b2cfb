"""The persistent decode kernel (``ops/csrc/persistent_decode.cu``), compiled by NVRTC through CuPy for one model and
batch.

One launch computes a whole decode step, or several: every block stays on its multiprocessor, a warp of it streams the
weights through shared memory without ever waiting for the phase that uses them, and blocks hand each other small
vectors through L2. The source says how; this module decides the sizes, compiles, and keeps the buffers.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.costs import Cost, priced, region
from ops.errors import KernelError
from ops.plan import DecodeState
from ops.quantization.tensor import QuantizedTensor
from ops.spec import Activation, ALiBiPositions, LearnedPositions, ModelSpec, RotaryPositions
from ops.specialized.addresses import address, linear_parts, norm_parts
from ops.specialized.streams import current_stream
from ops.step_costs import decode_cost
from ops.weights import LayerWeights, ModelWeights, model_parameters

log = logging.getLogger("slipstream.kernels")

SOURCES = (
    "primitives.cuh", "persistent_common.cuh", "persistent_gemm.cuh", "persistent_attention.cuh",
    "persistent_stream.cuh", "persistent_decode.cu"
)  # fmt: skip
ACTIVATIONS: dict[Activation, int] = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "relu": 3, "silu": 4, "tanh": 5}
#: Batches it is compiled for; a batch between two of them takes the larger.
ROWS = (1, 2, 4, 8, 16)
#: (hidden, ffn) of models for which the decode plan of ``generic`` was measured ahead beyond so many rows
#: (benchmarks/RESULTS.md): GPT-Neo 2.7B's 16 rows of 20 heads of 128 take attention three rounds.
AHEAD_ROWS: dict[tuple[int, int], int] = {(2560, 10240): 8}
#: Up to this batch, what every block reads lies there twice, so that fewer stand in line for a word.
COPIED_BATCH = 4
MAX_SPLITS = 16
FEWEST_STAGES, MOST_STAGES = 4, 24
#: What a block asks of the memory at a time: enough for its bandwidth, and no long line for what else is asked.
IN_FLIGHT_BYTES = 40000
#: Columns of a stage: at most so many, and not fewer, since short copies do not reach the memory's bandwidth.
MOST_COLUMNS, FEWEST_COLUMNS = 1024, 736
#: What the scouting warp of each block brings to L2 ahead of the ring: all blocks together a fifth of it.
AHEAD_BYTES = 90000
THREADS = 352
WARPS, GROUP_ROWS = 8, 32
#: Pointers before the layers' in the kernel's table, and of each layer (the enums of persistent_common.cuh).
POINTERS, LAYER_POINTERS = 20, 15
#: What blocks hand each other, in the order of the table.
EXCHANGED = ("STREAM", "HIDDEN_ACT", "FRESH", "ATTENDED", "PARTIALS", "BEST", "TURNS")
SHARED_LIMIT = 232448


def unsupported(spec: ModelSpec, weights: ModelWeights | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot run this model, in one line, or None."""
    head = spec.head
    linears = [] if weights is None else [getattr(layer, name) for layer in weights.layers for name in LINEARS]
    reasons = {
        f"it computes in fp16 or bf16, not {dtype}": dtype not in (torch.float16, torch.bfloat16),
        "it needs an NVIDIA GPU of compute capability 9.0 or newer": device.type != "cuda"
        or torch.cuda.get_device_capability(device) < (9, 0),
        "it needs CuPy: install slipstream's extra cuda13 or cuda12": importlib.util.find_spec("cupy") is None,
        "it computes causal language models whose norms stand before each half": not spec.causal
        or spec.placement != "pre"
        or not spec.final_norm
        or head is None
        or head.task != "causal_lm",
        "norms of queries and keys, of embeddings, or projected embeddings are not built in": spec.qk_norm
        or spec.embedding_norm
        or spec.embedding_size is not None
        or spec.token_types > 0,
        f"head size {spec.head_dim} is not a multiple of 8 up to 256": spec.head_dim % 8 != 0 or spec.head_dim > 256,
        f"hidden {spec.hidden} and feed-forward {spec.ffn} are not multiples of 8": bool(
            spec.hidden % 8 or spec.ffn % 8
        ),
        "rotary embedding turns a number of elements that is no multiple of 4": isinstance(
            spec.positions, RotaryPositions
        )
        and spec.positions.dim % 4 != 0,
        "quantized weights are not supported yet": any(isinstance(one.weight, QuantizedTensor) for one in linears),
        "its table of layers does not fit shared memory": spec.layers > 256,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


LINEARS = ("qkv", "out", "up", "down")


@dataclass(frozen=True)
class Product:
    """A product as ``Product`` in persistent_common.cuh has it: ``units`` of ``unit`` rows, of k columns."""

    k: int
    unit: int
    units: int

    def stages(self, blocks: int, stage_bytes: int) -> tuple[int, int]:
        """How many stages of the ring a block needs at most, and their columns."""
        most = -(-self.units // blocks)
        groups = -(-most * self.unit // GROUP_ROWS)
        rows = -(-most // groups) * self.unit
        tiles = -(-rows // 8)
        tall = -(-rows // tiles)
        chunks = -(-self.k // min((stage_bytes // tall - 64) // 2 // 32 * 32, MOST_COLUMNS))
        return groups * tiles * chunks, -(-self.k // chunks)


def products(spec: ModelSpec) -> tuple[Product, Product, Product, Product]:
    """Of a layer: QKV, out, up, down."""
    halves = isinstance(spec.positions, RotaryPositions) and not spec.positions.interleaved
    qkv, up = 4 if halves else 2, 4 if spec.gated else 2
    return (
        Product(spec.hidden, qkv, (spec.q_size + 2 * spec.kv_size) // qkv),
        Product(spec.q_size, 1, spec.hidden),
        Product(spec.hidden, up, spec.ffn // 2),
        Product(spec.ffn, 1, spec.hidden),
    )


@dataclass(frozen=True)
class Layout:
    """How a block divides its shared memory, in bytes.

    stages, stage_bytes: of the ring of weights. staged: for a phase's x. own: rows of the residual stream that a block
    computes. direct: the down projection reads its x from L2, because [rows, ffn] does not fit. fits: a whole layer's
    stages are in the ring at once.
    """

    stages: int
    stage_bytes: int
    staged: int
    own: int
    direct: bool
    fits: bool
    total: int

    @classmethod
    def of(cls, spec: ModelSpec, rows: int, blocks: int) -> Layout:
        """The layout for a batch of ``rows``. Raises :class:`KernelError` if not even a short ring would fit."""

        def staged(k: int) -> int:
            return rows * (-(-k // 32) * 64 + 64)

        sharing = min(4, spec.heads // spec.kv_heads)
        attention = WARPS * sharing * (spec.head_dim + 4) * 4
        needed = max(staged(spec.hidden), staged(spec.q_size), attention)
        down = staged(spec.ffn)
        direct = down > 90112
        x = -(-max(needed, 0 if direct else down) // 128) * 128
        own = -(-spec.hidden // blocks) + 1
        fixed = x + (2 if rows <= 4 else 1) * WARPS * rows * GROUP_ROWS * 4
        if isinstance(spec.positions, RotaryPositions):
            fixed += rows * spec.positions.dim * 4
        fixed += (1 if spec.norm == "rmsnorm" else 2) * spec.hidden * 4
        fixed += (2 * own + (spec.q_size + 2 * spec.kv_size) // blocks + 2 * spec.ffn // blocks + 32) * 4
        fixed += (POINTERS + spec.layers * LAYER_POINTERS) * 8 + rows * own * 4 + WARPS * 8 + rows * 24 + 1024
        stages, size, count = _ring(spec, blocks, SHARED_LIMIT - fixed)
        if stages < FEWEST_STAGES:
            raise KernelError(f"the persistent kernel's shared memory does not hold {rows} rows of {spec.hidden}")
        return cls(stages, size, x, own, direct, count <= stages and not direct, fixed + stages * (size + 16))


def _ring(spec: ModelSpec, blocks: int, room: int) -> tuple[int, int, int]:
    """(stages, bytes of one, stages of a layer) such that the ring holds most of a layer: stages as full as may be."""
    found = (0, 0, 0)
    best, layer = 0.0, products(spec)
    for size in range(8192, 24577, 128):
        stages, cuts = min(room // (size + 16), MOST_STAGES), [(one, *one.stages(blocks, size)) for one in layer]
        count = sum(stages for _, stages, _ in cuts)
        short = any(columns < min(FEWEST_COLUMNS, one.k) for one, _, columns in cuts)
        if stages >= FEWEST_STAGES and not short and stages / count > best:
            best, found = stages / count, (stages, size, count)
    return found


def blocks_for(spec: ModelSpec, device: torch.device) -> int:
    """One block a multiprocessor; fewer where some would own no row of a product."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    units = (spec.hidden, spec.ffn // 2, (spec.q_size + 2 * spec.kv_size) // 4, spec.vocab_size)
    return min(count, 256, *units)


def unfit(spec: ModelSpec, rows: int, device: torch.device) -> str | None:
    """Why the kernel does not serve so many rows of a model that it supports, in one line, or None."""
    if rows not in ROWS:
        return f"the persistent kernel takes up to {ROWS[-1]} rows"
    if rows > AHEAD_ROWS.get((spec.hidden, spec.ffn), rows):
        return "that was measured to be faster for a model of this size"
    try:
        Layout.of(spec, rows, blocks_for(spec, device))
    except KernelError as error:
        return str(error)
    return None


def macros(
    spec: ModelSpec, rows: int, layout: Layout, blocks: int, page_size: int, dtype: torch.dtype
) -> dict[str, str]:
    """What the CUDA source calls this model."""
    rotary = spec.positions if isinstance(spec.positions, RotaryPositions) else None
    learned = spec.positions if isinstance(spec.positions, LearnedPositions) else None
    integers = {
        "BF16": int(dtype == torch.bfloat16), "M": rows, "LAYERS": spec.layers, "HIDDEN": spec.hidden, "FFN": spec.ffn,
        "HEADS": spec.heads, "KV_HEADS": spec.kv_heads, "HEAD_DIM": spec.head_dim, "VOCAB": spec.vocab_size,
        "GATED": int(spec.gated), "RMS_NORM": int(spec.norm == "rmsnorm"),
        "LEARNED_POSITIONS": int(learned is not None), "POSITION_OFFSET": learned.offset if learned else 0,
        "ROTARY_DIM": rotary.dim if rotary else 0, "ROTARY_INTERLEAVED": int(rotary.interleaved) if rotary else 0,
        "ALIBI": int(isinstance(spec.positions, ALiBiPositions)),
        "ACTIVATION": ACTIVATIONS[spec.activation], "PAGE_SIZE": page_size, "MAX_SPLITS": MAX_SPLITS, "BLOCKS": blocks,
        "COPIES": _copies(rows), "STAGE_BYTES": layout.stage_bytes, "STAGES": layout.stages, "DEFER": int(layout.fits),
        # Where x is read from L2 as well, twice the traffic there costs more than it gains.
        "AHEAD": 0 if layout.direct else round(AHEAD_BYTES / layout.stage_bytes),
        "IN_FLIGHT": min(max(2, round(IN_FLIGHT_BYTES / layout.stage_bytes)), layout.stages),
        "STAGED_BYTES": layout.staged, "OWN_ROWS": layout.own, "DOWN_DIRECT": int(layout.direct),
        "DIRECT_COLUMNS": 1024 if rows <= 8 else 512, "SHARED_BYTES": layout.total,
    }  # fmt: skip
    floats = {
        "NORM_EPS": spec.norm_eps, "EMBEDDING_SCALE": spec.embedding_scale,
        "ROTARY_FACTOR": rotary.factor if rotary else 1.0, "ATTENTION_SCALE": spec.attention_scale,
        "ATTENTION_SOFTCAP": spec.attention_softcap or 0.0, "FINAL_SOFTCAP": spec.final_softcap or 0.0,
    }  # fmt: skip
    return {**{k: str(v) for k, v in integers.items()}, **{k: f"{float(v)!r}f" for k, v in floats.items()}}


def text_of(name: str) -> str:
    """One of the CUDA sources, to stand behind the others."""
    return (Path(__file__).parent.parent / "csrc" / name).read_text("utf-8").replace("#pragma once", "")


@cache
def source() -> str:
    """The CUDA source in one piece."""
    return "\n".join(map(text_of, SOURCES))


def compile_kernel(defines: dict[str, str], shared: int) -> Any:
    """The kernel for these macros, on the current device; NVRTC's work is cached on disk by CuPy."""
    try:
        import cupy
    except (ImportError, RuntimeError, OSError) as error:
        raise _does_not_compile(error) from error
    text = "".join(f"#define {name} {value}\n" for name, value in defines.items()) + source()
    try:
        module = cupy.RawModule(code=text, options=("--std=c++17",), enable_cooperative_groups=True)
        kernel = module.get_function("persistent_decode")
        kernel.max_dynamic_shared_size_bytes = shared
    # The driver's errors are RuntimeErrors, and what CuPy raises where NVRTC is missing.
    except (cupy.cuda.compiler.CompileException, RuntimeError, OSError) as error:
        raise _does_not_compile(error) from error
    return kernel


def _does_not_compile(error: Exception) -> KernelError:
    return KernelError(f'the persistent kernel does not compile here ({str(error)[:300]}): set "kernels" to "generic"')


def _decode_cost(result: None, decoder: PersistentDecoder, out: Tensor, *, greedy: bool) -> Cost:
    """Of as many steps as ``out`` has rows. Greedy ones have moved the positions on by now."""
    steps = out.shape[0]
    first = [place + 1 - (steps if greedy else 0) for place in decoder.state.positions.tolist()]
    contexts = [[context + step for context in first] for step in range(steps)]
    return decode_cost(
        decoder.spec, contexts, decoder.weight_bytes, decoder.state.keys[0].element_size(), logits=not greedy
    )


class PersistentDecoder:
    """Decode steps of one model for the rows of one :class:`DecodeState`, all in one kernel."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, state: DecodeState) -> None:
        """Compiles the kernel (seconds, the first time). Raises :class:`KernelError` if it cannot serve."""
        self.spec, self.state = spec, state
        device, dtype = state.keys[0].device, state.keys[0].dtype
        reason = unsupported(spec, weights, dtype, device)
        if reason is not None or state.rows not in ROWS:
            raise KernelError(
                f'the persistent kernel cannot run this: {reason or f"{state.rows} rows"}; set "kernels" to "generic"'
            )
        self.blocks = blocks_for(spec, device)
        self.layout = Layout.of(spec, state.rows, self.blocks)
        log.info("compiling the decode kernel for %d rows: seconds the first time, cached on disk after", state.rows)
        with torch.cuda.device(device):
            self._kernel = compile_kernel(
                macros(spec, state.rows, self.layout, self.blocks, state.keys[0].shape[1], dtype), self.layout.total
            )
        self.device = device
        self._logits = torch.zeros(state.rows, spec.vocab_size, dtype=torch.float32, device=device)
        self._nothing = torch.zeros(1, state.rows, dtype=torch.int64, device=device)
        self._buffers = _exchange(spec, state.rows, self.blocks, device)
        constants = _constants(spec, device)
        held = model_parameters(spec, weights)
        self._parameters = tuple(one for part in held.values() for one in part)
        #: Of what each step reads whole: all but the tables of the input.
        self.weight_bytes = sum(one.bytes for name, part in held.items() if name != "embed" for one in part)
        if spec.head is not None and spec.head.tied:
            self.weight_bytes += weights.embed.table.nbytes
        self._kept = (weights, constants)  # the table holds their addresses
        chosen = _table(spec, weights, state, self._buffers, constants, None)
        full = _table(spec, weights, state, self._buffers, constants, self._logits)
        self._tables = {True: chosen.to(device), False: full.to(device)}

    def logits(self, longest: int) -> Tensor:
        """One step: [rows, vocabulary] fp32. Any context that the block table holds is served."""
        with region("step", "step", self._parameters):
            self._launch(self._nothing, greedy=False)
        return self._logits

    def greedy(self, out: Tensor) -> bool:
        """``len(out)`` steps in one launch."""
        if out.shape[0]:
            with region("step", "step", self._parameters):
                self._launch(out, greedy=True)
        return True

    @priced(_decode_cost, name="persistent_decode")
    def _launch(self, out: Tensor, *, greedy: bool) -> None:
        import cupy

        table = self._tables[greedy]
        with cupy.cuda.Device(self.device.index), current_stream(self.device):
            arguments = (table.data_ptr(), out.data_ptr(), cupy.int32(out.shape[0]), cupy.int32(greedy))
            self._kernel((self.blocks,), (THREADS,), arguments, shared_mem=self.layout.total)


def _copies(rows: int) -> int:
    return 2 if rows <= COPIED_BATCH else 1


def _exchange(spec: ModelSpec, rows: int, blocks: int, device: torch.device) -> dict[str, Tensor]:
    """Words of 32 bits that blocks hand each other, two buffers of each kind. All ones: nothing has arrived."""
    read_by_all = {
        "STREAM": rows * spec.hidden,
        "HIDDEN_ACT": rows * spec.ffn // 2,
        "ATTENDED": rows * spec.q_size // 2,
    }
    words = {name: _copies(rows) * size for name, size in read_by_all.items()} | {
        "FRESH": rows * (spec.q_size + 2 * spec.kv_size) // 2,
        "PARTIALS": rows * spec.heads * MAX_SPLITS * (spec.head_dim + 4),
        "BEST": rows * blocks * 2,
    }
    buffers = {name: torch.full((2 * size,), -1, dtype=torch.int32, device=device) for name, size in words.items()}
    return buffers | {"TURNS": torch.zeros(blocks, dtype=torch.int32, device=device)}


def _constants(spec: ModelSpec, device: torch.device) -> dict[str, Tensor]:
    found = {}
    if isinstance(spec.positions, RotaryPositions):
        found["INV_FREQ"] = torch.tensor(spec.positions.inv_freq, dtype=torch.float32, device=device)
    if isinstance(spec.positions, ALiBiPositions):
        found["SLOPES"] = torch.tensor(spec.positions.slopes, dtype=torch.float32, device=device)
    return found


def _table(
    spec: ModelSpec,
    weights: ModelWeights,
    state: DecodeState,
    buffers: dict[str, Tensor],
    constants: dict[str, Tensor],
    logits: Tensor | None,
) -> Tensor:
    """The kernel's pointers, in the order of the enums in persistent_common.cuh."""
    head = weights.head
    assert head is not None
    assert head.out is not None
    entries = [weights.embed.table, weights.embed.position, *norm_parts(weights.final_norm), *linear_parts(head.out)]
    entries += [
        state.block_table,
        state.tokens,
        state.positions,
        constants.get("INV_FREQ"),
        constants.get("SLOPES"),
        logits,
    ]
    entries += [buffers[name] for name in EXCHANGED]
    words = [address(entry) for entry in entries] + [state.block_table.shape[1]]
    assert len(words) == POINTERS
    for index, layer in enumerate(weights.layers):
        words += [*_layer(layer, state.keys[index], state.values[index]), spec.window(index) or 0]
    assert len(words) == POINTERS + len(weights.layers) * LAYER_POINTERS
    return torch.tensor(words, dtype=torch.int64)


def _layer(layer: LayerWeights, keys: Tensor, values: Tensor) -> list[int]:
    parts: list[Tensor | None] = [*norm_parts(layer.attn_norm), *linear_parts(layer.qkv), *linear_parts(layer.out)]
    parts += [*norm_parts(layer.ffn_norm), *linear_parts(layer.up), *linear_parts(layer.down), keys, values]
    return [address(part) for part in parts]
