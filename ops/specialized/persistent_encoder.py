"""The persistent encoder kernel (``ops/csrc/persistent_encoder.cu``), compiled by NVRTC for one model and number of
rows.

One launch computes all layers: every block stays on its multiprocessor and takes its part of each phase, a warp of it
brings weights in before the phase begins that needs them, and what a phase needs of another is looked out for element
by element. Launches of their own leave the memory idle between any two of them, and cannot ask for weights so early.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ops.cache import cache_directory, write_aside
from ops.costs import Cost, Parameters, priced, region
from ops.errors import KernelError
from ops.generic.encoder_graph import EncoderGraphs, Head, Limits, Place, StaticForward, StepBuffers
from ops.spec import LearnedPositions, ModelSpec
from ops.specialized.addresses import address, linear_parts, norm_parts, not_plain
from ops.specialized.encoder_forward import embed_step
from ops.specialized.encoder_layout import Choice, Layout, ceil_div, compiled_rows
from ops.specialized.encoder_rows import norm_rows
from ops.specialized.persistent import ACTIVATIONS, SHARED_LIMIT, text_of
from ops.specialized.streams import current_stream
from ops.specialized.tile_gemm import Statistics
from ops.specialized.tile_map import TILE, Driver
from ops.step_costs import encoder_layers_cost
from ops.weights import LayerWeights, ModelWeights, model_parameters

log = logging.getLogger("slipstream.kernels")

SOURCES = ("encoder_common.cuh", "encoder_product.cuh", "encoder_attention.cuh", "persistent_encoder.cu")
THREADS = 160
LAYER_POINTERS = 8
#: What a word holds where nothing has arrived: all ones.
NOTHING = -1


def unsupported(spec: ModelSpec, weights: ModelWeights | None, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernel cannot run this model, in one line, or None."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if importlib.util.find_spec("cupy") is None:
        return "it needs CuPy (pip install cupy-cuda12x)"
    return structure(spec, dtype) or (None if weights is None else not_plain(weights))


def structure(spec: ModelSpec, dtype: torch.dtype) -> str | None:
    """Why no GPU would do, in one line, or None."""
    reasons = {
        "it computes in fp16 or bf16": dtype not in (torch.float16, torch.bfloat16),
        "norms stand behind the halves of its layers": spec.placement != "post",
        "it is for encoders": spec.causal,
        "heads of keys and values are as many as of queries": spec.kv_heads != spec.heads,
        "its heads are as wide as the model": spec.q_size != spec.hidden,
        f"head size {spec.head_dim} is no multiple of 32 up to 128": spec.head_dim % 32 != 0 or spec.head_dim > 128,
        f"hidden {spec.hidden} and ffn {spec.ffn} are no multiples of 64": bool(spec.hidden % 64 or spec.ffn % 64),
        "positions are learned": not isinstance(spec.positions, LearnedPositions),
        "attention is plain": bool(spec.attention_softcap or spec.qk_norm or any(map(spec.window, range(spec.layers)))),
        "its feed-forward is plain": spec.gated,
        "its embeddings are as wide as the model": spec.embedding_size is not None,
        "it has layers": spec.layers == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def macros(spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> dict[str, str]:
    """What the source is compiled with."""
    integers = {
        "BF16": int(dtype == torch.bfloat16), "LAYERS": spec.layers, "HIDDEN": spec.hidden, "FFN": spec.ffn,
        "HEADS": spec.heads, "HEAD_DIM": spec.head_dim, "RMS_NORM": int(spec.norm == "rmsnorm"),
        "ACTIVATION": ACTIVATIONS[spec.activation], "BLOCKS": layout.blocks, "ROW_TILES": layout.row_tiles,
        "QKV_WIDE": layout.qkv.wide, "OUT_WIDE": layout.out.wide, "UP_WIDE": layout.up.wide,
        "DOWN_WIDE": layout.down.wide, "OUT_SPLIT": layout.out.split, "DOWN_SPLIT": layout.down.split,
        "STAGE_BYTES": layout.stage_bytes, "STAGES": layout.stages, "X_ROWS": layout.x_rows,
        "SHARED_BYTES": SHARED_LIMIT,
    }  # fmt: skip
    floats = {"NORM_EPS": spec.norm_eps, "ATTENTION_SCALE": spec.attention_scale}
    return {**{k: str(v) for k, v in integers.items()}, **{k: f"{float(v)!r}f" for k, v in floats.items()}}


def source(spec: ModelSpec, layout: Layout, dtype: torch.dtype) -> str:
    """The CUDA source in one piece, with the instructions that it needs."""
    defines = "".join(f"#define {name} {value}\n" for name, value in macros(spec, layout, dtype).items())
    widths = sorted({units.wide for units in layout.units})
    instructions = [_instruction(wide, dtype) for wide in widths]
    return "\n".join([defines, text_of("primitives.cuh"), text_of("hopper.cuh"), *instructions, *map(text_of, SOURCES)])


def _instruction(wide: int, dtype: torch.dtype) -> str:
    """``Group<wide>::mma``: 64 rows by ``wide`` columns by 16, whose operands descriptors name. It has an operand for
    each sum, as many as half the columns."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    count = wide // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    first = "template <int WIDE> struct Group;\n"
    return (
        f"{first}template <> struct Group<{wide}> {{\n"
        "static __device__ __forceinline__ void mma(float* d, u64 x, u64 w) {\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{wide}k16.f32.{kind}.{kind} {{{sums}}}, '
        f'%{count}, %{count + 1}, 1, 1, 1, 0, 0;" : {operands} : "l"(x), "l"(w));\n}}\n}};\n'
    )


