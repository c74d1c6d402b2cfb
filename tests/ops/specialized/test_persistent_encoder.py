"""The persistent encoder kernel: its numbers on a GPU; its sizes, its refusals and its compilation anywhere."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ops.errors import IdError, KernelError
from ops.spec import LearnedPositions, ModelSpec
from ops.specialized import encoder_layout, persistent_encoder
from ops.specialized.encoder_layout import Layout, Units, compiled_rows
from ops.specialized.persistent_encoder import PersistentEncoder, source, structure
from tests.ops.specialized.nvrtc import compile_log
from tests.ops.specialized.test_encoder import ENCODER, assert_close, batch, exact, packed

HALVES = (torch.float16, torch.bfloat16)
SMALL = replace(
    ENCODER, hidden=128, heads=4, kv_heads=4, head_dim=32, ffn=192, layers=2, attention_scale=32**-0.5,
    positions=LearnedPositions(512), max_positions=512,
)  # fmt: skip
SPECS: dict[str, ModelSpec] = {
    "small": SMALL,
    "one head of 64": replace(SMALL, hidden=64, heads=1, kv_heads=1, head_dim=64, ffn=64, layers=1),
    "wide heads": replace(SMALL, hidden=384, heads=3, kv_heads=3, head_dim=128, ffn=1536),
    "rms": replace(SMALL, norm="rmsnorm", activation="gelu_tanh"),
    "no biases": replace(SMALL, qkv_bias=False, out_bias=False, ffn_bias=False, token_types=0),
    "no norm of embeddings": replace(SMALL, embedding_norm=False),
}
BERT = replace(
    SMALL, hidden=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn=3072, attention_scale=0.125, vocab_size=30522
)
LARGE = replace(BERT, hidden=1024, layers=24, heads=16, kv_heads=16, ffn=4096)
#: Lengths of sequences: one, many, tiles that hold several, ends in a tile, and as long as it goes.
LENGTHS = [(1,), (16,), (5, 3, 9), (64,), (65,), (128,), (1,) * 20, (100, 28, 60), (200, 184), (500,), (512,)]


def scale(one: ModelSpec) -> float:
    """Of weights: products neither grow nor shrink. Larger ones make attention so sharp that 16 bits of a query decide
    whose value it takes: eager's and generic's results are then as far from exact ones as this kernel's."""
    return one.hidden**-0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_hidden_states_against_eager(name: str, dtype: torch.dtype) -> None:
    one = SPECS[name]
    plan = PersistentEncoder(one, packed(one, dtype, "cuda", scale(one)))
    for seed, lengths in enumerate(LENGTHS):
        inputs = batch(one, lengths, "cuda", seed)
        types = inputs.token_types if seed % 2 and one.token_types else None
        hidden = plan.run(inputs.token_ids, types, lengths)
        assert_close(hidden, exact(one, replace(inputs, token_types=types), scale(one)).hidden, dtype)
        assert torch.equal(hidden, plan.run(inputs.token_ids, types, lengths)), "it is the same each time"


@pytest.mark.gpu
@pytest.mark.parametrize("one", [BERT, LARGE], ids=["base", "large"])
def test_real_shapes(one: ModelSpec) -> None:
    """Two layers of them."""
    one = replace(one, layers=2, vocab_size=1000)
    plan = PersistentEncoder(one, packed(one, torch.float16, "cuda", scale(one)))
    for lengths in ((16,), (128,), (384,), (128,) * 4):
        inputs = batch(one, lengths, "cuda")
        hidden = plan.run(inputs.token_ids, inputs.token_types, lengths)
        assert_close(hidden, exact(one, inputs, scale(one)).hidden, torch.float16)


