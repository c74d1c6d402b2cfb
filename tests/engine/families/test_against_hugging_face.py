"""Every family, every task, against Hugging Face in fp32: found by itself, so that a new family is tested by being
there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from engine import Engine
from engine.build import DTYPES
from engine.families import families, spec_from_hf
from engine.inference.runner import Runner
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.spec import LearnedPositions, ModelSpec, RotaryPositions, Task
from tests.engine.tiny import canonical, cases, flat, padded, reference, tiny, token_rows

TOLERANCE = 1e-4  # of the largest output
CPU = torch.device("cpu")
CAUSAL = [name for name, task in cases() if task == "causal_lm"]

#: Configs that take other paths through a family than its tiny one.
VARIANTS: list[tuple[str, Task, dict[str, Any]]] = [
    ("llama", "causal_lm", {"rope_scaling": None, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    ("llama", "causal_lm", {"rope_scaling": None, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    ("llama", "causal_lm", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "hidden_act": "gelu"}),
    ("gpt2", "causal_lm", {"scale_attn_weights": False, "n_inner": None, "activation_function": "gelu"}),
    ("gpt2", "causal_lm", {"tie_word_embeddings": False, "reorder_and_upcast_attn": True}),
    ("gpt_neo", "causal_lm", {"attention_types": [[["local"], 4]], "window_size": 3}),
    ("opt", "causal_lm", {"do_layer_norm_before": False}),
    ("opt", "causal_lm", {"word_embed_proj_dim": 48, "_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ("opt", "causal_lm", {"enable_bias": False, "activation_function": "gelu"}),
    ("qwen2", "causal_lm", {"use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True}),
    ("bert", "masked_lm", {"hidden_act": "gelu_new", "tie_word_embeddings": False}),
    ("roberta", "masked_lm", {"hidden_act": "relu", "type_vocab_size": 2}),
]
if hasattr(Qwen2Config(), "layer_types"):  # older transformers put the window on every layer
    VARIANTS += [
        ("qwen2", "causal_lm", {"max_window_layers": 1, "rope_scaling": None}),
        ("qwen2", "causal_lm", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ]


def outputs(engine: Engine, rows: list[list[int]], task: Task, side: str, pad: int) -> torch.Tensor:
    return flat(engine(padded(rows, side, pad)), rows, task, side)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize(("model_type", "task"), cases())
def test_outputs_are_hugging_faces(model_type: str, task: Task) -> None:
    one = tiny(model_type, task)
    rows = token_rows(one.vocab_size)
    theirs = reference(one.model, rows, task)
    if task != "embedding":
        assert 1 <= float(theirs.std()) <= 3, "outputs too flat or too wild to show a mistake"
    engine = Engine.from_pretrained(one.directory, precision="fp32", device="cpu", task=task)
    assert_close(flat(engine(rows), rows, task, "right"), theirs)
    for side in ("right", "left"):
        assert_close(outputs(engine, rows, task, side, one.pad), theirs)


@pytest.mark.parametrize(("model_type", "task", "changes"), VARIANTS, ids=lambda value: str(value)[:40])
def test_variants(model_type: str, task: Task, changes: dict[str, Any]) -> None:
    one = tiny.__wrapped__(model_type, task, **changes)
    rows = token_rows(one.vocab_size)
    engine = Engine.from_pretrained(one.directory, precision="fp32", device="cpu", task=task)
    assert_close(flat(engine(rows), rows, task, "right"), reference(one.model, rows, task))


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("max_batch", [1, 3])
def test_twenty_decoded_tokens(model_type: str, max_batch: int) -> None:
    """Prefill in chunks of 5, then 20 tokens: the tokens that Hugging Face picks, and its log-probabilities for
    them."""
    one = tiny(model_type, "causal_lm")
    rows = token_rows(one.vocab_size)
    engine = Engine.from_pretrained(
        one.directory,
        precision="fp32",
        device="cpu",
        inference={"prefill_chunk": 5, "max_batch": max_batch, "page_size": 8},
    )
    found = engine.generate(rows, max_new_tokens=20, do_sample=False, logprobs=3, ignore_eos=True)
    for row, generation in zip(rows, found, strict=True):
        whole = row + generation.token_ids
        logits = reference(one.model, [whole], "causal_lm")[len(row) - 1 : -1]
        chances = torch.log_softmax(logits.double(), dim=-1)
        assert generation.token_ids == logits.argmax(-1).tolist()
        limit = TOLERANCE * float(logits.abs().max())
        for step, logprob in enumerate(generation.logprobs or []):
            assert abs(logprob.logprob - float(chances[step, logprob.token])) <= limit
            best = chances[step].topk(3)
            assert [token for token, _ in logprob.top] == best.indices.tolist()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("model_type", "task"), [case for case in cases() if case[1] in ("causal_lm", "embedding")])
def test_half_precisions_err_no_more_than_hugging_face(model_type: str, task: Task, dtype: str) -> None:
    """The yardstick of rounding is Hugging Face's own error in the same dtype, and never less than 4 roundings."""
    one = tiny(model_type, task)
    rows = token_rows(one.vocab_size)
    engine = Engine.from_pretrained(one.directory, precision=dtype, device="cpu", task=task)
    exact = reference(one.model, rows, task)
    half = reference(copy.deepcopy(one.model).to(DTYPES[dtype]), rows, task).float()
    ours = flat(engine(rows), rows, task, "right").float()
    floor = 4 * torch.finfo(DTYPES[dtype]).eps * float(exact.abs().max())
    assert float((ours - exact).abs().max()) <= max(2 * float((half - exact).abs().max()), floor)