def compile_kernel(text: str) -> Any:
    """The kernel of a :func:`source`, on the current device."""
    try:
        import cupy

        path = machine_code(text)
        module = cupy.RawModule(path=str(path), enable_cooperative_groups=True)
        kernel = module.get_function("persistent_encoder")
        kernel.max_dynamic_shared_size_bytes = SHARED_LIMIT
    # CuPy's errors of the driver and of NVRTC are RuntimeErrors, and what it raises where a library is missing.
    except (RuntimeError, ImportError, OSError) as error:
        raise KernelError(
            f'the encoder kernel does not compile here ({str(error)[:300]}): set "kernels" to "generic"'
        ) from error
    return kernel


def machine_code(text: str) -> Path:
    """The file in ``$SLIPSTREAM_CACHE`` with what NVRTC makes of a :func:`source`; needs no GPU. The kernel has
    instructions of Hopper alone (sm_90a), which CuPy does not ask for by itself."""
    path = cache_directory() / "kernels" / f"encoder-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    if not path.is_file():
        log.info("compiling the encoder kernel: seconds the first time, cached in %s after", path.parent)
        write_aside(path, _compiled(text))
    return path


def _compiled(text: str) -> bytes:
    from cupy.cuda import nvrtc

    options = ("--gpu-architecture=sm_90a", "--std=c++17")
    program = nvrtc.createProgram(text, "persistent_encoder.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
        found: bytes = nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)
    return found


