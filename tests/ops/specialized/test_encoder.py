"""The encoder path against the eager set in fp64: whole models, buckets, heads, and what it leaves to others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import StateDictSource
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.errors import IdError, KernelError
from ops.generic import encoder_graph
from ops.macro_ops import walk
from ops.plan import Bucket, Launch, StepInputs, StepPlan, StepResult, StepState
from ops.spec import ALiBiPositions, HeadSpec, LearnedPositions, ModelSpec, RotaryPositions
from ops.specialized import tile_table
from ops.specialized.encoder import TOKENS, EncoderPlan, encoder_step_plan, supports
from ops.specialized.encoder_forward import Norms
from ops.specialized.tile_table import Tile
from ops.weights import Linear, ModelWeights, Packer
from tests.ops.devices import DEVICES
from tests.ops.specs import noise, spec

# What fills a bucket up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
ENCODER = spec(
    causal=False,
    placement="post",
    norm="layernorm",
    heads=3,
    kv_heads=3,
    head_dim=16,
    positions=LearnedPositions(40, 1),
    token_types=2,
    embedding_norm=True,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    activation="gelu",
)
MODELS: dict[str, ModelSpec] = {
    "BERT": ENCODER,
    "no norm of embeddings": replace(ENCODER, embedding_norm=False, token_types=0),
    "norms in front": spec(causal=False, heads=3, kv_heads=3, head_dim=16, final_norm=True, activation="gelu_tanh"),
    "one layer, no last norm": spec(heads=6, kv_heads=2, layers=1, positions=ALiBiPositions((0.5, 0.25) * 3)),
    "windows": replace(ENCODER, windows=(3, None), causal=True),
}
NORMS: list[Norms] = ["fused", "folded", "separate"]
CASES = [("BERT", torch.float32), ("BERT", torch.bfloat16), *((model, torch.float16) for model in MODELS)]
LENGTHS = (7, 1, 6)


def tiles(m: int, n: int, k: int, dtype: torch.dtype) -> Tile:
    """Small, and split where it can be seen: the products behind a half are."""
    if n == 48:
        return Tile(16, 16, 16, warps=2, stages=2, split=2)
    return Tile(16, 32, 16, warps=2, stages=2)


def packed(one: ModelSpec, dtype: torch.dtype, device: str = "cpu", scale: float = 0.2) -> ModelWeights:
    weights = {
        name: noise(*shape, seed=i) * (scale if len(shape) == 2 else 1) + (1 if "norm.weight" in name else 0)
        for i, (name, shape) in enumerate(one.weight_shapes().items())
    }
    return Packer(one, StateDictSource(weights), torch.device(device), dtype).pack()


def batch(one: ModelSpec, lengths: tuple[int, ...], device: str = "cpu", seed: int = 0) -> StepInputs:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, one.vocab_size, (total,), generator=generator)
    types = torch.randint(0, 2, (total,), generator=generator).to(device) if one.token_types else None
    positions = torch.cat([torch.arange(length) for length in lengths])
    return StepInputs(ids.to(device), positions.to(device), lengths, types)


def exact(one: ModelSpec, inputs: StepInputs, scale: float = 0.2) -> StepResult:
    """In fp64 by the eager set."""
    on_cpu = replace(
        inputs,
        token_ids=inputs.token_ids.cpu(),
        positions=inputs.positions.cpu(),
        token_types=None if inputs.token_types is None else inputs.token_types.cpu(),
        rows=None if inputs.rows is None else inputs.rows.cpu(),
        memo={},
    )
    launches = walk(one, packed(one, torch.float64, scale=scale), EagerKernels(), SingleProcess())
    return StepPlan(Bucket("encode"), launches).run(on_cpu)


def assert_close(ours: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """A rounding after each of some ten steps, each of which may double it."""
    assert ours.shape == wanted.shape
    limit = 24 * torch.finfo(dtype).eps * float(wanted.abs().max())
    assert float((ours.double().cpu() - wanted).abs().max()) <= limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_hidden_states(device: str, model: str, dtype: torch.dtype, norms: Norms) -> None:
    one = MODELS[model]
    plan = EncoderPlan(one, packed(one, dtype, device), norms=norms, tiles=tiles)
    inputs = batch(one, LENGTHS, device)
    hidden = plan.run(inputs.token_ids, inputs.token_types, LENGTHS)
    assert hidden.dtype == dtype
    assert_close(hidden, exact(one, inputs).hidden, dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_one_plan_serves_every_length(device: str) -> None:
    """Buckets, and what an earlier, longer batch has left behind the tokens of a later one."""
    plan = EncoderPlan(ENCODER, packed(ENCODER, torch.float32, device), tiles=tiles)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed, lengths in enumerate([(20, 1), (1,), (5, 5, 2), (16,), (20, 1)]):
        inputs = batch(ENCODER, lengths, device, seed)
        types = inputs.token_types if seed % 2 else None
        hidden = plan.run(inputs.token_ids, types, lengths)
        kept.append((hidden, hidden.clone()))
        assert_close(hidden, exact(ENCODER, replace(inputs, token_types=types)).hidden, torch.float32)
    assert all(torch.equal(*pair) for pair in kept), "results are the caller's own"


@pytest.mark.parametrize("device", DEVICES)
def test_graphs_are_kept_up_to_a_number(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_graph, "GRAPHS", 2)
    plan = EncoderPlan(ENCODER, packed(ENCODER, torch.float32, device), tiles=tiles)
    for length in (1, 17, 33):
        inputs = batch(ENCODER, (length,), device)
        wanted = exact(ENCODER, replace(inputs, token_types=None)).hidden
        assert_close(plan.run(inputs.token_ids, None, (length,)), wanted, torch.float32)
        assert len(plan._runs) <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_wrong_id_is_told_and_forgotten(device: str) -> None:
    plan = EncoderPlan(ENCODER, packed(ENCODER, torch.float32, device), tiles=tiles)
    inputs = batch(ENCODER, LENGTHS, device)
    wrong = inputs.token_ids.clone()
    wrong[4] = ENCODER.vocab_size
    for ids, types in ((wrong, None), (inputs.token_ids, torch.full_like(wrong, 2))):
        with pytest.raises(IdError, match="lies outside the model's tables"):
            plan.run(ids, types, LENGTHS)
        assert_close(
            plan.run(inputs.token_ids, inputs.token_types, LENGTHS), exact(ENCODER, inputs).hidden, torch.float32
        )


HEADS: dict[str, HeadSpec] = {
    "pooler": HeadSpec(task="embedding", outputs=0, first_token=True, dense=True, activation="tanh"),
    "classifier": HeadSpec(task="sequence_classification", outputs=3, first_token=True, dense=True, activation="tanh"),
    "tokens": HeadSpec(task="token_classification", outputs=5, bias=True),
    "masked LM": HeadSpec(task="masked_lm", outputs=50, dense=True, activation="gelu", norm=True, bias=True, tied=True),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("captured", [True, False])
def test_heads(device: str, head: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences in a bucket of eight; also in fewer, so that heads are not asked for what is not there."""
    for name in ("SEQUENCE_OUTPUTS", "TOKEN_OUTPUTS"):
        monkeypatch.setattr(encoder_graph, name, 64 if captured else -1)
    one = replace(ENCODER, head=HEADS[head])
    weights, kernels = packed(one, torch.float16, device), EagerKernels()
    plan = encoder_step_plan(
        one, weights, kernels, StepPlan(Bucket("encode"), walk(one, weights, kernels, SingleProcess())), tokens=TOKENS
    )
    for lengths in ((3, 1, 2, 1, 2), (9,)):
        inputs = batch(one, lengths, device)
        assert plan.guards(inputs)
        result, wanted = plan.run(inputs), exact(one, inputs)
        assert result.outputs is not None
        assert wanted.outputs is not None
        assert_close(result.hidden, wanted.hidden, torch.float16)
        assert_close(result.outputs, wanted.outputs, torch.float16)
    if not one.head or one.head.first_token:
        return
    asked = replace(inputs, rows=torch.tensor([8, 2], device=device))
    wanted = exact(one, asked)
    result = plan.run(asked)
    assert result.outputs is not None
    assert wanted.outputs is not None
    assert_close(result.hidden, wanted.hidden, torch.float16)
    assert_close(result.outputs, wanted.outputs, torch.float16)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [(513,), (300, 300, 300, 200), (1,) * 65, (3, 0)])
