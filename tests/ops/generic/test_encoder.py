"""Whole sequences through static buffers (on a GPU: through CUDA graphs) against the eager set in fp64."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine.checkpoint import StateDictSource
from engine.errors import EngineError
from engine.inference.inputs import Flat
from engine.inference.runner import Runner
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.errors import IdError, KernelError
from ops.generic import encoder, encoder_graph
from ops.generic.encoder import WalkGraphs, limits, locate
from ops.generic.encoder_graph import Place, token_bucket
from ops.generic.kernel_set import GenericKernels
from ops.macro_ops import walk
from ops.plan import Bucket, StepInputs, StepPlan, StepResult
from ops.spec import ALiBiPositions, HeadSpec, LearnedPositions, ModelSpec, RotaryPositions
from ops.weights import ModelWeights, Packer
from tests.ops.devices import DEVICES
from tests.ops.specs import noise, spec

# What fills a bucket up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

POOLER = HeadSpec(task="embedding", outputs=0, first_token=True, dense=True, activation="tanh")
LABELS = HeadSpec(task="sequence_classification", outputs=3, first_token=True, dense=True, activation="relu")
MASKED = HeadSpec(task="masked_lm", outputs=50, dense=True, activation="gelu", norm=True, bias=True, tied=True)
WORDS = HeadSpec(task="causal_lm", outputs=50, tied=True)
BERT = spec(
    causal=False, placement="post", norm="layernorm", heads=3, kv_heads=3, head_dim=16, token_types=2,
    positions=LearnedPositions(40), embedding_norm=True, qkv_bias=True, out_bias=True, ffn_bias=True,
    activation="gelu", head=POOLER,
)  # fmt: skip
ROTARY = RotaryPositions(8, (1.0, 0.5, 0.2, 0.1))
MODELS: dict[str, ModelSpec] = {
    "BERT": BERT,
    "RoBERTa": replace(BERT, token_types=1, positions=LearnedPositions(40, 2), head=MASKED),
    "DistilBERT": replace(BERT, token_types=0, head=LABELS),
    "post-norm without a norm of embeddings": replace(BERT, embedding_norm=False, head=None),
    "norms in front": spec(
        causal=False, final_norm=True, head=HeadSpec(task="token_classification", outputs=5, dense=True, bias=True),
    ),
    "ALiBi, windows": spec(kv_heads=6, positions=ALiBiPositions((0.5, 0.25) * 3), windows=(3, None), causal=False),
    "causal, rotary": spec(positions=ROTARY, gated=True, qk_norm=True, final_norm=True, head=WORDS),
    "causal, projected": spec(
        embedding_size=16, embedding_norm=True, norm="layernorm", positions=LearnedPositions(40, 2), final_norm=True,
        head=WORDS, attention_softcap=2.0, final_softcap=1.5,
    ),
}  # fmt: skip
LENGTHS = (7, 1, 6)


def packed(one: ModelSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> ModelWeights:
    weights = {
        name: noise(*shape, seed=i) * (0.2 if len(shape) == 2 else 1) + (1 if "norm.weight" in name else 0)
        for i, (name, shape) in enumerate(one.weight_shapes().items())
    }
    return Packer(one, StateDictSource(weights), torch.device(device), dtype).pack()


def batch(one: ModelSpec, lengths: tuple[int, ...], device: str = "cpu", seed: int = 0) -> StepInputs:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, one.vocab_size, (total,), generator=generator)
    types = torch.randint(0, one.token_types, (total,), generator=generator).to(device) if one.token_types else None
    positions = torch.cat([torch.arange(length) for length in lengths])
    return StepInputs(ids.to(device), positions.to(device), lengths, types)


def exact(one: ModelSpec, inputs: StepInputs) -> StepResult:
    """In fp64 by the eager set."""
    given = (inputs.token_ids, inputs.positions, inputs.token_types, inputs.rows)
    ids, positions, types, rows = (None if one is None else one.cpu() for one in given)
    assert ids is not None
    assert positions is not None
    plan = StepPlan(Bucket("encode"), walk(one, packed(one, torch.float64), EagerKernels(), SingleProcess()))
    return plan.run(StepInputs(ids, positions, inputs.lengths, types, rows=rows))


def plan_of(one: ModelSpec, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StepPlan:
    return GenericKernels().plan(one, packed(one, dtype, device), Bucket("encode"), SingleProcess())


def graphs_of(one: ModelSpec, device: str = "cpu", dtype: torch.dtype = torch.float32) -> WalkGraphs:
    """Without a head."""
    weights = packed(one, dtype, device)
    kernels = GenericKernels()
    kernels._upload_constants(one, weights.embed.token.device)
    return WalkGraphs(one, weights, walk(one, replace(weights, head=None), kernels, SingleProcess()))


def assert_close(ours: Tensor | None, wanted: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    """A rounding after each of some ten steps, each of which may double it."""
    if wanted is None:
        assert ours is None
        return
    assert ours is not None
    assert ours.shape == wanted.shape
    limit = 24 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert float((ours.double().cpu() - wanted).abs().max()) <= limit


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The lengths of each step that went through static buffers."""
    seen: list[tuple[int, ...]] = []
    step = WalkGraphs.step

    def seeing(self: WalkGraphs, inputs: StepInputs, *, head: bool) -> tuple[Tensor, Tensor | None]:
        seen.append(inputs.lengths)
        return step(self, inputs, head=head)

    monkeypatch.setattr(WalkGraphs, "step", seeing)
    return seen


