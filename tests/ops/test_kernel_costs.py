"""What our kernels say they cost, against what torch's operators are counted for on the same steps (``eager``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.checkpoint import StateDictSource
from engine.inference.kv_cache import PagedCache
from engine.inference.runner import Runner
from ops.closed_forms import norm_flops
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.generic.kernel_set import GenericKernels
from ops.plan import KernelSet
from ops.spec import HeadSpec, LearnedPositions, ModelSpec, RotaryPositions
from ops.specialized.encoder import EncoderPlan
from ops.specialized.encoder_forward import Norms
from ops.step_costs import decode_cost, encoder_layers_cost
from ops.weights import Packer, model_parameters
from profiler import Counter, Counts
from tests.ops.devices import DEVICES
from tests.ops.generic.test_kernel_set import decode_state
from tests.ops.specialized.test_encoder import tiles
from tests.ops.specs import spec
from tests.ops.test_reduce import weights_of

# What fills a bucket of an encoder up is whatever lay there, and computed: in the interpreter numpy remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
BIASED: dict[str, Any] = {"qkv_bias": True, "out_bias": True, "ffn_bias": True, "norm": "layernorm"}
HEAD = HeadSpec(task="causal_lm", outputs=50, tied=True)
MODELS: dict[str, ModelSpec] = {
    "GPT-2": spec(
        **BIASED, positions=LearnedPositions(40), kv_heads=6, activation="gelu_tanh", final_norm=True, head=HEAD
    ),
    "Llama": spec(
        positions=RotaryPositions(8, (1.0, 0.1, 0.01, 0.001)), gated=True, final_norm=True, head=HEAD, windows=(5, None)
    ),
    "BERT": spec(
        **BIASED, positions=LearnedPositions(40), kv_heads=6, activation="gelu", causal=False, placement="post",
        embedding_norm=True, token_types=2,
        head=HeadSpec(task="sequence_classification", outputs=3, first_token=True, dense=True, activation="tanh"),
    ),
}  # fmt: skip
#: As many tokens as a bucket has rows, so that nothing fills it up.
ROWS = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2]]
CAUSAL = ["GPT-2", "Llama"]


def runner(kernels: KernelSet, one: ModelSpec, device: str) -> Runner:
    """With plain weights, whatever the set would make of them."""
    place = torch.device(device)
    weights = Packer(one, StateDictSource(weights_of(one)), place, torch.float32).pack()
    return Runner(one, weights, kernels, place, SingleProcess())


def counted(kernels: KernelSet, one: ModelSpec, device: str, step: str) -> Counts:
    """Of the second such step: the first makes buffers."""
    run = runner(kernels, one, device)
    if step == "whole":
        run.whole(ROWS)
        with Counter() as counter:
            run.whole(ROWS)
        return counter.counts()
    cache = PagedCache(one, pages=9, page_size=4, device=run.device, dtype=torch.float32)
    held = [cache.allocate(12) for _ in ROWS]
    with Counter() as counter:
        run.prefill(cache, held, ROWS, 8)
    if step == "decode":
        with Counter() as counter:
            run.decode(cache, held, [4, 5])
    return counter.counts()


def parts(counts: Counts, one: ModelSpec) -> dict[str, Any]:
    """Work by part, without the name of the model and of the kind of step."""
    return {module.name.removeprefix(f"{one.family}."): module.total() for module in counts.module(one.family).walk()}


def extra(one: ModelSpec, step: str) -> int:
    """Operations that eager has and the kernels have not: it makes tables of cosines once a step, with an angle for
    both elements of a pair, and turns signs; they make an angle a pair in each layer, and norm all rows at the end."""
    tokens, more = (2, 0) if step == "decode" else (16, 0)
    if isinstance(one.positions, RotaryPositions):
        dim, turned = one.positions.dim, one.heads + one.kv_heads
        more += tokens * (dim // 2 + 4 * dim) + one.layers * (tokens * turned * dim // 2 - tokens * 5 * (dim // 2))
    if step == "prefill":
        more -= norm_flops(16 - 2, one.hidden, one.norm, one.norm == "layernorm")
    return more


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("model", "step"), [*((m, s) for m in CAUSAL for s in ("whole", "prefill", "decode")), ("BERT", "whole")]
)
def test_generic_counts_what_eager_does(device: str, model: str, step: str) -> None:
    """Products and attention part by part; norms are computed by their producers in one and by consumers in the
    other, so that all operations are compared as a whole."""
    one = MODELS[model]
    ours, wanted = counted(GenericKernels(), one, device, step), counted(EagerKernels(), one, "cpu", step)
    assert not ours.unknown
    assert {p: w.macs for p, w in parts(ours, one).items()} == {p: w.macs for p, w in parts(wanted, one).items()}
    assert ours.total().flops == wanted.total().flops - extra(one, step)
    assert ours.root.total_parameters == one.parameters()
    assert {m.name: m.parameters for m in ours.root.walk()} == {m.name: m.parameters for m in wanted.root.walk()}


@pytest.mark.parametrize("device", DEVICES)
def test_what_masks_leave_is_executed(device: str) -> None:
    """Llama's first layer sees 5 keys at most; eager's masks are values, so that it executes the square."""
    one = MODELS["Llama"]
    counts = counted(GenericKernels(), one, device, "prefill")
    for layer, seen in ((0, 1 + 2 + 3 + 4 + 4 * 5), (1, 36)):
        work = counts.module(f"{one.family}.prefill.layers.{layer}.attend").total()
        assert work.flops == 4 * one.q_size * 2 * 64
        assert work.executed_flops == 4 * one.q_size * 2 * seen
        cached, table = 2 * 16 * one.kv_size * 4, 2 * 3 * 4
        # Where two sequences begin and end is sent to a GPU in the first layer.
        sent = 3 * 4 if device == "cuda" and layer == 0 else 0
        assert (work.bytes_read, work.bytes_written) == (
            16 * one.q_size * 4 + cached + table + 2 * 4 + 3 * 4 + sent,
            16 * one.q_size * 4 + sent,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_the_decoder_counts_what_the_plan_does(device: str) -> None:
    """Out of static buffers, one row of four belonging to nobody: it sees its own token on the scratch page."""
    one = MODELS["GPT-2"]
    run = runner(GenericKernels(), one, device)
    cache = PagedCache(one, pages=9, page_size=4, device=run.device, dtype=torch.float32)
    spare = [cache.scratch] * 3
    state = decode_state(cache, [cache.allocate(12).pages, spare], [7, 0], [1, 0])
    decoder = run.kernels.decoder(one, run.weights, state, run.group)
    assert decoder is not None
    with Counter() as counter:
        decoder.logits(12)
    contexts = [[8, 1]]
    cost = decode_cost(one, contexts, 0, 4, logits=True)
    total = counter.counts().total()
    assert (total.flops, total.executed_flops, total.macs) == (cost.flops, cost.executed_flops, cost.macs)


@pytest.mark.parametrize("model", CAUSAL)
def test_the_closed_form_of_a_decode_step_is_its_sum(model: str) -> None:
    """What the persistent kernel is counted as: eager's step, less what ``extra`` explains."""
    one = MODELS[model]
    total = counted(EagerKernels(), one, "cpu", "decode").total()
    cost = decode_cost(one, [[9, 9]], 1000, 4, logits=True)
    assert (cost.flops, cost.macs) == (total.flops - extra(one, "decode"), total.macs)
    two = decode_cost(one, [[9, 9], [10, 10]], 1000, 4, logits=False)
    more = decode_cost(one, [[10, 10]], 1000, 4, logits=True)
    assert two.flops == cost.flops + more.flops + 4 * one.vocab_size
    kept = 2 * one.kv_size * 4
    seen = 2 * sum(min(9, one.window(layer) or 9) for layer in range(one.layers))
    tables = 1 + isinstance(one.positions, LearnedPositions)
    assert cost.bytes_read == 1000 + kept * seen + 2 * tables * one.hidden * 4
    assert cost.bytes_written == kept * 2 * one.layers + 2 * one.vocab_size * 4


