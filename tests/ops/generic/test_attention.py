"""Attention of the ``generic`` set against its definition in fp64: whole sequences, chunks and single tokens over the
cache. What no sequence holds is NaN, and so is all memory before it is written."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.generic.attention import Tile, cached_attention, decode_attention, sequence_attention
from ops.generic.attention_decode import MAX_SPLITS, choose_splits
from tests.conftest import ROOT
from tests.ops.devices import DEVICES
from tests.ops.specs import assert_near, noise

HEADS = 4
PAGE = 4
SMALL = Tile(16, 16, 1, 1)
SLOPES = tuple(2.0**-i for i in range(3, 3 + HEADS))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN: dict[str, Any] = {"scale": 0.3, "window": None, "softcap": None, "slopes": None}
#: ``kv_heads`` and what differs from PLAIN.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (4, {}),
    "groups": (2, {}),
    "one kv head": (1, {}),
    "window": (2, {"window": 20}),
    "window of one": (4, {"window": 1}),
    "soft cap": (2, {"softcap": 2.0}),
    "alibi": (4, {"slopes": SLOPES}),
    "all together": (2, {"window": 20, "softcap": 2.0, "slopes": SLOPES}),
}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, so that what is read or returned unwritten shows."""
    allocate = torch.Tensor.new_empty

    def poisoned(*args: Any, **more: Any) -> Tensor:
        new = allocate(*args, **more)
        return new.fill_(math.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@dataclass
class Case:
    """Sequences of ``lengths`` tokens, all but the last ``new`` of which have no queries; the answers in fp64."""

    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    options: dict[str, Any]
    causal: bool

    @staticmethod
    def of(
        kv_heads: int, changes: dict[str, Any], dtype: torch.dtype, lengths: tuple[int, ...],
        new: tuple[int, ...] | None = None, *, size: int = 8, heads: int = HEADS, causal: bool = True,
    ) -> Case:  # fmt: skip
        """Random sequences."""
        queries = tuple(
            noise(n, heads, size, dtype=dtype, seed=3 * i) for i, n in enumerate(lengths if new is None else new)
        )
        keys, values = (
            tuple(noise(n, kv_heads, size, dtype=dtype, seed=3 * i + j) for i, n in enumerate(lengths)) for j in (1, 2)
        )
        options = {**PLAIN, **changes}
        if options["slopes"] is not None:
            options["slopes"] = torch.tensor(options["slopes"])
        return Case(queries, keys, values, options, causal)

    def exact(self) -> Tensor:
        """[T, heads * size] in fp64."""
        return torch.cat(
            [
                reference.attention(q.double(), k.double(), v.double(), causal=self.causal, **self.options).flatten(1)
                for q, k, v in zip(self.queries, self.keys, self.values, strict=True)
            ]
        )

    def arguments(self, device: str) -> dict[str, Any]:
        """The keyword arguments that the ops share."""
        slopes = self.options["slopes"]
        return {**self.options, "slopes": None if slopes is None else slopes.to(device)}

    def paged(self, device: str, page: int = PAGE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pools, block table and contexts. Pages are scattered; what no sequence holds is NaN. There lead the table's
        entries behind a sequence, and page zero is one of them, where a masked entry may lead a kernel."""
        pages = [-(-len(k) // page) for k in self.keys]
        order = 1 + torch.randperm(sum(pages) + 2, generator=torch.Generator().manual_seed(1)).to(torch.int32)
        table = order[-1].repeat(len(pages), max(pages) + 2)
        shape = (1 + len(order), page, *self.keys[0].shape[1:])
        pools = tuple(torch.full(shape, math.nan, dtype=self.keys[0].dtype) for _ in range(2))
        for row, (count, first) in enumerate(zip(pages, accumulate(pages, initial=0), strict=False)):
            table[row, :count] = order[first : first + count]
            at = torch.arange(len(self.keys[row]))
            for pool, new in zip(pools, (self.keys[row], self.values[row]), strict=True):
                pool[table[row, at // page].long(), at % page] = new
        context = torch.tensor([len(k) for k in self.keys], dtype=torch.int32)
        return pools[0].to(device), pools[1].to(device), table.to(device), context.to(device)

    def starts(self, device: str) -> Tensor:
        """Where each sequence's queries start."""
        counts = [len(q) for q in self.queries]
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    def within(self, device: str, **more: Any) -> Tensor:
        """By :func:`sequence_attention`, from views of a fused projection that ends in NaN."""
        q, k, v = (torch.cat(x) for x in (self.queries, self.keys, self.values))
        fused = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1), torch.full_like(q[:, 0], math.nan)], 1).to(device)
        widths = [q[0].numel(), k[0].numel(), v[0].numel(), q.shape[2]]
        parts = [x.unflatten(1, (-1, q.shape[2])) for x in fused.split(widths, 1)]
        arguments = {"longest": max(len(x) for x in self.queries), "causal": self.causal, **self.arguments(device)}
        return sequence_attention(*parts[:3], self.starts(device), **{**arguments, **more})

    def cached(self, device: str, page: int = PAGE, **more: Any) -> Tensor:
        """By :func:`cached_attention`."""
        arguments = {"longest_new": max(len(x) for x in self.queries), **self.arguments(device), "causal": self.causal}
        queries = torch.cat(self.queries).to(device)
        return cached_attention(queries, *self.paged(device, page), self.starts(device), **{**arguments, **more})

    def decoded(self, device: str, page: int = PAGE, **more: Any) -> Tensor:
        """By :func:`decode_attention`."""
        arguments = {"longest": max(len(x) for x in self.keys), **self.arguments(device)}
        return decode_attention(torch.cat(self.queries).to(device), *self.paged(device, page), **{**arguments, **more})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "splits"), [*((kind, 1) for kind in KINDS), ("plain", 2), ("window", 2), ("all together", 2)]
)
def test_decode(device: str, dtype: torch.dtype, kind: str, splits: int) -> None:
    """With a block of 64 keys: a sequence of one token, one of two blocks, and splits without a key."""
    case = Case.of(*KINDS[kind], dtype, (1, 70), (1, 1))
    assert_near(case.decoded(device, splits=splits), case.exact(), dtype, 70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 24, 152, 5])