CASES = [*((model, torch.float32) for model in MODELS), ("BERT", torch.float16), ("BERT", torch.bfloat16)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_steps_of_one_bucket(device: str, model: str, dtype: torch.dtype, steps: list[tuple[int, ...]]) -> None:
    """Other lengths, and fewer of them, over what the step before has left; its results stay as they were."""
    one = MODELS[model]
    plan = plan_of(one, dtype, device)
    kept: list[tuple[Tensor, Tensor]] = []
    every: list[tuple[int, ...]] = [LENGTHS, (2, 9, 1, 1), (4, 4, 3)]
    for seed, lengths in enumerate(every):
        inputs = batch(one, lengths, device, seed)
        result, wanted = plan.run(inputs), exact(one, inputs)
        assert result.hidden.dtype == dtype
        assert_close(result.hidden, wanted.hidden, dtype)
        assert_close(result.outputs, wanted.outputs, dtype)
        kept += [(found, found.clone()) for found in (result.hidden, result.outputs) if found is not None]
    assert all(torch.equal(*pair) for pair in kept)
    assert steps == every


@pytest.mark.parametrize("device", DEVICES)
def test_buckets_of_all_kinds(device: str) -> None:
    """More rows, one sequence, whole buckets of rows and sequences, with types and without: one plan."""
    plan = plan_of(BERT, device=device)
    for seed, lengths in enumerate([(20, 1), (1,), (4, 4, 4, 4), (16,), (20, 1)]):
        inputs = batch(BERT, lengths, device, seed)
        inputs = inputs if seed % 2 else replace(inputs, token_types=None)
        result, wanted = plan.run(inputs), exact(BERT, inputs)
        assert_close(result.hidden, wanted.hidden)
        assert_close(result.outputs, wanted.outputs)


@pytest.mark.parametrize("device", DEVICES)
def test_as_many_tokens_as_there_is_room_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The starts of sequences that are not there point behind the last token."""
    monkeypatch.setattr(encoder, "TOKENS", 16)
    plan = plan_of(BERT, device=device)
    inputs = batch(BERT, (8, 5, 3), device)
    assert plan.guards(inputs)
    result, wanted = plan.run(inputs), exact(BERT, inputs)
    assert_close(result.hidden, wanted.hidden)
    assert_close(result.outputs, wanted.outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", [MASKED, LABELS], ids=["tokens", "sequences"])
@pytest.mark.parametrize("captured", [True, False])
def test_heads_within_and_behind(device: str, head: HeadSpec, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEQUENCE_OUTPUTS", "TOKEN_OUTPUTS"):
        monkeypatch.setattr(encoder_graph, name, 64 if captured else -1)
    one = replace(BERT, head=head)
    plan = plan_of(one, device=device)
    inputs = batch(one, (3, 1, 2, 1, 2), device)
    result, wanted = plan.run(inputs), exact(one, inputs)
    assert_close(result.hidden, wanted.hidden)
    assert_close(result.outputs, wanted.outputs)
    if head.first_token:
        return
    asked = replace(inputs, rows=torch.tensor([8, 2], device=device))
    result, wanted = plan.run(asked), exact(one, asked)
    assert_close(result.hidden, wanted.hidden)
    assert_close(result.outputs, wanted.outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["BERT", "RoBERTa"])
def test_a_wrong_id_is_told_and_forgotten(device: str, model: str) -> None:
    """By plans whose head is part of the graph, and by those where it is not asked for."""
    one = MODELS[model]
    plan = plan_of(one, device=device)
    inputs = replace(batch(one, LENGTHS, device), checked=False)
    assert plan.guards(inputs)
    wrong = [inputs.token_ids.clone() for _ in range(2)]
    wrong[0][4], wrong[1][13] = one.vocab_size, -1
    types = torch.full_like(wrong[0], one.token_types)
    for bad in (*(replace(inputs, token_ids=ids) for ids in wrong), replace(inputs, token_types=types)):
        with pytest.raises(IdError, match="lies outside the model's tables"):
            plan.run(bad)
        assert_close(plan.run(inputs).hidden, exact(one, inputs).hidden)
    # Behind a shorter step a longer one's wrong ids are still there.
    with pytest.raises(IdError):
        plan.run(replace(inputs, token_ids=wrong[1]))
    short = replace(batch(one, (5, 4), device), checked=False)
    assert_close(plan.run(short).hidden, exact(one, short).hidden)


def hidden_of(result: StepResult) -> torch.Tensor:
    """What a step gives."""
    return result.hidden


@pytest.mark.parametrize("device", DEVICES)
def test_errors_name_the_sequence_and_the_id(device: str, steps: list[tuple[int, ...]]) -> None:
    place = torch.device(device)
    runner = Runner(BERT, packed(BERT, device=device), GenericKernels(), place, SingleProcess())
    for wrong, message in ((999, "sequence 1: token id 999 is outside the vocabulary of 50"), (-6, "token id -6 is")):
        ids = torch.tensor([1, 2, 3, wrong, 4], device=device)
        with pytest.raises(EngineError, match=message):
            runner.flat(Flat(ids, None, (3, 2), (1, 5)), hidden_of)
        with pytest.raises(EngineError, match=message):
            runner.whole([[1, 2, 3], [wrong, 4]])
    ids = torch.tensor([1, 2, 3, 4, 4], device=device)
    with pytest.raises(EngineError, match="this model's token types go from 0 to 1"):
        runner.flat(Flat(ids, ids - 2, (3, 2), (1, 5)), hidden_of)
    found = runner.flat(Flat(ids, None, (3, 2), (1, 5)), hidden_of)
    assert torch.equal(found, runner.whole([[1, 2, 3], [4, 4]]).hidden)
    assert len(steps) == 5, "wrong rows on the host never get so far"


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_that_no_launch_takes_are_refused(device: str) -> None:
    plan = plan_of(BERT, device=device)
    inputs = batch(BERT, LENGTHS, device)
    with pytest.raises(KernelError, match=r"embed: ids is torch\.int32"):
        plan.run(replace(inputs, token_ids=inputs.token_ids.int()))
    with pytest.raises(KernelError, match=r"embed: types has shape \[13\], wanted \[14\]"):
        plan.run(replace(inputs, token_types=inputs.token_ids[:13]))
    with pytest.raises(KernelError, match=r"embed: ids is torch\.int64 on .* with strides \(2,\), wanted contiguous"):
        plan.run(replace(inputs, token_ids=inputs.token_ids.repeat_interleave(2)[::2]))
    with pytest.raises(KernelError, match=r"takes 1 to 8192 tokens of up to 128 sequences, got \(7, 1, 6\)"):
        plan.run(replace(inputs, token_ids=inputs.token_ids[:13]))


class Two:
    """A group of two whose sums are complete."""

    rank, size = 0, 2

    def reduce(self, partial: Tensor) -> Tensor:
        """The same."""
        return partial


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (33,), (30, 3), ()], ids=str)
def test_other_steps_are_walked(
    device: str, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, steps: list[tuple[int, ...]]
) -> None:
    monkeypatch.setattr(encoder, "SEQUENCES", 3)
    monkeypatch.setattr(encoder, "TOKENS", 32)
    plan = plan_of(replace(BERT, head=None), device=device)
    if not lengths:
        assert plan.run(StepInputs(*2 * [torch.empty(0, dtype=torch.int64, device=device)], ())).hidden.shape == (0, 48)
    else:
        inputs = batch(BERT, lengths, device)
        assert not plan.guards(inputs)
        assert_close(plan.run(inputs).hidden, exact(BERT, inputs).hidden)
    assert steps == []


def test_several_processes_and_steps_over_a_cache_are_walked() -> None:
    weights, kernels = packed(BERT), GenericKernels()
    walked = 1 + 5 * BERT.layers + 2
    assert len(kernels.plan(BERT, weights, Bucket("encode"), Two()).launches) == walked
    assert len(kernels.plan(BERT, weights, Bucket("prefill"), SingleProcess()).launches) == walked
    assert len(kernels.plan(BERT, weights, Bucket("encode"), SingleProcess()).launches) == 1


def test_what_graphs_are_captured_for() -> None:
    assert limits(BERT) == encoder_graph.Limits(8192, 128, 40)
    assert limits(replace(BERT, positions=LearnedPositions(514, 2))).longest == 512
    assert limits(replace(BERT, positions=ROTARY)).longest == 8192
    large = limits(replace(BERT, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, gated=True))
    assert large.tokens == 2048, "a layer of Llama-2-7B keeps a GPU busy with that many"
    bert_large = replace(BERT, hidden=1024, heads=16, kv_heads=16, head_dim=64, ffn=4096)
    assert limits(bert_large).tokens == 8192
    assert [token_bucket(n) for n in (1, 16, 17, 128, 129, 384, 385, 1024, 1025, 4096)] == [
        16, 16, 32, 128, 192, 384, 448, 1024, 1280, 4096,
    ]  # fmt: skip
    assert all(token_bucket(n) == n for n in range(256, 8193, 256)), "limits are buckets"
    assert Place.of((7, 1, 6), True) == Place(16, 4, 16, True)
    assert Place.of((130,), False) == Place(192, 1, 192, False)
    assert Place.of((65, 300, 2), False) == Place(384, 4, 384, False)
    assert Place.of((40,) * 8, False) == Place(320, 8, 64, False)


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_are_kept_up_to_a_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_graph, "GRAPHS", 2)
    graphs = graphs_of(BERT, device)
    for length in (1, 17, 33, 2):
        inputs = replace(batch(BERT, (length,), device), token_types=None)
        assert_close(graphs.run(inputs.token_ids, None, (length,)), exact(BERT, inputs).hidden)
        assert len(graphs._runs) <= 2
    assert [place.rows for place, _ in graphs._runs] == [48, 16]


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_several_threads(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each on a stream of its own; one in two meets a wrong id, which must be told to whoever brought it."""
    finish = WalkGraphs.finish

    def slow(self: WalkGraphs, inputs: StepInputs) -> None:
        time.sleep(1e-3)  # others come in, if they can
        finish(self, inputs)

    monkeypatch.setattr(WalkGraphs, "finish", slow)
    plan = plan_of(BERT, device=device)
    inputs = [replace(batch(BERT, (3 + i, 2), device, i), checked=False) for i in range(4)]
    for index in (1, 3):
        inputs[index].token_ids[index] = BERT.vocab_size
    plan.run(inputs[0])  # compiles
    found: list[Tensor | IdError | None] = [None] * 4

    def work(index: int) -> None:
        for _ in range(2 if device == "cpu" else 50):
            try:
                found[index] = plan.run(inputs[index]).hidden
            except IdError as error:
                found[index] = error

    def on_a_stream(index: int) -> None:
        if device == "cpu":
            return work(index)
        with torch.cuda.stream(torch.cuda.Stream()):
            return work(index)

    threads = [threading.Thread(target=on_a_stream, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if device == "cuda":
        torch.cuda.synchronize()
    for index, one in enumerate(found):
        if index % 2:
            assert isinstance(one, IdError)
        else:
            assert isinstance(one, Tensor)
            assert_close(one, exact(BERT, inputs[index]).hidden)


def located(ids: Sequence[int], starts: Sequence[int], table: int) -> list[int]:
    """What :func:`locate` makes of ids, by its definition."""
    return [one if 0 <= one < table and at < max(starts) else 0 for at, one in enumerate(ids)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 31, 32, 80])
@pytest.mark.parametrize("typed", [True, False])
def test_locate(device: str, rows: int, typed: bool) -> None:
    ids = torch.arange(rows) % 12 - 1
    types = torch.arange(rows) % 3
    inside = ids.clamp(min=0).remainder(10)
    for starts in ([0, rows], [0, rows - rows // 3] + [rows - rows // 4] * 3, [0, *range(1, rows // 2), rows // 2]):
        for one, kinds, wrong in (
            (ids, 3, max(starts) > 0),
            (inside, 2, typed and max(starts) > 2),
            (inside, 3, False),
        ):
            flag = torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")
            found = locate(
                one.to(device),
                types.to(device) if typed else None,
                torch.tensor(starts, dtype=torch.int32, device=device),
                vocabulary=10,
                kinds=kinds,
                wrong=flag,
            )
            if device == "cuda":
                torch.cuda.synchronize()
            places = [at for begin, end in pairwise(sorted({*starts})) for at in range(end - begin)]
            assert found[0].tolist() == located(one.tolist(), starts, 10)
            assert (None if found[1] is None else found[1].tolist()) == (
                located(types.tolist(), starts, kinds) if typed else None
            )
            assert found[2].tolist() == places + [0] * (rows - max(starts))
            assert bool(flag) == wrong


@pytest.mark.parametrize("device", DEVICES)
def test_locate_refuses_what_does_not_fit(device: str) -> None:
    ids = torch.arange(4, device=device)
    starts = torch.tensor([0, 4], dtype=torch.int32, device=device)
    wrong = torch.zeros(1, dtype=torch.int32, device=device)
    empty = locate(ids[:0], None, starts * 0, vocabulary=9, kinds=0, wrong=wrong)
    assert [None if one is None else one.shape for one in empty] == [(0,), None, (0,)]
    for arguments, message in (
        ((ids.int(), None, starts, wrong), r"ids is torch\.int32"),
        ((ids[::2], None, starts, wrong), r"ids is .* with strides \(2,\)"),
        ((ids, ids[:3], starts, wrong), r"types has shape \[3\], wanted \[4\]"),
        ((ids, None, starts.long(), wrong), r"starts is torch\.int64"),
        ((ids, None, starts[:0], wrong), r"starts has shape \[0\], wanted \[1\]"),
        ((ids, None, starts, wrong.long()), r"wrong is torch\.int64"),
    ):
        with pytest.raises(KernelError, match=f"locate: {message}"):
            locate(*arguments[:3], vocabulary=9, kinds=2, wrong=arguments[3])


@pytest.mark.gpu
def test_graphs_replay_and_share_their_memory() -> None:
    """The largest bucket first; the others' graphs find room in its memory."""
    graphs = graphs_of(BERT, "cuda", torch.float16)
    bytes_held = []
    for lengths in ((40,) * 100, (40,) * 50, (30,) * 20, (5,), (7, 9), (6,)):
        inputs = batch(BERT, lengths, "cuda")
        hidden = graphs.run(inputs.token_ids, inputs.token_types, lengths)
        assert_close(hidden, exact(BERT, inputs).hidden, torch.float16)
        del hidden, inputs
        torch.cuda.synchronize()
        bytes_held.append(torch.cuda.memory_allocated())
    assert len(graphs._runs) == 5
    assert all(isinstance(run, encoder_graph._Captured) for run in graphs._runs.values())
    assert max(bytes_held) - bytes_held[0] < 2**16, "less than the second bucket's hidden states"


@pytest.mark.gpu
def test_steps_that_nobody_waits_for() -> None:
    """Ids known to be right: nothing waits for the device, steps on two streams in turn."""
    plan = plan_of(BERT, torch.float32, "cuda")
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    given = [batch(BERT, (1 + i % 5, 20 - i), "cuda", i) for i in range(12)]
    torch.cuda.synchronize()
    found = []
    for index, inputs in enumerate(given):
        with torch.cuda.stream(streams[index % 2]):
            found.append(plan.run(inputs))
    torch.cuda.synchronize()
    for inputs, result in zip(given, found, strict=True):
        wanted = exact(BERT, inputs)
        assert_close(result.hidden, wanted.hidden)
        assert_close(result.outputs, wanted.outputs)


@pytest.mark.gpu
def test_a_graph_reads_weights_where_they_lie() -> None:
    weights = packed(BERT, device="cuda")
    plan = GenericKernels().plan(BERT, weights, Bucket("encode"), SingleProcess())
    inputs = batch(BERT, LENGTHS, "cuda")
    before = plan.run(inputs).hidden
    last = weights.layers[-1].ffn_norm
    last.weight.mul_(2)
    assert last.bias is not None
    last.bias.mul_(2)
    assert torch.allclose(plan.run(inputs).hidden, 2 * before)


@pytest.mark.gpu
def test_within_another_capture_steps_are_walked(steps: list[tuple[int, ...]]) -> None:
    kernels, weights = GenericKernels(), packed(BERT, device="cuda")
    plan = kernels.plan(BERT, weights, Bucket("encode"), SingleProcess())
    inputs = batch(BERT, LENGTHS, "cuda")
    StepPlan(Bucket("encode"), walk(BERT, weights, kernels, SingleProcess())).run(inputs)  # compiles; uploads starts
    plan.run(inputs)
    assert steps == [LENGTHS]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert not plan.guards(inputs)
        result = plan.run(inputs)
    graph.replay()
    assert_close(result.hidden, exact(BERT, inputs).hidden)
    assert steps == [LENGTHS]


@pytest.mark.gpu
def test_what_fails_in_a_capture_is_raised() -> None:
    graphs = graphs_of(BERT, "cuda")
    calls: list[int] = []

    def head(hidden: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a head that fails when it is captured")
        return hidden.clone()

    graphs.head = head
    inputs = batch(BERT, LENGTHS, "cuda")
    with pytest.raises(RuntimeError, match="a head that fails"):
        graphs.step(inputs, head=True)
    assert not graphs._runs
    hidden, outputs = graphs.step(inputs, head=True)
    assert_close(hidden, exact(BERT, inputs).hidden)
    assert outputs is not None
    assert torch.equal(outputs, hidden[[0, 7, 8]])