def test_what_it_does_not_cover_goes_to_the_fallback(device: str, lengths: tuple[int, ...]) -> None:
    one = replace(ENCODER, positions=LearnedPositions(600, 1))
    weights = packed(one, torch.float16, device)
    seen = []

    def run(state: StepState) -> None:
        seen.append(state.inputs.lengths)
        state.hidden = state.inputs.token_ids

    fallback = StepPlan(Bucket("encode"), [Launch("walked", run)])
    plan = encoder_step_plan(one, weights, EagerKernels(), fallback, tokens=TOKENS)
    inputs = batch(one, lengths, device)
    assert not plan.guards(inputs)
    guarding = replace(fallback, guards=lambda inputs: True)
    assert encoder_step_plan(one, weights, EagerKernels(), guarding, tokens=TOKENS).guards(inputs)
    plan.run(inputs)
    assert seen == [lengths]
    with pytest.raises(KernelError, match="the encoder path takes 1 to 1024 tokens of up to 64 sequences"):
        EncoderPlan(one, weights).run(inputs.token_ids, None, lengths)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"positions": RotaryPositions(8, (1.0,) * 4)}, "rotary positions"),
    ({"qk_norm": True}, "norms of queries and keys"),
    ({"gated": True}, "gated feed-forwards"),
    ({"embedding_size": 24}, "projected embeddings"),
    ({"placement": "pre"}, "a norm behind the embeddings"),
    ({"hidden": 20000}, "rows of 20000 elements"),
    ({"head_dim": 300}, "heads of 300 elements"),
    ({"layers": 0, "windows": ()}, "no layers"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_other_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    one = replace(ENCODER, **changes)
    found = supports(one, torch.float16)
    assert found is not None
    assert message in found
    with pytest.raises(KernelError, match=f'cannot run this test model: .*{message}.*; set "kernels" to "generic"'):
        EncoderPlan(one, packed(ENCODER, torch.float16))
    walked = StepPlan(Bucket("encode"), [Launch("walked", lambda state: None)])
    assert encoder_step_plan(one, packed(ENCODER, torch.float16), EagerKernels(), walked, tokens=TOKENS) is walked


def test_dtypes_and_packed_weights() -> None:
    assert supports(ENCODER, torch.float16) is None
    assert supports(ENCODER, torch.bfloat16) is None
    assert supports(ENCODER, torch.float32) == "it computes in fp16 or bf16, not torch.float32"
    weights = packed(ENCODER, torch.float16)

    class Packed:
        shape = (40, 48)

        def apply(self, x: Tensor) -> Tensor:
            return x

    odd = replace(weights, layers=(weights.layers[0], replace(weights.layers[1], up=Linear(Packed()))))
    with pytest.raises(KernelError, match="it reads plain weights, not Packed"):
        EncoderPlan(ENCODER, odd)


def test_only_what_was_measured_ahead_is_taken() -> None:
    """Without a figure ``generic`` serves; with one this path does, from so many tokens to so many."""
    weights, kernels = packed(ENCODER, torch.float16), EagerKernels()
    walked = StepPlan(Bucket("encode"), [Launch("walked", lambda state: None)])
    assert encoder_step_plan(ENCODER, weights, kernels, walked) is walked
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(tile_table.AHEAD, (ENCODER.hidden, ENCODER.ffn), (4, 8))
        plan = encoder_step_plan(ENCODER, weights, kernels, walked)
        assert plan.guards(batch(ENCODER, (3, 1), torch.device("cpu")))
        assert not plan.guards(batch(ENCODER, (3,), torch.device("cpu")))
        assert plan.guards(batch(ENCODER, (3, 5), torch.device("cpu")))
        assert not plan.guards(batch(ENCODER, (3, 6), torch.device("cpu")))