@pytest.mark.parametrize("group", [1, 3])
def test_decode_with_heads_of_any_size(device: str, dtype: torch.dtype, size: int, group: int) -> None:
    case = Case.of(2, {}, dtype, (6, 1), (1, 1), size=size, heads=2 * group)
    assert_near(case.decoded(device, splits=group), case.exact(), dtype, size + 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "size"), [(1, 20, 8), (2, 5, 8), (1, 20, 152)])
def test_decode_with_large_groups(device: str, dtype: torch.dtype, kv_heads: int, group: int, size: int) -> None:
    """Groups that fill no power of two, and more heads than a program takes."""
    case = Case.of(kv_heads, {}, dtype, (66,), (1,), size=size, heads=kv_heads * group)
    for splits in (1, 2):
        assert_near(case.decoded(device, splits=splits), case.exact(), dtype, size + 66)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("page", [8, 256])
def test_pages_of_other_sizes(device: str, dtype: torch.dtype, page: int) -> None:
    case = Case.of(2, {}, dtype, (9, 70), (1, 1))
    assert_near(case.decoded(device, page), case.exact(), dtype, 70)
    assert_near(case.cached(device, page), case.exact(), dtype, 70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["groups", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loose_bound_changes_nothing_but_rounding(device: str, dtype: torch.dtype, kind: str) -> None:
    case = Case.of(*KINDS[kind], dtype, (5, 1, 70), (1, 1, 1))
    tight = case.decoded(device, longest=70)
    assert_near(case.decoded(device, longest=2000), tight.double(), dtype, 70)


def test_long_contexts_are_split_where_programs_are_few() -> None:
    cpu = torch.device("cpu")
    assert choose_splits(12, 512, None, cpu) == 1
    assert choose_splits(12, 1024, None, cpu) == 4
    assert choose_splits(12, 100_000, 512, cpu) == 1, "a window bounds the keys"
    assert choose_splits(32, 4096, None, cpu) == 8
    assert choose_splits(1, 10**6, None, cpu) == MAX_SPLITS
    assert choose_splits(1000, 10**6, None, cpu) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 3])
