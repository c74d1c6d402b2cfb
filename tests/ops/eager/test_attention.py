"""Attention of the eager set against its definition in fp64: whole sequences, and over the paged cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.inference.kv_cache import PagedCache
from ops import reference
from ops.eager.attention import append, attend
from ops.plan import StepInputs
from ops.spec import ALiBiPositions, ModelSpec
from tests.ops.specs import assert_near, noise, spec

SLOPES = tuple(2.0**-i for i in range(1, 7))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no groups": {"kv_heads": 6},
    "one kv head": {"kv_heads": 1},
    "window": {"windows": (3, None)},
    "window of one": {"windows": (1, 1)},
    "soft cap": {"attention_softcap": 2.0},
    "alibi": {"positions": ALiBiPositions(SLOPES)},
    "fp32 scores": {"scores_in_fp32": True, "attention_scale": 1.0},
    "alibi and window": {"positions": ALiBiPositions(SLOPES), "windows": (4, 4)},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(one: ModelSpec, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = torch.tensor(one.positions.slopes).double() if isinstance(one.positions, ALiBiPositions) else None
    out = reference.attention(
        q.double(),
        k.double(),
        v.double(),
        scale=one.attention_scale,
        causal=one.causal,
        window=one.window(layer),
        softcap=one.attention_softcap,
        slopes=slopes,
    )
    return out.flatten(1)


def tensors(one: ModelSpec, tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q = noise(tokens, one.heads, one.head_dim, dtype=dtype, seed=seed)
    k = noise(tokens, one.kv_heads, one.head_dim, dtype=dtype, seed=seed + 1)
    return q, k, noise(tokens, one.kv_heads, one.head_dim, dtype=dtype, seed=seed + 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "causal"), [(k, c) for k in KINDS for c in (True, False) if c or "windows" not in KINDS[k]]
)
@pytest.mark.parametrize("lengths", [(5, 1, 9, 5), (4, 4), (1,)])
def test_within_sequences(dtype: torch.dtype, causal: bool, kind: str, lengths: tuple[int, ...]) -> None:
    one = spec(causal=causal, **KINDS[kind])
    q, k, v = tensors(one, sum(lengths), dtype)
    at = torch.arange(sum(lengths))
    ours = attend(one, 0, StepInputs(at, at, lengths), q, k, v)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    assert_near(ours, torch.cat([exact(one, 0, *piece) for piece in pieces]), dtype, 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scattered", [False, True])
def test_over_the_cache(dtype: torch.dtype, kind: str, scattered: bool) -> None:
    """Prefill in two chunks, then single tokens; pages in one run, or scattered so that they must be gathered."""
    one = spec(**KINDS[kind])
    cache = PagedCache(one, pages=16, page_size=4, device=torch.device("cpu"), dtype=dtype)
    if scattered:
        held = [cache.allocate(4) for _ in range(16)]
        for index in (1, 3, 4, 8, 9, 11, 14):
            cache.release(held[index])
    sequences = [cache.allocate(12), cache.allocate(15)]
    assert all((s.start is None) == scattered for s in sequences)
    totals = (12, 15)
    whole = [tensors(one, total, dtype, seed=10 * i) for i, total in enumerate(totals)]
    done = [0, 0]
    for new in ((5, 1), (4, 11), (1, 1), (1, 1), (1, 1)):
        pieces = [[x[at : at + n] for x in parts] for parts, at, n in zip(whole, done, new, strict=True)]
        q, k, v = (torch.cat(x) for x in zip(*pieces, strict=True))
        view = cache.view(sequences, new)
        at = torch.arange(sum(new))
        inputs = StepInputs(at, at, new, cache=view)
        append(view, 1, k, v)
        ours = attend(one, 1, inputs, q, k, v)
        done = [at + n for at, n in zip(done, new, strict=True)]
        expected = [
            exact(one, 1, parts[0][at - n : at], parts[1][:at], parts[2][:at])
            for parts, at, n in zip(whole, done, new, strict=True)
        ]
        assert_near(ours, torch.cat(expected), dtype, 15)


def test_what_lies_behind_a_sequence_is_never_read() -> None:
    one = spec()
    cache = PagedCache(one, pages=8, page_size=4, device=torch.device("cpu"), dtype=torch.float32)
    for pool in (*cache.keys, *cache.values):
        pool.fill_(torch.nan)
    sequences = [cache.allocate(6), cache.allocate(3)]
    q, k, v = tensors(one, 5, torch.float32)
    view = cache.view(sequences, (3, 2))
    append(view, 0, k, v)
    out = attend(one, 0, StepInputs(torch.arange(5), torch.arange(5), (3, 2), cache=view), q, k, v)
    assert bool(torch.isfinite(out).all())
