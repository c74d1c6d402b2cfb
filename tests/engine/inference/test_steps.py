"""Steps that run ahead on a device give what steps driven by the host give, here with a device that is the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine import Engine, build
from engine.errors import EngineError
from engine.inference import steps
from ops.collective import Collective
from ops.eager.kernel_set import EagerKernels
from ops.plan import Bucket, CacheView, DecodeState, StepInputs
from ops.spec import ModelSpec
from ops.weights import ModelWeights
from tests.engine.inference.test_generation import TEXT
from tests.engine.tiny import tiny, token_rows

ROWS = token_rows(160, (9, 1, 14, 3, 6), seed=8)
SIZES = {"max_batch": 5, "max_tokens": 64, "page_size": 8}


class AheadDecoder:
    """A decoder over static buffers that reads its lengths from them, as a device does."""

    def __init__(self, kernels: EagerKernels, spec: ModelSpec, weights: ModelWeights, state: DecodeState, own: bool):
        self.spec, self.weights, self.state, self.own = spec, weights, state, own
        self.eager = kernels
        self.steps: list[int] = []

    def logits(self, longest: int) -> Tensor:
        state, group = self.state, build.SingleProcess()
        lengths = tuple(int(at) + 1 for at in state.positions)
        assert max(lengths) <= longest
        size = state.keys[0].shape[1]
        pages = state.block_table.gather(1, (state.positions // size)[:, None]).squeeze(1)
        slots = pages.long() * size + state.positions % size
        context = torch.tensor(lengths, dtype=torch.int32)
        view = CacheView(state.keys, state.values, state.block_table, slots, context, lengths, (None,) * state.rows)
        plan = self.eager.plan(self.spec, self.weights, Bucket("decode"), group)
        inputs = StepInputs(state.tokens.clone(), state.positions.clone(), (1,) * state.rows, None, view)
        out = plan.run(inputs).outputs
        assert out is not None
        return out

    def greedy(self, out: Tensor) -> bool:
        if not self.own:
            return False
        for row in out:
            top, tokens = self.logits(64).max(1)
            row.copy_(torch.where(top.isfinite(), tokens, ~tokens))
            self.state.tokens.copy_(tokens)
            self.state.positions.add_(1)
        self.steps.append(out.shape[0])
        return True


class Ahead(EagerKernels):
    """The eager set with decoders; ``own`` says whether they choose greedily themselves."""

    own = True
    made: list[AheadDecoder]

    def decoder(
        self, spec: ModelSpec, weights: ModelWeights, state: DecodeState, collective: Collective
    ) -> AheadDecoder:
        made = AheadDecoder(self, spec, weights, state, self.own)
        self.made.append(made)
        return made


def engine() -> Engine:
    return Engine.from_pretrained(tiny("llama", "causal_lm").directory, precision="fp32", device="cpu", inference=SIZES)


@pytest.fixture(params=[True, False], ids=["decoder chooses", "sampler chooses"])
def pair(request: pytest.FixtureRequest) -> tuple[Engine, Engine, Ahead]:
    """An engine whose host drives, one whose device runs ahead, and the latter's kernels."""
    host, device = engine(), engine()
    kernels = Ahead()
    kernels.own, kernels.made = request.param, []
    device._runner().kernels = kernels
    return host, device, kernels


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "sampled": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 7},
    "penalty": {"repetition_penalty": 1.7},
    "logprobs": {"logprobs": 2},
    "sampled logprobs": {"temperature": 1.2, "seed": 3, "logprobs": 0},
    "minimum": {"min_new_tokens": 9, "eos_token_id": [5, 17]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_tokens(pair: tuple[Engine, Engine, Ahead], name: str) -> None:
    host, device, kernels = pair
    options = {"max_new_tokens": 21, "ignore_eos": "eos_token_id" not in OPTIONS[name], **OPTIONS[name]}
    for rows in (ROWS, ROWS[:1], ROWS[1:4]):
        ours, theirs = device.generate(rows, **options), host.generate(rows, **options)
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
        assert [one.finish_reason for one in ours] == [one.finish_reason for one in theirs]
        if "logprobs" in options:
            for a, b in zip(ours, theirs, strict=True):
                assert [p.logprob for p in a.logprobs] == pytest.approx([p.logprob for p in b.logprobs], abs=1e-4)
                assert [[t for t, _ in p.top] for p in a.logprobs] == [[t for t, _ in p.top] for p in b.logprobs]
    assert kernels.made


def test_rows_that_stop_leave_and_the_batch_shrinks(pair: tuple[Engine, Engine, Ahead]) -> None:
    """Every row ends at another token; the rest go on in smaller batches, as if nothing had happened."""
    host, device, kernels = pair
    free = host.generate(ROWS, max_new_tokens=40, ignore_eos=True)
    stops = [free[row].token_ids[3 + 6 * row] for row in range(4)]
    for extra in ({}, {"temperature": 1.4, "top_k": 0, "seed": 11}):
        options = {"max_new_tokens": 40, "eos_token_id": stops, **extra}
        ours, theirs = device.generate(ROWS, **options), host.generate(ROWS, **options)
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
        assert [one.finish_reason for one in ours] == [one.finish_reason for one in theirs]
    assert {made.state.rows for made in kernels.made} > {8}


def test_pages_come_back_and_the_scratch_page_serves_nobody(pair: tuple[Engine, Engine, Ahead]) -> None:
    _, device, _ = pair
    device.text = TEXT
    stream = device.generate(ROWS, max_new_tokens=30, ignore_eos=True, stream=True)
    for _ in range(7):
        next(stream)
    stream.close()
    cache = device._cache
    assert cache.free_pages == cache.scratch
    again = device.generate(ROWS[0], max_new_tokens=30, ignore_eos=True)
    assert len(again.token_ids) == 30


def test_logits_that_are_not_finite_name_the_row(pair: tuple[Engine, Engine, Ahead]) -> None:
    _, device, kernels = pair
    device.generate(ROWS[:2], max_new_tokens=3, ignore_eos=True)
    for made in kernels.made:
        original = made.logits

        def broken(longest: int, original: Any = original) -> Tensor:
            out = original(longest)
            out[1] = torch.nan
            return out

        made.logits = broken  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="prompt 1: the model's logits are not finite"):
        device.generate(ROWS[:2], max_new_tokens=5, ignore_eos=True)


def test_chunks_grow_with_speed_and_end_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(i * 1e-4 for i in range(1000))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    device = engine()
    kernels = Ahead()
    kernels.made = []
    device._runner().kernels = kernels
    assert len(device.generate(ROWS[0], max_new_tokens=40, ignore_eos=True).token_ids) == 40
    (made,) = kernels.made
    sizes = [size for size in made.steps if size]
    assert sum(sizes) == 39
    assert sizes[0] == steps.FIRST_CHUNK
    assert max(sizes) == steps.MOST_AHEAD