def test_the_closed_form_of_an_encoders_layers_is_their_sum() -> None:
    one = MODELS["BERT"]
    wanted = counted(EagerKernels(), one, "cpu", "whole").module(f"{one.family}.layers").total()
    cost = encoder_layers_cost(one, 16, [8, 8], 1000, 2)
    # Eager's norm of the embeddings stands in the first layer, that behind the last layer in ``final``.
    assert (cost.flops, cost.executed_flops, cost.macs) == (wanted.flops, wanted.executed_flops, wanted.macs)
    assert (cost.bytes_read, cost.bytes_written) == (1000 + 16 * one.hidden * 2, 16 * one.hidden * 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("norms", ["separate", "fused", "folded"])
def test_fused_tiles_count_what_the_walk_does(device: str, norms: Norms) -> None:
    """Where norms are fused, those of the residual are computed once more by what adds it; folded ones have no bias.
    Here the biases of out and down are biases of fused products."""
    one = MODELS["BERT"]
    run = runner(GenericKernels(), one, device)
    weights = Packer(one, StateDictSource(weights_of(one)), run.device, torch.float16).pack()
    graphs = EncoderPlan(one, weights, norms=norms, tiles=tiles)
    ids = torch.tensor([*ROWS[0], *ROWS[1]], device=device)
    types = torch.zeros_like(ids)
    graphs.run(ids, types, (8, 8))
    with Counter() as counter:
        graphs.run(ids, types, (8, 8))
    ours, wanted = counter.counts(), counted(EagerKernels(), one, "cpu", "whole").module(one.family)
    assert not ours.unknown
    found = {module.name: module.total() for module in ours.root.walk()}
    for index in range(one.layers):
        for part in ("qkv", "attend", "attention_out", "ffn_up", "ffn_down"):
            name = f"layers.{index}.{part}"
            assert found[name].macs == {m.name: m for m in wanted.walk()}[f"{one.family}.{name}"].total().macs
    again = 0 if norms == "separate" else 2 * one.layers * norm_flops(16, one.hidden, one.norm, True)
    head = next(m for m in wanted.walk() if m.name.endswith("head")).total().flops
    biases = 2 * one.layers * 16 * one.hidden
    assert ours.total().flops == wanted.total().flops - head - biases + again - (norms == "folded") * biases
    assert ours.root.total_parameters == one.parameters() - sum(
        held.elements for held in model_parameters(one, weights)["head"]
    )
