"""The generic set as a whole: what no family's tiny checkpoint shows, its partial sums, and its decode steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint import StateDictSource
from engine.inference.kv_cache import PagedCache
from engine.inference.runner import Runner
from ops.collective import Collective, SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.errors import KernelError
from ops.generic.kernel_set import GenericKernels
from ops.plan import Bucket, DecodeState, KernelSet
from ops.quantization.tensor import QuantizedTensor
from ops.spec import ALiBiPositions, HeadSpec, LearnedPositions, ModelSpec, RotaryPositions
from ops.weights import Linear
from tests.ops.devices import DEVICES
from tests.ops.specs import spec
from tests.ops.test_reduce import weights_of

# What fills a bucket of an encoder up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
HEAD = HeadSpec(task="causal_lm", outputs=50)
MODELS: dict[str, dict[str, Any]] = {
    "norms of heads": {
        "qk_norm": True, "final_norm": True, "gated": True, "qkv_bias": True,
        "positions": RotaryPositions(4, (1.0, 0.1), 1.3, True),
    },
    "norms of embeddings": {"embedding_norm": True, "norm": "layernorm", "token_types": 2, "embedding_scale": 3.0},
    "soft caps": {"final_softcap": 1.5, "attention_softcap": 2.0, "final_norm": True, "windows": (3, None)},
    "alibi": {"positions": ALiBiPositions(tuple(2.0**-i for i in range(1, 7))), "kv_heads": 6},
    "projected": {
        "embedding_size": 16, "embedding_scale": 2.0, "positions": LearnedPositions(40, 2), "final_norm": True,
        "head": HeadSpec(task="causal_lm", outputs=50, tied=True),
    },
    "post-norm": {
        "placement": "post", "norm": "layernorm", "embedding_norm": True, "out_bias": True, "ffn_bias": True,
        "positions": LearnedPositions(20), "causal": False, "activation": "gelu", "token_types": 2,
        "head": HeadSpec(task="sequence_classification", outputs=3, first_token=True, dense=True, activation="tanh"),
    },
}  # fmt: skip
ROWS = [[1, 2, 3, 4, 5], [6], [7, 8, 9]]


def runner(kernels: KernelSet, one: ModelSpec, device: str, group: Collective | None = None, half: float = 1) -> Runner:
    """``half``: a factor on the weights whose products are reduced."""
    weights = weights_of(one)
    for name in weights:
        if name.startswith("layers") and name.endswith(("out.weight", "down.weight")):
            weights[name] = weights[name] * half
    place = torch.device(device)
    packed = kernels.pack(one, StateDictSource(weights), place, torch.float32)
    return Runner(one, packed, kernels, place, group or SingleProcess())


def assert_same(ours: Tensor | None, wanted: Tensor | None) -> None:
    assert ours is not None
    assert wanted is not None
    assert ours.shape == wanted.shape
    assert float((ours.cpu() - wanted.cpu()).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_whole_sequences(device: str, model: str) -> None:
    one = spec(**({"head": HEAD} | MODELS[model]))
    types = [[i % 2 for i in row] for row in ROWS] if one.token_types else None
    ours, wanted = (runner(k, one, device).whole(ROWS, types) for k in (GenericKernels(), EagerKernels()))
    assert_same(ours.hidden, wanted.hidden)
    assert_same(ours.outputs, wanted.outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", [name for name in MODELS if name != "post-norm"])
def test_over_the_cache(device: str, model: str) -> None:
    """Prompts in chunks of 3, one token a row by a plan, and one by the decoder out of static buffers."""
    one = spec(**({"head": HEAD} | MODELS[model]))
    kernels = GenericKernels()
    runners = [runner(kernels, one, device), runner(EagerKernels(), one, device)]
    caches = [PagedCache(one, pages=9, page_size=4, device=r.device, dtype=torch.float32) for r in runners]
    held = [[cache.allocate(12) for _ in ROWS] for cache in caches]
    steps = list(zip(runners, caches, held, strict=True))
    assert_same(*(r.prefill(cache, rows, ROWS, 3) for r, cache, rows in steps))
    assert_same(*(r.decode(cache, rows, [4, 5, 6]) for r, cache, rows in steps))
    wanted = runners[1].decode(caches[1], held[1], [7, 8, 9])
    state = decode_state(caches[0], [s.pages for s in held[0]], [s.length for s in held[0]], [7, 8, 9])
    decoder = kernels.decoder(one, runners[0].weights, state, SingleProcess())
    assert decoder is not None
    assert not decoder.greedy(torch.zeros(1, 3, dtype=torch.int64, device=device))
    assert_same(decoder.logits(longest=12), wanted)
    assert state.tokens.tolist() == [7, 8, 9]


def decode_state(cache: PagedCache, pages: list[list[int]], lengths: list[int], tokens: list[int]) -> DecodeState:
    device = cache.device
    table = torch.tensor(pages, dtype=torch.int32, device=device)
    ids, positions = torch.tensor(tokens, device=device), torch.tensor(lengths, device=device)
    return DecodeState(ids, positions, table, cache.keys, cache.values)


@pytest.mark.gpu
def test_a_captured_step_follows_its_buffers() -> None:
    """Replays of one graph against plans: positions grow, and rows may belong to nobody."""
    one = spec(head=HEAD, **MODELS["norms of heads"])
    kernels = GenericKernels()
    run = runner(kernels, one, "cuda")
    caches = [PagedCache(one, pages=9, page_size=4, device=run.device, dtype=torch.float32) for _ in range(2)]
    held = [[cache.allocate(12) for _ in ROWS] for cache in caches]
    for cache, rows in zip(caches, held, strict=True):
        run.prefill(cache, rows, ROWS, 8)
    spare = [caches[0].scratch] * 3
    state = decode_state(caches[0], [*(s.pages for s in held[0]), spare], [5, 1, 3, 0], [4, 5, 6, 0])
    decoder = kernels.decoder(one, run.weights, state, SingleProcess())
    assert decoder is not None
    decoder.logits(12)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decoder.logits(12)
    for tokens in ([4, 5, 6], [7, 8, 9], [10, 11, 12]):
        state.tokens[:3].copy_(torch.tensor(tokens))
        graph.replay()
        assert_same(logits[:3], run.decode(caches[1], held[1], tokens))
        state.positions[:3] += 1


class Twice:
    """Two ranks that bring the same."""

    rank, size = 0, 2

    def reduce(self, partial: Tensor) -> Tensor:
        """Both."""
        return partial.mul_(2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", ["norms of heads", "post-norm"])
def test_bias_and_residual_come_once_behind_the_reduce(device: str, model: str) -> None:
    one = spec(**({"head": HEAD} | MODELS[model] | {"out_bias": True, "ffn_bias": True}))
    shared = runner(GenericKernels(), one, device, Twice(), half=0.5).whole(ROWS)
    assert_same(shared.outputs, runner(EagerKernels(), one, device).whole(ROWS).outputs)


@pytest.mark.parametrize("device", DEVICES)
def test_no_weights_but_plain_ones(device: str) -> None:
    one = spec(head=HEAD)
    kernels = GenericKernels()
    weights = runner(kernels, one, device).weights
    quantized = QuantizedTensor.__new__(QuantizedTensor)
    layer = replace(weights.layers[1], down=Linear(quantized))
    with pytest.raises(KernelError, match=r"read plain weights, layers\.1\.down is a QuantizedTensor: set"):
        kernels.plan(one, replace(weights, layers=(weights.layers[0], layer)), Bucket("encode"), SingleProcess())


def test_what_it_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.triton_support.interpreted", lambda: True)
    cpu = torch.device("cpu")
    GenericKernels().assert_supports(spec(), cpu, torch.bfloat16)
    with pytest.raises(KernelError, match=r'kernels "generic" compute in fp32, bf16 or fp16, not torch\.float64'):
        GenericKernels().assert_supports(spec(), cpu, torch.float64)
    monkeypatch.setattr("ops.triton_support.interpreted", lambda: False)
    with pytest.raises(KernelError, match='kernels "generic" need a CUDA GPU, the device is cpu: set "kernels" to'):
        GenericKernels().assert_supports(spec(), cpu, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_constants_are_uploaded_before_any_step(device: str) -> None:
    """An upload within a captured step would fail."""
    one = spec(head=HEAD, **MODELS["norms of heads"])
    kernels = GenericKernels()
    weights = runner(kernels, one, device).weights
    plan = kernels.plan(one, weights, Bucket("decode"), SingleProcess())
    before = dict(kernels._constants)
    assert len(before) == 1
    rotary = kernels._rotary(one, weights.embed.token.device)
    assert rotary is not None
    assert rotary.inv_freq is next(iter(before.values()))
    assert len(kernels._constants) == 1
    assert len(plan.launches) == 1 + 5 * one.layers + 2