def test_a_context_of_zero_gives_zeros(device: str, dtype: torch.dtype, splits: int) -> None:
    case = Case.of(2, {}, dtype, (0, 7), (1, 1))
    ours = case.decoded(device, splits=splits)
    assert not bool(ours[0].any())
    assert_near(ours, case.exact(), dtype, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 2])
def test_a_context_beyond_the_table_reads_nothing_behind_it(device: str, splits: int) -> None:
    """The table's row ends with the sequence; the next row leads to NaN."""
    case = Case.of(2, {}, torch.float32, (8, 2), (1, 1))
    keys, values, table, context = case.paged(device)
    table = table[:, :2].contiguous()
    context[0] = 50
    queries = torch.cat(case.queries).to(device)
    ours = decode_attention(queries, keys, values, table, context, longest=50, splits=splits, **case.arguments(device))
    assert_near(ours, case.exact(), torch.float32, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_within_sequences(device: str, dtype: torch.dtype, kind: str, causal: bool) -> None:
    case = Case.of(*KINDS[kind], dtype, (1, 24), causal=causal)
    assert_near(case.within(device), case.exact(), dtype, 24)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_over_the_cache(device: str, dtype: torch.dtype, kind: str) -> None:
    """A chunk behind cached tokens, one token, and a sequence without any."""
    case = Case.of(*KINDS[kind], dtype, (37, 12, 3), (11, 1, 0))
    assert_near(case.cached(device), case.exact(), dtype, 37)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [{}, {"window": 20}, {"slopes": SLOPES[:2]}])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks(device: str, changes: dict[str, Any], causal: bool) -> None:
    """Small blocks, so that there are many: whole ones without masks, cut ones, and ones that are skipped."""
    for dtype in (torch.bfloat16,) if changes else (torch.float32, torch.bfloat16):
        case = Case.of(1, changes, dtype, (90, 9), (70, 9), heads=2, causal=causal)
        assert_near(case.cached(device, tile=SMALL), case.exact(), dtype, 90)
        case = Case.of(1, changes, dtype, (70, 16), heads=2, causal=causal)
        assert_near(case.within(device, tile=SMALL), case.exact(), dtype, 70)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 24, 152, 5])
