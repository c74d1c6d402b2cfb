"""The launch between the fused projection and attention, against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.generic.qkv import HeadNorm, Rotary, split_qkv
from ops.spec import RotaryPositions
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS, KV_HEADS = 6, 2
PAGES, PAGE = 5, 4


def rotary_of(dim: int, interleaved: bool) -> RotaryPositions:
    return RotaryPositions(dim, tuple(100.0 ** (-2 * i / dim) for i in range(dim // 2)), 1.2, interleaved)


#: head size, rotated elements, interleaved pairs, bias, norm of heads
CASES: dict[str, tuple[int, int, bool, bool, str | None]] = {
    "plain": (8, 0, False, False, None),
    "bias": (8, 0, False, True, None),
    "rotary": (8, 8, False, True, None),
    "pairs": (8, 8, True, False, None),
    "part": (12, 6, False, True, None),
    "part in pairs": (5, 2, True, True, None),
    "norm": (8, 0, False, False, "rmsnorm"),
    "norm and rotary": (12, 12, False, True, "rmsnorm"),
    "layernorm and pairs": (10, 6, True, True, "layernorm"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 0])
@pytest.mark.parametrize("cached", [False, True])
def test_split(device: str, dtype: torch.dtype, case: str, tokens: int, cached: bool) -> None:
    size, dim, interleaved, biased, kind = CASES[case]
    width = (HEADS + 2 * KV_HEADS) * size
    fused = noise(tokens, width, dtype=dtype) * 2
    positions = torch.arange(tokens) * 3 + 2
    bias = noise(width, dtype=dtype, seed=1) if biased else None
    weights = (noise(size, dtype=dtype, seed=2) + 1, noise(size, dtype=dtype, seed=3) + 1)
    turns = rotary_of(dim, interleaved) if dim else None
    exact = reference.split_qkv(
        fused.double(), positions, HEADS, KV_HEADS, None if bias is None else bias.double(),
        (weights[0].double(), weights[1].double()) if kind else None, kind or "rmsnorm", 1e-5, turns,
    )  # fmt: skip
    options: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": size}
    if bias is not None:
        options["bias"] = bias.to(device)
    if kind:
        options["head_norm"] = HeadNorm(weights[0].to(device), weights[1].to(device), kind, 1e-5)  # type: ignore[arg-type]
    if turns is not None:
        options["rotary"] = Rotary(torch.tensor(turns.inv_freq).to(device), turns.factor, interleaved)
    if not cached:
        found = split_qkv(fused.to(device), positions.to(device), **options)
        for ours, wanted in zip(found, exact, strict=True):
            assert ours is not None
            assert ours.dtype == dtype
            assert ours.is_contiguous()
            assert_near(ours, wanted, dtype, size)
        return
    slots = torch.tensor([7, 2, 16, 0, 11])[:tokens]
    pools = tuple(torch.full((PAGES, PAGE, KV_HEADS, size), torch.nan, dtype=dtype, device=device) for _ in range(2))
    options |= {"pools": pools, "slots": slots.to(device)}
    queries, keys, values = split_qkv(fused.to(device), positions.to(device), **options)
    assert keys is None
    assert values is None
    assert_near(queries, exact[0], dtype, size)
    written = torch.zeros(PAGES * PAGE, dtype=torch.bool)
    written[slots] = True
    for pool, wanted in zip(pools, exact[1:], strict=True):
        flat = pool.cpu().flatten(0, 1)
        assert_near(flat[slots], wanted, dtype, size)
        assert bool(flat[~written].isnan().all()), "a slot that is not the step's was written"
    kept = split_qkv(fused.to(device), positions.to(device), keep=True, **options)[1:]
    for ours, pool in zip(kept, pools, strict=True):
        assert ours is not None
        assert torch.equal(ours.cpu(), pool.cpu().flatten(0, 1)[slots])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("size", "tokens"), [(152, 1), (128, 40), (64, 33)])
def test_sizes_that_take_other_blocks(device: str, size: int, tokens: int) -> None:
    """Heads that fill no block (Turing-NLG's 152), and enough tokens for the larger blocks."""
    heads, kv_heads = 13, 1
    fused = noise(tokens, (heads + 2 * kv_heads) * size)
    positions = torch.arange(tokens) * 100
    turns = rotary_of(64, False)
    found = split_qkv(
        fused.to(device), positions.to(device), heads=heads, kv_heads=kv_heads, head_dim=size,
        rotary=Rotary(torch.tensor(turns.inv_freq).to(device), turns.factor),
    )  # fmt: skip
    # The angle is rounded to fp32, as Hugging Face's is: at position p by up to p roundings
    exact = reference.split_qkv(fused.double(), positions, heads, kv_heads, turns=turns)
    for ours, wanted in zip(found, exact, strict=True):
        assert ours is not None
        assert_near(ours, wanted, torch.float32, 4000**2)


@pytest.mark.parametrize("device", DEVICES)
def test_cosines_are_rounded_like_a_table_of_them(device: str) -> None:
    """In half precision the eager set multiplies by rounded cosines; what trained so must run so."""
    turns = rotary_of(8, False)
    positions = torch.arange(200) * 5
    ones = torch.ones(len(positions), 3 * 8, dtype=torch.float16)
    queries, _, _ = split_qkv(
        ones.to(device), positions.to(device), heads=1, kv_heads=1, head_dim=8,
        rotary=Rotary(torch.tensor(turns.inv_freq).to(device), turns.factor),
    )  # fmt: skip
    angle = positions.float()[:, None] * torch.tensor(turns.inv_freq)
    plain = [f(angle) * turns.factor for f in (torch.cos, torch.sin)]

    def same(cos: Tensor, sin: Tensor) -> float:
        """The share of elements that these cosines and sines explain to the last bit."""
        return float((queries[:, 0].cpu() == torch.cat((cos - sin, cos + sin), dim=-1).half()).double().mean())

    assert same(*(x.half().float() for x in plain)) > 0.98
    assert same(*plain) < 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_beyond_two_to_the_31_elements(device: str) -> None:
    """Offsets into the pool are int64. On the CPU only the arithmetic is seen: the pool's pages are never touched."""
    pages, page, size = 2**31 // (4 * 2 * 8) + 1, 4, 8
    try:
        pools = tuple(torch.empty(pages, page, KV_HEADS, size, dtype=torch.float16, device=device) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"no room for such pools: {str(error).splitlines()[0]}")
    slot = pages * page - 1
    fused = noise(1, (HEADS + 2 * KV_HEADS) * size, dtype=torch.float16)
    at = torch.tensor([slot]).to(device)
    split_qkv(fused.to(device), at, heads=HEADS, kv_heads=KV_HEADS, head_dim=size, pools=pools, slots=at)  # type: ignore[arg-type]
    keys = fused[0, HEADS * size : (HEADS + KV_HEADS) * size].view(KV_HEADS, size)
    assert torch.equal(pools[0][-1, -1].cpu(), keys)


def _refused(message: str, fused: Tensor, **changes: Any) -> None:
    device = fused.device
    options: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": 8}
    positions = changes.pop("positions", torch.arange(4, device=device))
    with pytest.raises(KernelError, match=f"split_qkv: {message}"):
        split_qkv(fused, positions, **(options | changes))


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused(device: str) -> None:
    width = (HEADS + 2 * KV_HEADS) * 8
    fused = noise(4, width, device=device)
    pools = tuple(noise(PAGES, PAGE, KV_HEADS, 8, device=device) for _ in range(2))
    slots = torch.arange(4, device=device)
    _refused(r"x has strides \(1, 4\)", noise(width, 4, device=device).t())
    _refused(r"x has shape \[4, 80\], wanted \[4, 88\]", fused, heads=7)
    _refused(r"bias has shape \[8\], wanted \[80\]", fused, bias=noise(8, device=device))
    _refused(r"positions is torch\.int32", fused, positions=torch.arange(4, dtype=torch.int32, device=device))
    _refused(r"positions has shape \[3\], wanted \[4\]", fused, positions=torch.arange(3, device=device))
    _refused("pools and slots go together", fused, slots=slots)
    _refused(r"key_pool is torch\.float16", fused, slots=slots, pools=(pools[0].half(), pools[1]))
    _refused("value_pool has strides", fused, slots=slots, pools=(pools[0], pools[1].transpose(0, 1)))
    _refused(r"value_pool has shape \[5, 4, 1, 8\]", fused, slots=slots, pools=(pools[0], pools[1][:, :, :1].clone()))
    _refused(r"slots is torch\.int32", fused, slots=slots.int(), pools=pools)
    _refused("inv_freq turns 10 elements, a head has 8", fused, rotary=Rotary(noise(5, device=device)))
    _refused("inv_freq is torch.float64", fused, rotary=Rotary(noise(4, device=device).double()))
    head_norm = HeadNorm(noise(8, device=device), noise(9, device=device), "rmsnorm", 1e-5)
    _refused(r"key_norm has shape \[9\], wanted \[8\]", fused, head_norm=head_norm)
