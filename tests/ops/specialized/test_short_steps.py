"""Which steps of an encoder the persistent kernel serves in the ``specialized`` set, and what serves the others."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.errors import KernelError
from ops.generic.encoder_graph import EncoderGraphs, Place, StaticForward, StepBuffers, token_bucket
from ops.plan import Bucket, Launch, StepInputs, StepPlan, StepState
from ops.spec import HeadSpec, ModelSpec
from ops.specialized import encoder, persistent_encoder, tile_table
from ops.specialized.encoder import encoder_step_plan
from ops.specialized.kernel_set import SpecializedKernels
from ops.specialized.persistent_encoder import PersistentEncoder
from tests.ops.devices import DEVICES
from tests.ops.specialized.test_encoder import ENCODER, assert_close, batch, exact, packed
from tests.ops.specialized.test_persistent_encoder import BERT, HALVES, LARGE, SMALL, scale

# What fills a bucket up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
SIZE = ENCODER.hidden, ENCODER.ffn
#: Of tests that run tiles on a CPU.
interpreted = DEVICES[0].marks[0]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of each step that went through static buffers."""
    seen: list[str] = []
    step = EncoderGraphs.step

    def seeing(self: EncoderGraphs, *arguments: object, **options: object) -> tuple[Tensor, Tensor | None]:
        seen.append(type(self).__name__)
        return step(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EncoderGraphs, "step", seeing)
    return seen


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """As if the kernel ran here: eager's numbers stand for its own, in the places that are given. ENCODER is served up
    to 16 tokens by it, and up to 32 by tiles."""
    places: list[Place] = []

    class Eager:
        def __init__(self, graphs: PersistentEncoder, buffers: StepBuffers, place: Place) -> None:
            self.graphs, self.buffers, self.place = graphs, buffers, place
            self.hidden = torch.zeros(0)

        def __call__(self) -> Tensor:
            spec, place = self.graphs.spec, self.place
            ends = sorted({int(start) for start in self.buffers.starts})
            lengths = tuple(end - begin for begin, end in pairwise(ends))
            inputs = batch(spec, lengths)
            ids, types = (room[: sum(lengths)].clone() for room in (self.buffers.ids, self.buffers.types))
            found = exact(spec, replace(inputs, token_ids=ids, token_types=types)).hidden
            self.hidden = torch.full((place.rows, spec.hidden), torch.nan, dtype=torch.float16)
            self.hidden[: sum(lengths)] = found.half()
            return self.hidden

        def first_rows(self) -> Tensor:
            starts = self.buffers.starts[: self.place.sequences].long()
            return self.hidden.nan_to_num().index_select(0, starts.clamp(max=self.place.rows - 1))

    def forward(self: PersistentEncoder, buffers: StepBuffers, place: Place) -> StaticForward:
        places.append(place)
        return Eager(self, buffers, place)

    monkeypatch.setattr(PersistentEncoder, "forward", forward)
    monkeypatch.setattr(PersistentEncoder, "compile", lambda self: None)
    monkeypatch.setattr(encoder, "unsupported", lambda *_: None)
    monkeypatch.setattr(persistent_encoder, "unsupported", lambda *_: None)
    monkeypatch.setitem(tile_table.AHEAD_PERSISTENT, SIZE, 16)
    monkeypatch.setitem(tile_table.AHEAD, SIZE, (1, 32))
    return places


def walked(seen: list[str]) -> StepPlan:
    """A fallback that says so, and computes nothing."""

    def run(state: StepState) -> None:
        seen.append("fallback")
        state.hidden = state.inputs.token_ids

    return StepPlan(Bucket("encode"), [Launch("walked", run)])


STEPS: list[tuple[tuple[int, ...], str]] = [
    ((1,), "PersistentEncoder"),
    ((16,), "PersistentEncoder"),
    ((17,), "EncoderPlan"),
    ((5, 3, 8), "PersistentEncoder"),
    ((5, 3, 9), "EncoderPlan"),
    ((1,) * 16, "PersistentEncoder"),
    ((16, 16), "EncoderPlan"),
    ((16, 16, 1), "fallback"),
    ((7,), "PersistentEncoder"),
]


@interpreted
def test_short_steps_go_to_the_persistent_kernel(hopper: list[Place], served: list[str]) -> None:
    """All tokens of all sequences count; results are right whoever comes before."""
    one = replace(ENCODER, head=HeadSpec(task="embedding", outputs=0, first_token=True, dense=True, activation="tanh"))
    weights = packed(one, torch.float16)
    plan = encoder_step_plan(one, weights, SpecializedKernels(), walked(served))
    for seed, (lengths, who) in enumerate(STEPS):
        inputs = batch(one, lengths, seed=seed)
        assert plan.guards(inputs) == (who != "fallback")
        served.clear()
        result = plan.run(inputs)
        assert served == [who]
        if who != "fallback":
            wanted = exact(one, inputs)
            assert_close(result.hidden, wanted.hidden, torch.float16)
            assert result.outputs is not None
            assert wanted.outputs is not None
            assert_close(result.outputs, wanted.outputs, torch.float16)
    assert {place.rows for place in hopper} == {16}