@pytest.mark.parametrize(("model_type", "task"), [(f.model_types[0], f.tasks[0]) for f in families()])
def test_a_live_model(model_type: str, task: Task) -> None:
    one = tiny(model_type, task)
    rows = token_rows(one.vocab_size)
    engine = Engine({"precision": "fp32", "device": "cpu", "model": {"path": "live", "task": task}}, model=one.model)
    assert_close(flat(engine(rows), rows, task, "right"), reference(one.model, rows, task))


# ---- mutations: the tests above must be able to see a wrong fact ----

Mutation = Callable[[ModelSpec], ModelSpec | None]


def _activation(spec: ModelSpec) -> ModelSpec:
    return replace(spec, activation="relu" if spec.activation != "relu" else "silu")


def _near_activation(spec: ModelSpec) -> ModelSpec | None:
    """Exact, tanh and quick GELU are three different things."""
    near = {"gelu": "quick_gelu", "gelu_tanh": "quick_gelu"}.get(spec.activation)
    return None if near is None else replace(spec, activation=near)


def _eps(spec: ModelSpec) -> ModelSpec:
    """Twice the eps; more where post-norm keeps the stream so large that no usual eps shows."""
    return replace(spec, norm_eps=spec.norm_eps * 2 if spec.causal else spec.norm_eps + 1e-3)


def _rotary(spec: ModelSpec) -> ModelSpec | None:
    rotary = spec.positions
    if not isinstance(rotary, RotaryPositions):
        return None
    return replace(spec, positions=replace(rotary, inv_freq=tuple(f * 1.05 for f in rotary.inv_freq)))


def _rotary_pairs(spec: ModelSpec) -> ModelSpec | None:
    rotary = spec.positions
    if not isinstance(rotary, RotaryPositions):
        return None
    return replace(spec, positions=replace(rotary, interleaved=not rotary.interleaved))


def _window(spec: ModelSpec) -> ModelSpec | None:
    if not any(spec.windows):
        return None
    return replace(spec, windows=tuple(None if window is None else window + 1 for window in spec.windows))


def _window_layers(spec: ModelSpec) -> ModelSpec | None:
    """Local where it is global and the other way round."""
    windows = tuple(7 if window is None else None for window in spec.windows)
    return replace(spec, windows=windows) if any(spec.windows) else None


def _scale(spec: ModelSpec) -> ModelSpec:
    return replace(spec, attention_scale=spec.attention_scale * 1.01)


def _position_offset(spec: ModelSpec) -> ModelSpec | None:
    learned = spec.positions
    if not isinstance(learned, LearnedPositions):
        return None
    return replace(spec, positions=replace(learned, offset=learned.offset + (-1 if learned.offset else 1)))


def _causal(spec: ModelSpec) -> ModelSpec:
    return replace(spec, causal=not spec.causal)


MUTATIONS: tuple[Mutation, ...] = (
    _activation,
    _near_activation,
    _eps,
    _rotary,
    _rotary_pairs,
    _window,
    _window_layers,
    _scale,
    _position_offset,
    _causal,
)


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__.strip("_"))
@pytest.mark.parametrize("model_type", [family.model_types[0] for family in families()])
def test_a_wrong_fact_shows(model_type: str, mutate: Mutation, request: pytest.FixtureRequest) -> None:
    task: Task = "causal_lm" if model_type in CAUSAL else "masked_lm"
    one = tiny(model_type, task)
    _, spec = spec_from_hf(one.model.config.to_dict(), task, model_type)
    wrong = mutate(spec)
    if wrong is None:
        assert mutate.__name__ in (
            "_near_activation",
            "_rotary",
            "_rotary_pairs",
            "_window",
            "_window_layers",
            "_position_offset",
        )
        return
    rows = token_rows(one.vocab_size)
    kernels = EagerKernels()
    weights = kernels.pack(wrong, canonical(one.model, model_type, spec), CPU, torch.float32)
    with torch.inference_mode():
        ours = Runner(wrong, weights, kernels, CPU, SingleProcess()).whole(rows).outputs
    theirs = reference(one.model, rows, task)
    assert ours is not None
    assert float((ours - theirs).abs().max()) > TOLERANCE * float(theirs.abs().max()), (
        "the comparison cannot see this mistake"
    )
