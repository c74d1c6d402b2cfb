"""The CUDA C++ kernels' numbers on any machine: compiled with g++, the GPU's instructions emulated."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ops import reference
from ops.plan import StepInputs
from ops.spec import LearnedPositions, ModelSpec
from ops.specialized import addresses, persistent, persistent_encoder
from ops.specialized.encoder_layout import Layout, Units
from ops.weights import ModelWeights
from tests.ops.specialized import emulator, models, test_encoder
from tests.ops.specialized.test_persistent_encoder import SMALL
from tests.ops.specialized.test_persistent_encoder import SPECS as ENCODERS

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no C++ compiler here (Debian: apt install g++)")
HALF, CPU = torch.float16, torch.device("cpu")
BLOCKS = 3


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Of its first element."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


class Decoder:
    """:class:`PersistentDecoder` as far as a CPU has it."""

    def __init__(self, spec: ModelSpec, rows: int, context: int, dtype: torch.dtype, folder: Path) -> None:
        layout = persistent.Layout.of(spec, rows, BLOCKS)
        defines = persistent.macros(spec, rows, layout, BLOCKS, 16, dtype)
        sources = [persistent.text_of(name) for name in persistent.SOURCES if name != "primitives.cuh"]
        self.library = emulator.load(defines, sources, "decode_main.h", folder)
        self.state, self.weights = (
            models.state(spec, rows, context, dtype, "cpu"),
            models.packed(spec, dtype, dtype, "cpu"),
        )
        self._logits = torch.full((rows, spec.vocab_size), torch.nan)
        buffers, constants = persistent._exchange(spec, rows, BLOCKS, CPU), persistent._constants(spec, CPU)
        self._kept = buffers, constants
        self._tables = [
            persistent._table(spec, self.weights, self.state, buffers, constants, logits)
            for logits in (self._logits, None)
        ]

    def logits(self) -> Tensor:
        """One step."""
        assert self.library.run(address(self._tables[0]), address(torch.zeros(1, dtype=torch.int64)), 1, 0) == 0
        return self._logits

    def greedy(self, out: Tensor) -> None:
        """As many steps as ``out`` has rows."""
        assert self.library.run(address(self._tables[1]), address(out), out.shape[0], 1) == 0, "a wait never ends"


DECODED = [
    ("gpt2", 1, 37, HALF), ("gpt2", 16, 40, torch.bfloat16), ("llama", 8, 20, HALF), ("llama", 1, 300, torch.bfloat16),
    ("windows", 2, 37, HALF), ("ragged", 4, 5, HALF), ("one kv head", 1, 0, HALF), ("wide heads", 1, 37, HALF),
    ("offset", 2, 18, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "context", "dtype"), DECODED)
def test_a_decode_step(name: str, rows: int, context: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits as near to exact ones as twice what eager in that dtype is; the new keys and values, and no others."""
    spec = models.SPECS[name]
    kernel = Decoder(spec, rows, context, dtype, tmp_path)
    exact, half = models.copied(kernel.state, torch.float32), models.copied(kernel.state, dtype)
    found = kernel.logits()
    with torch.inference_mode():
        wanted = models.eager_logits(spec, models.packed(spec, dtype, torch.float32, "cpu"), exact)
        rounded = models.eager_logits(spec, kernel.weights, half)
    floor = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
    limit = max(2 * float((rounded - wanted).abs().max()), floor)
    assert float((found - wanted).abs().max()) <= limit
    kernel.state.positions.add_(1)
    for pool in (*kernel.state.keys, *kernel.state.values):
        written = ~pool.isnan().flatten(2).any(-1)
        assert torch.equal(written, models.filled(kernel.state))


def test_greedy_steps_in_one_launch(tmp_path: Path) -> None:
    """Are those that its logits choose, one launch a step."""
    spec = models.SPECS["gpt2"]
    kernel = Decoder(spec, 2, 20, HALF, tmp_path)
    before = kernel.state.tokens.clone(), kernel.state.positions.clone()
    chosen = torch.full((3, 2), -9, dtype=torch.int64)
    kernel.greedy(chosen)
    assert torch.equal(kernel.state.tokens, chosen[-1])
    kernel.state.tokens.copy_(before[0])
    kernel.state.positions.copy_(before[1])
    for row in chosen:
        tokens = kernel.logits().argmax(-1)
        assert torch.equal(tokens, row)
        kernel.state.tokens.copy_(tokens)
        kernel.state.positions.add_(1)


def embedded(one: ModelSpec, weights: ModelWeights, inputs: StepInputs) -> Tensor:
    """What stands in front of an encoder's layers."""
    embed = weights.embed
    assert embed.position is not None
    assert isinstance(one.positions, LearnedPositions)
    x = embed.token[inputs.token_ids].double() + embed.position[inputs.positions + one.positions.offset].double()
    if embed.token_type is not None:
        assert inputs.token_types is not None
        x += embed.token_type[inputs.token_types].double()
    if embed.norm is None:
        return x
    bias = None if embed.norm.bias is None else embed.norm.bias.double()
    return reference.norm(x, one.norm, embed.norm.weight.double(), bias, one.norm_eps)


