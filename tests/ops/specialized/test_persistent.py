"""The persistent decode kernel: its numbers on a GPU; its sizes, its refusals and its compilation anywhere."""

from __future__ import annotations

import re
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from ops.errors import KernelError
from ops.specialized import persistent
from ops.specialized.persistent import Layout, PersistentDecoder, macros, source, unsupported
from tests.ops.specialized.models import SPECS, copied, decoder, eager_logits, filled, packed, state
from tests.ops.specialized.nvrtc import compile_log

GPU = torch.device("cuda")
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("missing", ["cupy", "nvrtc", "driver"])
def test_a_broken_cupy_is_a_kernel_error(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be imported, or finds no NVRTC or no driver, which it tells by RuntimeErrors."""
    cupy: Any = ModuleType("cupy")
    cupy.cuda = ModuleType("cupy.cuda")
    cupy.cuda.compiler = ModuleType("cupy.cuda.compiler")
    cupy.cuda.compiler.CompileException = type("CompileException", (Exception,), {})

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(f"CuPy failed to load {missing}")

    cupy.RawModule = refuse
    monkeypatch.setitem(sys.modules, "cupy", None if missing == "cupy" else cupy)
    with pytest.raises(KernelError, match=rf'does not compile here \(.*{missing}.*\): set "kernels" to "generic"'):
        persistent.compile_kernel({}, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "context"), [(1, 0), (1, 37), (1, 300), (1, 1300), (2, 130), (4, 50), (8, 90), (16, 260)]
)
@pytest.mark.parametrize("name", SPECS)
def test_steps_against_eager_in_fp32(name: str, rows: int, context: int, dtype: torch.dtype) -> None:
    """Three steps: logits no further from exact ones than twice what eager in the same dtype is, and the same cache."""
    spec = SPECS[name]
    ours = state(spec, rows, context, dtype, "cuda")
    exact, half = copied(ours, torch.float32), copied(ours, dtype)
    kernel = PersistentDecoder(spec, packed(spec, dtype, dtype, "cuda"), ours)
    wide, same = packed(spec, dtype, torch.float32, "cuda"), packed(spec, dtype, dtype, "cuda")
    with torch.inference_mode():
        for _ in range(3):
            found = kernel.logits(0).clone()
            wanted, rounded = eager_logits(spec, wide, exact), eager_logits(spec, same, half)
            floor = 4 * torch.finfo(dtype).eps * float(wanted.abs().max())
            limit = max(2 * float((rounded - wanted).abs().max()), floor)
            assert float((found - wanted).abs().max()) <= limit
            tokens = wanted.argmax(-1)
            for one in (ours, exact, half):
                one.tokens.copy_(tokens)
                one.positions.add_(1)
    for pool in (*ours.keys, *ours.values):
        written = ~pool.isnan().flatten(2).any(-1)
        assert torch.equal(written, filled(ours)), "the new tokens' slots are written, and no others"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 8, 16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "ragged"])
def test_greedy_steps_are_the_same_steps(name: str, rows: int) -> None:
    spec, dtype = SPECS[name], torch.float16
    one = state(spec, rows, 40, dtype, "cuda")
    other = copied(one, dtype)
    weights = packed(spec, dtype, dtype, "cuda")
    chosen = torch.full((5, rows), -9, dtype=torch.int64, device="cuda")
    assert PersistentDecoder(spec, weights, one).greedy(chosen)
    stepwise = PersistentDecoder(spec, weights, other)
    for row in chosen:
        tokens = stepwise.logits(0).argmax(-1)
        assert bool((tokens == row).all())
        other.tokens.copy_(tokens)
        other.positions.add_(1)
    assert bool((one.tokens == other.tokens).all())
    assert bool((one.positions == other.positions).all())


@pytest.mark.gpu
def test_logits_that_are_not_finite_are_told_apart() -> None:
    spec, dtype = SPECS["offset"], torch.float16
    one = state(spec, 2, 20, dtype, "cuda")
    weights = packed(spec, dtype, dtype, "cuda")
    weights.embed.token[int(one.tokens[1])] = torch.nan
    out = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    PersistentDecoder(spec, weights, one).greedy(out)
    assert int(out[0, 0]) >= 0
    assert int(out[0, 1]) < 0
    assert 0 <= ~int(out[0, 1]) < spec.vocab_size


@pytest.mark.gpu
def test_a_captured_step_replays() -> None:
    spec, dtype = SPECS["llama"], torch.bfloat16
    one = state(spec, 2, 33, dtype, "cuda")
    kernel = PersistentDecoder(spec, packed(spec, dtype, dtype, "cuda"), one)
    first = kernel.logits(0).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kernel.logits(0)
    for _ in range(3):
        found.zero_()
        graph.replay()
        assert torch.equal(found, first)


@pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("name", "rows"), [("gpt2", 1), ("llama", 16), ("ragged", 4), ("one kv head", 2), ("wide heads", 8)]
)
def test_it_compiles_for_hopper(name: str, rows: int, dtype: torch.dtype) -> None:
    layout = Layout.of(SPECS[name], rows, 132)
    defines = macros(SPECS[name], rows, layout, 132, 16, dtype)
    text = "".join(f"#define {key} {value}\n" for key, value in defines.items()) + source()
    assert compile_log(text, "sm_90") is None


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", SPECS)
def test_host_and_kernel_count_the_same_stages(name: str, rows: int) -> None:
    """A ring that holds a whole layer is given back late: were it shorter than the host thinks, nobody would move."""
    spec, layout = SPECS[name], Layout.of(SPECS[name], rows, 132)
    defines = macros(spec, rows, layout, 132, 16, torch.float16)
    text = "".join(f"#define {key} {value}\n" for key, value in defines.items()) + source()
    counted = dict(zip(("QKV", "OUT", "UP", "DOWN"), persistent.products(spec), strict=True))
    for kind, product in counted.items():
        p = f"Product<{kind}>"
        stages = f"{p}::GROUPS * {p}::TILES * ceil_div({p}::K, {p}::COLUMNS)"
        text += f'\nstatic_assert({stages} == {product.stages(132, layout.stage_bytes)[0]}, "{kind}");'
        text += f'\nstatic_assert({p}::TALL * {p}::PITCH <= STAGE_BYTES, "{kind} overflows");'
    assert compile_log(text, "sm_90") is None
    assert not layout.fits or layout.stages >= sum(one.stages(132, layout.stage_bytes)[0] for one in counted.values())


def test_every_macro_is_used_and_defined() -> None:
    defines = macros(SPECS["llama"], 1, Layout.of(SPECS["llama"], 1, 132), 132, 16, torch.float16)
    assert {name for name in defines if not re.search(rf"\b{name}\b", source())} == set()
    enums = re.findall(r"enum (?:Layer)?Pointer \{(.*?)\}", source(), re.S)
    sizes = [len([name for name in body.split(",") if name.strip()]) - 1 for body in enums]
    assert sizes == [persistent.POINTERS, persistent.LAYER_POINTERS]


@pytest.mark.parametrize("rows", persistent.ROWS)
@pytest.mark.parametrize("name", SPECS)
def test_shared_memory_is_never_overdrawn(name: str, rows: int) -> None:
    layout = Layout.of(SPECS[name], rows, 132)
    assert layout.total <= persistent.SHARED_LIMIT
    assert layout.stages >= persistent.FEWEST_STAGES
    assert layout.direct or layout.staged >= rows * SPECS[name].ffn * 2


def test_a_model_too_wide_for_the_batch_is_refused() -> None:
    with pytest.raises(KernelError, match="does not hold 16 rows of 16384"):
        Layout.of(decoder(hidden=16384, heads=128, kv_heads=128, head_dim=128), 16, 132)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placement": "post"}, "norms stand before"),
        ({"causal": False}, "causal language models"),
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"head_dim": 12, "heads": 4}, "head size 12"),
        ({"head_dim": 264}, "head size 264"),
        ({"hidden": 252}, "hidden 252"),
    ],
)
def test_what_it_cannot_compute_is_said(changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(persistent.importlib.util, "find_spec", lambda _: object())
    assert unsupported(decoder(), None, torch.float16, GPU) is None
    assert words in str(unsupported(decoder(**changes), None, torch.float16, GPU))
    assert "fp16 or bf16" in str(unsupported(decoder(), None, torch.float32, GPU))


def test_batches_for_which_another_path_is_faster_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(persistent, "blocks_for", lambda spec, device: 132)
    spec = decoder()
    assert [persistent.unfit(spec, rows, GPU) for rows in persistent.ROWS] == [None] * 5
    assert persistent.unfit(spec, 32, GPU) == "the persistent kernel takes up to 16 rows"
    monkeypatch.setitem(persistent.AHEAD_ROWS, (spec.hidden, spec.ffn), 4)
    told = "that was measured to be faster for a model of this size"
    assert [persistent.unfit(spec, rows, GPU) for rows in persistent.ROWS] == [None] * 3 + [told] * 2


def test_where_it_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compute capability 9.0" in str(unsupported(decoder(), None, torch.float16, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert "compute capability 9.0" in str(unsupported(decoder(), None, torch.float16, GPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(persistent.importlib.util, "find_spec", lambda _: None)
    assert "needs CuPy" in str(unsupported(decoder(), None, torch.float16, GPU))