def test_without_tiles_longer_steps_go_to_the_fallback(
    hopper: list[Place], served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(tile_table.AHEAD, SIZE)
    plan = encoder_step_plan(ENCODER, packed(ENCODER, torch.float16), SpecializedKernels(), walked(served))
    for lengths in ((16,), (17,), (9, 7)):
        plan.run(batch(ENCODER, lengths))
    assert served == ["PersistentEncoder", "fallback", "PersistentEncoder"]


@interpreted
def test_other_models_are_left_alone(hopper: list[Place], served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a figure for their size."""
    monkeypatch.delitem(tile_table.AHEAD_PERSISTENT, SIZE)
    monkeypatch.setattr(encoder, "unsupported", lambda *_: pytest.fail("it was not asked for"))
    plan = encoder_step_plan(ENCODER, packed(ENCODER, torch.float16), SpecializedKernels(), walked(served))
    plan.run(batch(ENCODER, (7,)))
    assert served == ["EncoderPlan"]


@interpreted
def test_where_it_does_not_run_the_others_serve(
    hopper: list[Place], served: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log has the reason."""
    asked: list[tuple[object, ...]] = []

    def refuse(*arguments: object) -> str:
        asked.append(arguments)
        return "it needs a Hopper GPU"

    monkeypatch.setattr(encoder, "unsupported", refuse)
    weights = packed(ENCODER, torch.float16)
    with caplog.at_level(logging.INFO, "slipstream.kernels"):
        plan = encoder_step_plan(ENCODER, weights, SpecializedKernels(), walked(served))
    assert caplog.messages == ["no persistent kernel for short steps of this test model: it needs a Hopper GPU"]
    assert asked == [(ENCODER, weights, torch.float16, torch.device("cpu"))]
    plan.run(batch(ENCODER, (7,)))
    assert served == ["EncoderPlan"]


@interpreted
def test_a_kernel_that_does_not_compile_leaves_its_steps_to_the_others(
    hopper: list[Place], served: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ "kernels": "auto" takes this set for encoders whatever CuPy can do."""

    def compile(self: PersistentEncoder) -> None:
        raise KernelError("the encoder kernel does not compile here (no libnvrtc)")

    monkeypatch.setattr(PersistentEncoder, "compile", compile)
    plan = encoder_step_plan(ENCODER, packed(ENCODER, torch.float16), SpecializedKernels(), walked(served))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "steps of up to 16 tokens run as without the persistent kernel: "
        "the encoder kernel does not compile here (no libnvrtc)"
    )
    plan.run(batch(ENCODER, (7,)))
    assert served == ["EncoderPlan"]


@pytest.mark.parametrize("missing", ["cupy", "nvrtc"])
def test_a_broken_cupy_is_a_kernel_error(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be imported, or finds no NVRTC, which it tells by a RuntimeError."""
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    names = ("cupy", "cupy.cuda", "cupy.cuda.nvrtc")
    modules = [ModuleType(name) for name in names]

    def create(*_: object) -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.12")

    modules[0].cuda, modules[1].nvrtc, modules[2].createProgram = modules[1], modules[2], create  # type: ignore[attr-defined]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, None if missing == "cupy" else module)
    with pytest.raises(KernelError, match=r'does not compile here \(.*(cupy|nvrtc).*\): set "kernels" to "generic"'):
        persistent_encoder.compile_kernel("source")


def test_all_kernels_of_short_steps_are_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bucket of up to 40 tokens has its own."""
    compiled: list[int] = []

    class Room:
        def __init__(self, spec: object, weights: object, tokens: int, layout: object) -> None:
            assert not torch.is_inference_mode_enabled()
            assert tokens == 48

        def kernel(self, spec: object, weights: object, rows: int) -> None:
            assert not torch.is_inference_mode_enabled()
            compiled.append(rows)

    monkeypatch.setattr(persistent_encoder, "EncoderRoom", Room)
    monkeypatch.setattr(persistent_encoder, "unsupported", lambda *_: None)
    with torch.inference_mode():
        PersistentEncoder(SMALL, packed(SMALL, torch.float16), tokens=48).compile()
    assert compiled == [16, 32, 48]


def test_limits_are_whole_buckets() -> None:
    """A step is computed in the rows of its bucket, and the buffers have as many as the limit says."""
    limits = [*tile_table.AHEAD_PERSISTENT.values(), *(most for _, most in tile_table.AHEAD.values())]
    assert [token_bucket(limit) for limit in limits] == limits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("one", [BERT, LARGE], ids=["base", "large"])
def test_steps_of_every_size_against_eager(one: ModelSpec, dtype: torch.dtype, served: list[str]) -> None:
    """By the set's own plan, two layers: short steps, longer ones behind them, and the same short ones again."""
    head = HeadSpec(task="embedding", outputs=0, first_token=True, dense=True, activation="tanh")
    one = replace(one, layers=2, vocab_size=1000, head=head)
    bucket, alone = Bucket("encode"), SingleProcess()
    weights, wide = packed(one, dtype, "cuda", scale(one)), packed(one, torch.float64, scale=scale(one))
    plan, eager = SpecializedKernels().plan(one, weights, bucket, alone), EagerKernels().plan(one, wide, bucket, alone)
    limit = tile_table.AHEAD_PERSISTENT[one.hidden, one.ffn]
    short = [(1,), (7,), (16,), (5, 3, 8), (limit - 5, 5)]
    found: dict[tuple[int, ...], Tensor] = {}
    for lengths in (*short, (limit + 1,), (9, 20, 30), (400,), *short):
        inputs = batch(one, lengths)
        assert inputs.token_types is not None
        there = (inputs.token_ids.cuda(), inputs.positions.cuda(), lengths, inputs.token_types.cuda())
        served.clear()
        result = plan.run(StepInputs(*there))
        assert (served == ["PersistentEncoder"]) == (sum(lengths) <= limit)
        if lengths in found:
            assert torch.equal(result.hidden, found[lengths]), "it is the same each time"
            continue
        found[lengths] = result.hidden
        wanted = eager.run(inputs)
        assert_close(result.hidden, wanted.hidden, dtype)
        assert result.outputs is not None
        assert wanted.outputs is not None
        assert_close(result.outputs, wanted.outputs, dtype)
