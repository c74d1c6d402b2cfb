"""The families on a CUDA GPU, each dtype, against Hugging Face in fp32 on the same GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from engine import Engine
from engine.build import DTYPES
from ops.spec import Task
from tests.engine.tiny import cases, flat, padded, reference, tiny, token_rows

pytestmark = pytest.mark.gpu
FIRST = [case for case in cases() if case[1] in ("causal_lm", "embedding", "masked_lm")]


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """TF32 would round the reference."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("model_type", "task"), FIRST)
def test_outputs(model_type: str, task: Task, precision: str) -> None:
    one = tiny(model_type, task)
    rows = token_rows(one.vocab_size)
    exact = reference(copy.deepcopy(one.model).cuda(), rows, task)
    half = reference(copy.deepcopy(one.model).cuda().to(DTYPES[precision]), rows, task).float()
    engine = Engine.from_pretrained(one.directory, precision=precision, device="cuda", task=task)
    floor = (1e-4 if precision == "fp32" else 4 * torch.finfo(DTYPES[precision]).eps) * float(exact.abs().max())
    limit = max(2 * float((half - exact).abs().max()), floor)
    for side in ("right", "left"):
        ours = flat(engine(padded(rows, side, one.pad)), rows, task, side)
        assert ours.device.type == "cuda"
        assert float((ours.float() - exact).abs().max()) <= limit


@pytest.mark.parametrize("model_type", [name for name, task in cases() if task == "causal_lm"])
def test_twenty_tokens_as_on_a_cpu(model_type: str) -> None:
    one = tiny(model_type, "causal_lm")
    rows = token_rows(one.vocab_size)
    options = {"max_new_tokens": 20, "ignore_eos": True, "logprobs": 2}
    found = [
        Engine.from_pretrained(
            one.directory, precision="fp32", device=device, inference={"max_tokens": 64, "page_size": 8}
        )
        for device in ("cpu", "cuda")
    ]
    cpu, gpu = (engine.generate(rows, do_sample=False, **options) for engine in found)
    assert [one.token_ids for one in cpu] == [one.token_ids for one in gpu]
    sampled = [engine.generate(rows, temperature=1.3, top_k=20, seed=4, **options) for engine in found]
    assert [one.token_ids for one in sampled[0]] == [one.token_ids for one in sampled[1]]