class EncoderRoom:
    """The kernel's buffers, which all buckets of a model share."""

    def __init__(self, spec: ModelSpec, weights: ModelWeights, tokens: int, layout: Choice) -> None:
        """For steps of up to ``tokens`` tokens."""
        like = weights.embed.table
        device, rows = like.device, ceil_div(tokens, TILE) * TILE
        self.layout, self.blocks = layout, torch.cuda.get_device_properties(device).multi_processor_count

        def nothing(halves: int) -> Tensor:
            return torch.full((ceil_div(halves, 2),), NOTHING, dtype=torch.int32, device=device)

        self.embedded, self.result = (torch.zeros(rows, spec.hidden, dtype=like.dtype, device=device) for _ in range(2))
        self.normed, self.middle, self.attended = (nothing(2 * rows * spec.hidden) for _ in range(3))
        self.activations, self.qkv = nothing(2 * rows * spec.ffn), nothing(3 * rows * 3 * spec.hidden)
        self.statistics = torch.zeros(2 * rows * ceil_div(spec.hidden, TILE), dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        self.turns = torch.zeros(self.blocks, dtype=torch.int32, device=device)
        words = [address(part) for layer in weights.layers for part in _constants(layer)]
        self.pointers = torch.tensor(words, dtype=torch.int64).to(device)
        self.kernels: dict[int, Compiled] = {}

    def kernel(self, spec: ModelSpec, weights: ModelWeights, rows: int) -> Compiled:
        """The kernel for so many rows."""
        key = compiled_rows(rows)
        if key not in self.kernels:
            layout, driver = self.layout(spec, key, self.blocks), Driver()
            maps = []
            for layer in weights.layers:
                linears = (layer.qkv, layer.out, layer.up, layer.down)
                for linear, units in zip(linears, layout.units, strict=True):
                    maps.append(driver.tile_map(linear_parts(linear)[0], units.wide))
            device = self.result.device
            with torch.cuda.device(device):
                kernel = compile_kernel(source(spec, layout, self.result.dtype))
            table = torch.frombuffer(bytearray(b"".join(maps)), dtype=torch.uint8).to(device)
            sums = (layout.out.split + layout.down.split) * layout.row_tiles * TILE * spec.hidden
            partials = torch.full((sums,), NOTHING, dtype=torch.int32, device=device)
            self.kernels[key] = Compiled(kernel, table, partials)
        return self.kernels[key]


@dataclass(frozen=True)
class Compiled:
    """A kernel, the maps of its tiles of weights, and room for its sums."""

    launch: Any
    maps: Tensor
    partials: Tensor


def _layers_cost(result: None, forward: PersistentForward) -> Cost:
    lengths = [int(length) for length in forward.buffers.starts.diff().tolist()]
    itemsize = forward.room.result.element_size()
    return encoder_layers_cost(
        forward.spec, forward.place.rows, lengths, sum(one.bytes for one in forward.layer_parameters), itemsize
    )


class PersistentForward:
    """The launches of one :class:`Place`: embeddings, their norm, and the kernel. Enqueues them when called."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, buffers: StepBuffers, room: EncoderRoom, place: Place
    ) -> None:
        self.spec, self.weights, self.buffers, self.room, self.place = spec, weights, buffers, room, place
        self._kernel = room.kernel(spec, weights, place.rows)
        self._parameters = model_parameters(spec, weights)

    @property
    def layer_parameters(self) -> Parameters:
        """Of all layers, which the kernel computes in one launch."""
        return tuple(one for name, held in self._parameters.items() if name.startswith("layers.") for one in held)

    def __call__(self) -> Tensor:
        """The hidden states behind the last norm [rows, hidden], in a buffer that the next call overwrites."""
        with region("embed", "embed", self._parameters["embed"]):
            self._embed()
        with region("layers", "layers", self.layer_parameters):
            self._launch()
        return self.room.result[: self.place.rows]

    def first_rows(self) -> Tensor:
        """The first row of each sequence behind the last norm; of sequences that are not there, rows of no meaning."""
        return self.room.result.index_select(0, self.buffers.starts[: self.place.sequences])

    def _embed(self) -> None:
        spec, room, embed, rows = self.spec, self.room, self.weights.embed, self.place.rows
        parts = ceil_div(spec.hidden, TILE)
        normed = room.normed.view(room.result.dtype).view(-1, spec.hidden)[:rows]
        out = normed if embed.norm is None else room.embedded[:rows]
        statistics = Statistics(room.statistics[: 2 * rows * parts].view(2, rows, parts), TILE)
        embed_step(spec, embed, self.buffers, self.place, out=out, statistics=statistics)
        if embed.norm is not None:
            norm = embed.norm
            norm_rows(out, norm.weight, norm.bias, spec.norm, spec.norm_eps, out=normed)

    @priced(_layers_cost, name="persistent_encoder")
    def _launch(self) -> None:
        import cupy

        room, device = self.room, self.room.result.device
        pointers = [
            one.data_ptr()
            for one in (
                self._kernel.maps, room.pointers, room.normed, room.middle, room.qkv, room.attended, room.activations,
                self._kernel.partials, room.result, room.arrivals, room.turns, self.buffers.starts,
            )
        ]  # fmt: skip
        arguments = (*pointers, cupy.int32(self.place.sequences), cupy.int32(self.place.rows))
        with cupy.cuda.Device(device.index), current_stream(device):
            self._kernel.launch((room.blocks,), (THREADS,), arguments, shared_mem=SHARED_LIMIT)


class PersistentEncoder(EncoderGraphs):
    """One model's forward over whole sequences by the persistent kernel."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        *,
        head: Head | None = None,
        tokens: int = 512,
        layout: Choice = Layout.of,
    ) -> None:
        """``head`` as in :class:`ops.specialized.encoder.EncoderPlan`, ``tokens`` the largest step, ``layout`` chooses
        the kernel's sizes. Raises :class:`KernelError` for a model that the kernel cannot run."""
        reason = unsupported(spec, weights, weights.embed.table.dtype, weights.embed.table.device)
        if reason is not None:
            raise KernelError(
                f'the encoder kernel cannot run this {spec.family} model: {reason}; set "kernels" to "generic"'
            )
        super().__init__(spec, weights, Limits(tokens, 64, 512), head)
        self._layout = layout
        self._room: EncoderRoom | None = None

    def compile(self) -> None:
        """Compiles the kernels for all steps (seconds each, the first time), which else happens as each is first met.
        Raises :class:`KernelError` if one does not compile here."""
        with torch.inference_mode(False), torch.no_grad():  # its buffers serve outside of it too
            for rows in sorted({compiled_rows(tokens + 1) for tokens in range(self.limits.tokens)}):
                self._shared_room().kernel(self.spec, self.weights, rows)

    def forward(self, buffers: StepBuffers, place: Place) -> StaticForward:
        """The launches for ``place``; all buckets share the rest of the buffers too."""
        return PersistentForward(self.spec, self.weights, buffers, self._shared_room(), place)

    def _shared_room(self) -> EncoderRoom:
        if self._room is None:
            self._room = EncoderRoom(self.spec, self.weights, self.limits.tokens, self._layout)
        return self._room


def _constants(layer: LayerWeights) -> list[Tensor | None]:
    """In the order of LayerPointer."""
    first = [layer.qkv.bias, layer.out.bias, *norm_parts(layer.attn_norm)]
    return [*first, layer.up.bias, layer.down.bias, *norm_parts(layer.ffn_norm)]