def encoded(
    one: ModelSpec, lengths: tuple[int, ...], rows: int, dtype: torch.dtype, layout: Layout, folder: Path
) -> None:
    """The hidden states that the kernel gives, twice, beside what :class:`EncoderRoom` has on a GPU."""
    weights, inputs = test_encoder.packed(one, dtype), test_encoder.batch(one, lengths)
    sources = [persistent.text_of(name) for name in persistent_encoder.SOURCES]
    padded = 64 * layout.row_tiles
    library = emulator.load(persistent_encoder.macros(one, layout, dtype), sources, "encoder_main.h", folder)
    first = embedded(one, weights, inputs).to(dtype)
    halves = (2 * one.hidden, 2 * one.hidden, 9 * one.hidden, 2 * one.hidden, 2 * one.ffn)
    exchanged = [torch.full((padded * each // 2,), -1, dtype=torch.int32) for each in halves]
    parts = layout.out.split + layout.down.split
    exchanged.append(torch.full((parts * padded * one.hidden,), -1, dtype=torch.int32))
    result = torch.zeros(padded, one.hidden, dtype=dtype)
    arrivals = torch.tensor([-2], dtype=torch.int32)  # passes zero on its way
    turns = arrivals.repeat(layout.blocks)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
    maps = []
    for layer in weights.layers:
        linears = (layer.qkv, layer.out, layer.up, layer.down)
        for linear, units in zip(linears, layout.units, strict=True):
            weight = addresses.linear_parts(linear)[0]
            maps.append([weight.data_ptr(), *weight.shape, units.wide])
    words = [addresses.address(part) for layer in weights.layers for part in persistent_encoder._constants(layer)]
    tensors = (torch.tensor(maps), torch.tensor(words), *exchanged, result, arrivals, turns, starts)
    for _ in range(2):
        given = exchanged[0].view(dtype).view(2 * padded, one.hidden)[:rows]
        given.zero_()
        given[: sum(lengths)] = first
        assert library.run(*map(address, tensors), len(lengths), rows) == 0, "a wait never ends"
        assert turns.eq(arrivals).all()
        assert all(buffer.eq(-1).all() for buffer in exchanged), "the next launch finds nothing"
        test_encoder.assert_close(result[: sum(lengths)], test_encoder.exact(one, inputs).hidden, dtype)
    assert int(arrivals[0]) == 2 * layout.blocks - 2


ENCODED = [
    ("small", (5, 3, 9), 32, HALF), ("small", (1,), 16, torch.bfloat16), ("small", (1,) * 20, 32, HALF),
    ("small", (70, 130), 208, HALF), ("small", (3, 62), 128, HALF), ("one head of 64", (20, 1, 40), 64, torch.bfloat16),
    ("wide heads", (33,), 48, HALF), ("rms", (16,), 16, HALF), ("no biases", (40,), 48, HALF),
    ("no norm of embeddings", (64,), 64, HALF),
]  # fmt: skip


@pytest.mark.parametrize(("name", "lengths", "rows", "dtype"), ENCODED)
def test_an_encoder(name: str, lengths: tuple[int, ...], rows: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """In steps that are full, and in steps with rows of no sequence."""
    one = ENCODERS[name]
    encoded(one, lengths, rows, dtype, Layout.of(one, rows, BLOCKS), tmp_path)


def test_blocks_without_a_part_and_blocks_with_several(tmp_path: Path) -> None:
    """And a ring that is shorter than a unit, columns that are no multiple of a unit's, and parts that are uneven."""
    cut = Layout.cut(SMALL, 112, 11, Units(40, 1), Units(48, 2), Units(16, 1), Units(56, 2))
    encoded(SMALL, (100,), 112, HALF, replace(cut, stages=4), tmp_path)


@pytest.mark.parametrize("narrow", range(4))
def test_blocks_with_a_part_of_one_product_only(narrow: int, tmp_path: Path) -> None:
    """They see nothing of the phases between, and must not take what lies there of a layer before."""
    one = replace(SMALL, hidden=256, heads=8, kv_heads=8, ffn=384, layers=4)
    cuts = [Units(16, product % 2 + 1) if product == narrow else Units(128, 1) for product in range(4)]
    encoded(one, (10, 6), 16, HALF, Layout.cut(one, 16, 40, *cuts), tmp_path)


def test_blocks_with_a_head_alone(tmp_path: Path) -> None:
    """Keys and values of the layer before last may not have been put back yet."""
    one = replace(SMALL, hidden=576, heads=18, kv_heads=18, ffn=64, layers=3)
    cuts = [Units(192, 1), Units(192, 1), Units(64, 1), Units(192, 1)]
    encoded(one, (10, 6), 16, HALF, Layout.cut(one, 16, 20, *cuts), tmp_path)