def test_sequences_with_heads_of_any_size(device: str, dtype: torch.dtype, size: int) -> None:
    case = Case.of(2, {}, dtype, (6, 1), size=size)
    assert_near(case.within(device), case.exact(), dtype, size + 6)
    assert_near(case.cached(device), case.exact(), dtype, size + 6)


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """And fit the 227 KiB of shared memory that a block may have there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.ops.generic.compile_attention"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(shared) == 13
    assert max(shared) <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_large_launches(dtype: torch.dtype, size: int, causal: bool) -> None:
    """Enough to do for the largest blocks, whole blocks first; too much for the interpreter."""
    case = Case.of(4, {}, dtype, (1100, 1, 900, 64), size=size, heads=16, causal=causal)
    case.options["scale"] = size**-0.5
    exact = case.exact()
    assert_near(case.within("cuda"), exact, dtype, 1100)
    assert_near(case.cached("cuda", 16), exact, dtype, 1100)
    case.queries = tuple(q[-1:] for q in case.queries)
    assert_near(case.decoded("cuda", 16), case.exact(), dtype, 1100)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_decode_serves_while_contexts_grow(dtype: torch.dtype) -> None:
    longest = 1500
    case = Case.of(2, {}, dtype, (longest, longest), (1, 1), size=64)
    keys, values, table, context = case.paged("cuda", 16)
    queries, arguments = torch.cat(case.queries).cuda(), {**case.arguments("cuda"), "longest": longest}
    decode_attention(queries, keys, values, table, context, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(queries, keys, values, table, context, **arguments)
    for lengths in ((1, 63), (64, 700), (1024, 1499), (1500, 0)):
        context.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        grown = Case(
            case.queries,
            tuple(k[:n] for k, n in zip(case.keys, lengths, strict=True)),
            tuple(v[:n] for v, n in zip(case.values, lengths, strict=True)),
            case.options,
            case.causal,
        )
        assert_near(out, grown.exact(), dtype, longest)


@pytest.mark.parametrize("device", DEVICES)
def test_dependent_launch_changes_nothing(device: str) -> None:
    case = Case.of(2, {}, torch.float16, (20, 9))
    assert torch.equal(case.within(device, pdl=True), case.within(device))
    case = Case.of(2, {}, torch.float16, (70, 9), (1, 1))
    for splits in (1, 2):
        assert torch.equal(case.decoded(device, pdl=True, splits=splits), case.decoded(device, splits=splits))


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str) -> None:
    queries, keys = torch.empty(0, 4, 8, device=device), torch.empty(0, 2, 8, device=device)
    starts = torch.zeros(1, dtype=torch.int32, device=device)
    pool, table = torch.empty(1, 4, 2, 8, device=device), torch.empty(0, 3, dtype=torch.int32, device=device)
    context = torch.empty(0, dtype=torch.int32, device=device)
    outs = [
        sequence_attention(queries, keys, keys, starts, longest=0, causal=True, **PLAIN),
        cached_attention(queries, pool, pool, table, context, starts, longest_new=0, **PLAIN),
        decode_attention(queries, pool, pool, table, context, longest=0, **PLAIN),
    ]
    assert [out.shape for out in outs] == [(0, 32)] * 3


@pytest.mark.parametrize("device", DEVICES)
def test_nan_in_a_sequence_is_not_hidden(device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        case = Case.of(2, {}, dtype, (6, 3), (1, 1))
        case.keys[0][2] = math.nan
        ours = case.decoded(device)
        assert bool(ours[0].isnan().all())
        assert bool(ours[1].isfinite().all())


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_kernel_would_misread_is_refused(device: str) -> None:
    q, k = noise(5, 4, 8, device=device), noise(5, 2, 8, device=device)
    starts = torch.tensor([0, 5], dtype=torch.int32, device=device)

    def refused(message: str, *tensors: Tensor, **changes: Any) -> None:
        with pytest.raises(KernelError, match=message):
            sequence_attention(*tensors, **{"longest": 5, "causal": True, **PLAIN, **changes})

    refused("keys are torch.float16", q, k.half(), k, starts)
    refused("fp32, bf16 or fp16", q.double(), k.double(), k.double(), starts)
    refused("wider than 256", q.repeat(1, 1, 33), k.repeat(1, 1, 33), k.repeat(1, 1, 33), starts)
    refused("have shape", q, k[:4], k[:4], starts)
    refused("have shape", q, k.repeat(1, 2, 1)[:, :3], k, starts)
    refused("have shape", q, k, k[..., :4], starts)
    refused("end to end", q.transpose(0, 1).contiguous().transpose(0, 1), k, k, starts)
    refused("end to end", q, k, k.repeat(1, 1, 2)[..., ::2], starts)
    refused("int32", q, k, k, starts.long())
    refused("5 tokens in 0 sequences", q, k, k, starts[:1])
    refused("a window of 0", q, k, k, starts, window=0)
    refused("slopes", q, k, k, starts, slopes=noise(3, device=device))
    refused("slopes", q, k, k, starts, slopes=noise(4, device=device, dtype=torch.float16))


@pytest.mark.parametrize("device", DEVICES)
def test_pools_that_a_kernel_would_misread_are_refused(device: str) -> None:
    q, pool = noise(2, 4, 8, device=device), noise(3, 4, 2, 8, device=device)
    table, context = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((2, 3), (2,)))

    def refused(message: str, *tensors: Tensor) -> None:
        with pytest.raises(KernelError, match=message):
            decode_attention(*tensors, longest=5, **PLAIN)
        starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
        with pytest.raises(KernelError, match=message):
            cached_attention(*tensors, starts, longest_new=1, **PLAIN)

    refused("call .contiguous", q, pool.transpose(0, 1), pool, table, context)
    refused("value_pool has shape", q, pool, pool[:2], table, context)
    refused("key_pool are torch.float16", q, pool.half(), pool, table, context)
    refused("block_table has shape", q, pool, pool, table[:1], context)
    refused("block_table has shape", q, pool, pool, table.flatten(), context)
    refused("block_table is", q, pool, pool, table[:, ::2], context)
    refused("context is", q, pool, pool, table, context.long())
    refused("end to end", q.repeat(1, 2, 1)[:, ::2], pool, pool, table, context)
