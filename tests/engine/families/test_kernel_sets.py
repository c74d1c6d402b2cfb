"""The families on each kernel set of GPU kernels, against Hugging Face in fp32: a few in Triton's interpreter, all of
them on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from engine import Engine
from engine.build import DTYPES
from ops.spec import Task
from tests.engine.tiny import Tiny, cases, flat, padded, reference, tiny, token_rows
from tests.ops.devices import DEVICES

FIRST = [case for case in cases() if case[1] in ("causal_lm", "embedding", "masked_lm")]
CAUSAL = [name for name, task in FIRST if task == "causal_lm"]
#: What the interpreter runs: learned positions, windows, rotary with grouped heads, post-norm encoders.
INTERPRETED: list[tuple[str, Task]] = [
    ("gpt2", "causal_lm"),
    ("gpt_neo", "causal_lm"),
    ("llama", "causal_lm"),
    ("opt", "causal_lm"),
    ("bert", "embedding"),
    ("roberta", "masked_lm"),
]
INTERPRETER, GPU = DEVICES


def on_devices(few: Sequence[tuple[Any, ...]], many: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Parameters (device, *case): ``few`` cases in the interpreter, ``many`` on a GPU."""
    return [
        pytest.param(device.values[0], *case, marks=device.marks, id="-".join(map(str, (device.id, *case))))
        for device, them in ((INTERPRETER, few), (GPU, many))
        for case in them
    ]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """TF32 would round the reference."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


#: What the specialized set's kernels need of the tiny models: head sizes in multiples of 8, no projected embeddings.
FITTING: dict[str, dict[str, Any]] = {
    "gpt2": {"n_head": 6},
    "gpt_neo": {"num_heads": 6},
    "opt": {"num_attention_heads": 6, "word_embed_proj_dim": 48},
}


def assert_outputs(device: str, model_type: str, task: Task, precision: str, kernels: str) -> None:
    """The engine's outputs are as near to Hugging Face in fp32 as Hugging Face in that dtype is.

    In half precision two right answers differ: the typical token may be off by 1.5 times what Hugging Face's is, the
    worst one by 8 times (where two keys nearly tie, which of them wins is a matter of rounding, and all that follows
    differs).
    """
    one = tiny(model_type, task, **(FITTING.get(model_type, {}) if kernels == "specialized" else {}))
    rows = token_rows(one.vocab_size)
    exact = reference(copy.deepcopy(one.model).to(device), rows, task)
    half = reference(copy.deepcopy(one.model).to(device, DTYPES[precision]), rows, task).float()
    engine = Engine.from_pretrained(one.directory, precision=precision, device=device, task=task, kernels=kernels)
    assert engine.plan.kernels == kernels
    ours = flat(engine(padded(rows, "right", one.pad)), rows, task, "right")
    assert ours.device.type == device
    found, theirs = ((x.float() - exact).abs().amax(-1) for x in (ours, half))
    largest = float(exact.abs().max())
    if precision == "fp32":
        assert float(found.max()) <= max(2 * float(theirs.max()), 1e-4 * largest)
        return
    eps = torch.finfo(DTYPES[precision]).eps * largest
    assert float(found.median()) <= max(1.5 * float(theirs.median()), eps)
    assert float(found.max()) <= max(8 * float(theirs.max()), 4 * eps)


@pytest.mark.parametrize(
    ("device", "model_type", "task", "precision"),
    on_devices([(*case, "fp32") for case in INTERPRETED], [(*case, dtype) for case in FIRST for dtype in DTYPES]),
)
def test_outputs(device: str, model_type: str, task: Task, precision: str) -> None:
    assert_outputs(device, model_type, task, precision, "generic")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("model_type", "task"), FIRST)
def test_specialized_outputs(model_type: str, task: Task, precision: str) -> None:
    assert_outputs("cuda", model_type, task, precision, "specialized")


@pytest.mark.parametrize(
    ("device", "model_type"),
    on_devices([(name,) for name in ("gpt2", "llama")], [(name,) for name in CAUSAL]),
)
def test_eight_greedy_tokens_as_eager_gives(device: str, model_type: str) -> None:
    """Prompts in chunks of 5 over pages of 8 tokens, then one token a row."""
    one = tiny(model_type, "causal_lm")
    rows = token_rows(one.vocab_size)
    sizes = {"prefill_chunk": 5, "page_size": 8, "max_tokens": 64}
    eager, ours = (
        Engine.from_pretrained(one.directory, precision="fp32", device=device, kernels=name, inference=sizes).generate(
            rows, max_new_tokens=8, do_sample=False, ignore_eos=True, logprobs=2
        )
        for name in ("eager", "generic")
    )
    assert [found.token_ids for found in ours] == [found.token_ids for found in eager]
    for found, wanted in zip(ours, eager, strict=True):
        for step, exact in zip(found.logprobs or [], wanted.logprobs or [], strict=True):
            assert abs(step.logprob - exact.logprob) <= 1e-3


def rounding(one: Tiny, rows: list[list[int]]) -> float:
    """What fp16 may make of a log-probability of this model: 4 times the largest error of Hugging Face's logits."""
    exact = reference(one.model, rows, "causal_lm")
    half = reference(copy.deepcopy(one.model).cuda().half(), rows, "causal_lm")
    return 4 * float((half.float().cpu() - exact).abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_k": 20, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kernels", ["generic", "specialized"])
@pytest.mark.parametrize("model_type", CAUSAL)
def test_decoding_in_fp16_follows_eager(model_type: str, kernels: str, options: dict[str, Any]) -> None:
    """24 tokens of three rows in one batch: where a row leaves eager's tokens, eager's own choice was a near tie."""
    one = tiny(model_type, "causal_lm", **FITTING.get(model_type, {}))
    rows = token_rows(one.vocab_size)
    limit = rounding(one, rows)
    eager, ours = (
        Engine.from_pretrained(
            one.directory, precision="fp16", device="cuda", kernels=name, inference={"max_tokens": 64, "page_size": 8}
        )
        for name in ("eager", kernels)
    )
    wanted = eager.generate(rows, max_new_tokens=24, ignore_eos=True, logprobs=2, **options)
    found = ours.generate(rows, max_new_tokens=24, ignore_eos=True, logprobs=2, **options)
    plain = ours.generate(rows, max_new_tokens=24, ignore_eos=True, **options)
    for one_row, exact in zip(found, wanted, strict=True):
        for step, right in zip(one_row.logprobs or [], exact.logprobs or [], strict=True):
            if step.token != right.token:
                gap = right.top[0][1] - right.top[1][1]
                assert options or gap <= limit, (step, right)
                break
            assert abs(step.logprob - right.logprob) <= limit
    if not options:
        assert [row.token_ids for row in plain] == [row.token_ids for row in found]