@pytest.mark.gpu
def test_a_wrong_id_is_told_and_forgotten() -> None:
    plan = PersistentEncoder(SMALL, packed(SMALL, torch.float16, "cuda"))
    inputs = batch(SMALL, (7, 2), "cuda")
    wrong = inputs.token_ids.clone()
    wrong[3] = SMALL.vocab_size
    with pytest.raises(IdError, match="lies outside the model's tables"):
        plan.run(wrong, None, (7, 2))
    found = plan.run(inputs.token_ids, inputs.token_types, (7, 2))
    assert_close(found, exact(SMALL, inputs).hidden, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("tiles", [1, 2, 8])
@pytest.mark.parametrize("name", ["small", "wide heads", "rms"])
def test_it_compiles_for_hopper(name: str, tiles: int, dtype: torch.dtype) -> None:
    assert compile_log(source(SPECS[name], Layout.of(SPECS[name], 64 * tiles, 132), dtype), "sm_90a") is None


@pytest.mark.parametrize("one", [BERT, LARGE], ids=["base", "large"])
def test_measured_cuts_compile_for_hopper(one: ModelSpec) -> None:
    assert compile_log(source(one, Layout.of(one, 16, 132), torch.float16), "sm_90a") is None


def test_a_measured_cut_goes_before_the_model_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rows that it was measured at, and no others."""
    assert Layout.of(BERT, 16, 132).units == (Units(24, 1), Units(32, 3), Units(24, 1), Units(32, 4))
    assert Layout.of(BERT, 1, 132) == Layout.of(BERT, 16, 132)
    by_costs = Layout.of(SMALL, 48, 132)
    units = (Units(16, 1), Units(56, 2), Units(40, 1), Units(24, 3))
    assert by_costs.units != units
    monkeypatch.setitem(encoder_layout.CUTS, (SMALL.hidden, SMALL.ffn, 48), units)
    assert Layout.of(SMALL, 33, 132).units == units
    assert Layout.of(SMALL, 64, 132).units != units
    monkeypatch.setitem(encoder_layout.CUTS, (SMALL.hidden, SMALL.ffn, 64), units)
    assert Layout.of(SMALL, 64, 132).units == units
    assert Layout.of(SMALL, 128, 132).units != units
    assert Layout.of(replace(SMALL, ffn=256), 48, 132).units != units


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize(("hidden", "ffn", "rows"), encoder_layout.CUTS)
def test_measured_cuts_fit(hidden: int, ffn: int, rows: int, head_dim: int) -> None:
    """Whatever the heads."""
    heads = hidden // head_dim
    one = replace(BERT, hidden=hidden, ffn=ffn, heads=heads, kv_heads=heads, head_dim=head_dim)
    assert compiled_rows(rows) == rows
    assert_fits(one, Layout.of(one, rows, 132))


@pytest.mark.parametrize("tiles", [1, 2, 3, 6, 8])
@pytest.mark.parametrize("one", [BERT, LARGE, SMALL], ids=["base", "large", "small"])
def test_sizes_fit(one: ModelSpec, tiles: int) -> None:
    assert_fits(one, Layout.of(one, 64 * tiles, 132))


def assert_fits(one: ModelSpec, layout: Layout) -> None:
    """The ring in shared memory, a tile in every part of K, and columns that the instruction takes."""
    shapes = ((3 * one.hidden, one.hidden), (one.hidden, one.hidden), (one.ffn, one.hidden), (one.hidden, one.ffn))
    assert encoder_layout.FEWEST_STAGES <= layout.stages <= encoder_layout.MOST_STAGES
    assert layout.stages * layout.stage_bytes < persistent_encoder.SHARED_LIMIT
    assert layout.stage_bytes % 1024 == 0, "a swizzled tile begins at a multiple of 1024"
    for units, (_, k) in zip(layout.units, shapes, strict=True):
        assert units.wide % 8 == 0
        assert units.wide <= 256
        steps = units.steps(k)
        assert (units.split - 1) * steps < k // 64 <= units.split * steps
    assert layout.qkv.split == layout.up.split == 1, "what stands behind them takes whole sums"


def test_rows_that_a_kernel_is_compiled_for() -> None:
    assert [compiled_rows(rows) for rows in (1, 16, 17, 48, 64, 65, 112, 128, 130)] == [
        16, 16, 32, 48, 64, 128, 128, 128, 192
    ]  # fmt: skip


def test_parts_without_a_tile_are_refused() -> None:
    """Of the 48 tiles of BERT's 3072 columns, 9 parts of 6 would leave the last one none."""
    one = Units(64, 1)
    with pytest.raises(KernelError, match="3072 columns are too few for 9 parts"):
        Layout.cut(BERT, 64, 132, one, one, one, Units(64, 9))
    assert Layout.cut(BERT, 64, 132, one, one, one, Units(64, 8)).down.split == 8


def test_more_rows_take_wider_units_and_fewer_parts() -> None:
    few, many = Layout.of(BERT, 64, 132), Layout.of(BERT, 512, 132)
    assert few.up.wide < many.up.wide
    assert few.down.split > many.down.split
    assert Units(64, 1).microseconds(768, 768, 64, 132) < Units(64, 1).microseconds(768, 768, 1024, 132)


def test_every_macro_is_used_and_every_pointer_counted() -> None:
    text = source(BERT, Layout.of(BERT, 128, 132), torch.float16)
    defines = dict(re.findall(r"#define (\w+) (\S+)", text))
    body = re.sub(r"#define .*", "", text)
    assert {name for name in defines if not re.search(rf"\b{name}\b", body)} <= {"BF16"}
    (pointers,) = re.findall(r"enum LayerPointer \{(.*?)\}", text, re.S)
    assert len(pointers.split(",")) - 1 == persistent_encoder.LAYER_POINTERS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placement": "pre"}, "norms stand behind"),
        ({"causal": True}, "for encoders"),
        ({"kv_heads": 2}, "heads of keys and values"),
        ({"heads": 2, "kv_heads": 2}, "as wide as the model"),
        ({"head_dim": 16, "heads": 8, "kv_heads": 8}, "head size 16"),
        ({"ffn": 200}, "ffn 200"),
        ({"windows": (3, None)}, "attention is plain"),
        ({"gated": True}, "feed-forward is plain"),
        ({"embedding_size": 64}, "embeddings are as wide"),
    ],
)
def test_what_it_cannot_compute_is_said(changes: dict[str, Any], words: str) -> None:
    assert structure(SMALL, torch.float16) is None
    assert words in str(structure(replace(SMALL, **changes), torch.float16))
    assert "fp16 or bf16" in str(structure(SMALL, torch.float32))


def test_where_it_cannot_run_is_said() -> None:
    with pytest.raises(KernelError, match=r'needs a Hopper GPU .* set "kernels" to "generic"'):
        PersistentEncoder(SMALL, packed(SMALL, torch.float16, "cpu"))
