"""Attention kernels of the ``generic`` set at the shapes of known models, each checked against fp32 PyTorch first.

python -m benchmarks.attention
python -m benchmarks.attention --only 'BERT' --sweep --json attention.json
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gemm_cases import DTYPES, graph, read_bandwidth, replays
from benchmarks.measure import machine
from ops import reference
from ops.generic.attention import Tile, decode_attention, sequence_attention
from ops.generic.attention_decode import choose_splits
from ops.triton_support import dependent_launch

MANUAL = """\
What is timed: launches captured in a CUDA graph, replayed; the median over the
rounds, in microseconds a call, the gaps between launches included.

  decode     one new token a sequence over the paged cache, pages scattered; the
             calls go round keys and values that together exceed L2, as the
             layers of a model do. "floor" is their bytes over the bandwidth
             that this GPU reads with, "%" how much of it is reached.
  sequence   whole sequences out of a fused QKV projection, as in an encoder,
             beside torch's scaled_dot_product_attention (SDPA).
  pdl        the same with programmatic dependent launch: each kernel starts
             while the one before it drains (Hopper and newer).
  error      largest difference from fp32 PyTorch, in epsilons of the dtype. More
             than the rounding of inputs and outputs explains ends the run.

  --sweep    tries every number of splits and every tile, and shows the fastest
             beside the choice that the ops make themselves. That compiles much:
             some minutes, so cut it with --only.
"""
PAGE = 16
#: Keys and values of one replay, so that none of them is still in L2.
REPLAY_BYTES = 160_000_000
MOST_CALLS = 256


class Decoder(NamedTuple):
    """The attention of a decoder, and the contexts to time."""

    name: str
    heads: int
    kv_heads: int
    size: int
    contexts: tuple[int, ...]


class Encoder(NamedTuple):
    """The attention of an encoder, and the tokens a sequence to time."""

    name: str
    heads: int
    size: int
    tokens: tuple[int, ...]


DECODERS = (
    Decoder("GPT-2", 12, 12, 64, (128, 1024)),
    Decoder("GPT-2 XL", 25, 25, 64, (128, 1024)),
    Decoder("Llama-2-7B", 32, 32, 128, (128, 1024, 4096)),
    Decoder("Llama-3.2-1B", 32, 8, 64, (128, 1024, 4096)),
)
ENCODERS = (Encoder("BERT-base", 12, 64, (128, 384)), Encoder("BERT-large", 16, 64, (128, 384)))
SPLITS = (1, 2, 4, 8, 16, 32)
TILES = (
    Tile(16, 64, 4, 3), Tile(16, 128, 4, 2), Tile(32, 64, 4, 3), Tile(32, 128, 4, 2), Tile(64, 32, 4, 3),
    Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2),
)  # fmt: skip
#: Columns that make room for those of a sweep.
ASIDE = ("floor", "%", "x SDPA", "error")
PLAIN: dict[str, Any] = {"window": None, "softcap": None, "slopes": None}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for, and what this GPU can."""

    dtype: torch.dtype
    batches: tuple[int, ...]
    rounds: int
    sweep: bool
    pdl: bool
    bandwidth: float


def error(ours: Tensor, exact: Tensor, keys: int) -> float:
    """Largest difference in epsilons of ``ours``'s dtype; ends the run if rounding does not explain it."""
    found = float((ours.float() - exact).abs().max()) / max(float(exact.abs().max()), 1.0)
    found /= torch.finfo(ours.dtype).eps
    if not found <= 2 + keys**0.5:
        raise SystemExit(f"wrong result: off by {found:.3g} epsilons")
    return found


def fastest(choices: Iterable[tuple[str, Callable[[], object]]], calls: int, rounds: int) -> tuple[str, float]:
    """Name and microseconds a call of the fastest; each choice makes ``calls`` calls. What the GPU has no room for is
    passed over."""
    times = {}
    for name, run in choices:
        try:
            times[name] = replays([graph(run)], calls, rounds)[0]
        except OutOfResources:
            continue
    return min(times.items(), key=lambda pair: pair[1])


class Decode:
    """Decode attention of one model at one batch and context: as many tables of scattered pages as one replay goes
    round."""

    def __init__(self, model: Decoder, batch: int, context: int, dtype: torch.dtype) -> None:
        _, heads, kv_heads, size, _ = model
        self.batch, self.tokens, self.scale = batch, context, size**-0.5
        self.bytes = 2 * batch * context * kv_heads * size * dtype.itemsize
        self.calls = min(max(math.ceil(REPLAY_BYTES / self.bytes), 2), MOST_CALLS)
        pages = -(-context // PAGE)
        shape = (self.calls * batch * pages, PAGE, kv_heads, size)
        self.keys, self.values = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
        order = torch.randperm(shape[0], device="cuda").to(torch.int32)
        self.tables = order.view(self.calls, batch, pages).contiguous()
        self.context = torch.full((batch,), context, device="cuda", dtype=torch.int32)
        self.queries = torch.randn(batch, heads, size, device="cuda", dtype=dtype)

    def run(self, table: Tensor, pdl: bool = False, splits: int | None = None) -> Tensor:
        """One call."""
        return decode_attention(
            self.queries, self.keys, self.values, table, self.context,
            scale=self.scale, longest=self.tokens, pdl=pdl, splits=splits, **PLAIN,
        )  # fmt: skip

    def all(self, pdl: bool = False, splits: int | None = None) -> Callable[[], object]:
        """One call for each table."""
        return lambda: [self.run(table, pdl, splits) for table in self.tables]

    def error(self) -> float:
        """See :func:`error`."""
        exact = []
        for query, table in zip(self.queries, self.tables[0].long(), strict=True):
            k, v = (pool[table].flatten(0, 1)[: self.tokens].float() for pool in (self.keys, self.values))
            exact.append(reference.attention(query[None].float(), k, v, scale=self.scale, causal=True).flatten())
        return error(self.run(self.tables[0]), torch.stack(exact), self.tokens)


def decode_row(model: Decoder, batch: int, context: int, how: Settings) -> dict[str, Any]:
    """Measures one shape of decode attention."""
    case = Decode(model, batch, context, how.dtype)
    found = case.error()
    plain, dependent = replays([graph(case.all(pdl)) for pdl in (False, how.pdl)], case.calls, how.rounds)
    floor = case.bytes / how.bandwidth * 1e6
    row: dict[str, Any] = {
        "model": model.name, "B": batch, "context": context,
        "splits": choose_splits(batch * model.kv_heads, context, None, case.queries.device),
        "us": plain, "pdl": dependent, "floor": floor, "%": 100 * floor / min(plain, dependent), "error": found,
    }  # fmt: skip
    if how.sweep:
        choices = ((str(splits), case.all(how.pdl, splits)) for splits in SPLITS if splits * 64 <= context)
        row["best"], row["its us"] = fastest(choices, case.calls, how.rounds)
    return row


class Sequence:
    """Attention of a batch of whole sequences of one length, and the same by SDPA."""

    #: Calls of one replay: what an encoder's attention reads was written just before, and lies in L2.
    calls = 24

    def __init__(self, model: Encoder, batch: int, tokens: int, dtype: torch.dtype) -> None:
        heads, size = model.heads, model.size
        self.tokens, self.scale = tokens, size**-0.5
        fused = torch.randn(batch * tokens, 3 * heads * size, device="cuda", dtype=dtype)
        self.q, self.k, self.v = (part.unflatten(1, (heads, size)) for part in fused.chunk(3, dim=1))
        self.padded = [part.unflatten(0, (batch, tokens)).transpose(1, 2) for part in (self.q, self.k, self.v)]
        self.starts = torch.arange(0, batch * tokens + 1, tokens, device="cuda", dtype=torch.int32)

    def run(self, pdl: bool = False, tile: Tile | None = None) -> Tensor:
        """One call."""
        return sequence_attention(
            self.q, self.k, self.v, self.starts,
            longest=self.tokens, causal=False, scale=self.scale, pdl=pdl, tile=tile, **PLAIN,
        )  # fmt: skip

    def all(self, pdl: bool = False, tile: Tile | None = None) -> Callable[[], object]:
        """As many calls as a replay makes."""
        return lambda: [self.run(pdl, tile) for _ in range(self.calls)]

    def sdpa(self) -> list[Tensor]:
        """As many of SDPA."""
        q, k, v = self.padded
        return [F.scaled_dot_product_attention(q, k, v, scale=self.scale) for _ in range(self.calls)]

    def error(self) -> float:
        """See :func:`error`."""
        pieces = zip(*(part.float().split(self.tokens) for part in (self.q, self.k, self.v)), strict=True)
        exact = [reference.attention(*piece, scale=self.scale, causal=False).flatten(1) for piece in pieces]
        return error(self.run(), torch.cat(exact), self.tokens)


def sequence_row(model: Encoder, batch: int, tokens: int, how: Settings) -> dict[str, Any]:
    """Measures one shape of attention within sequences."""
    case = Sequence(model, batch, tokens, how.dtype)
    found = case.error()
    graphs = [graph(run) for run in (case.all(), case.all(how.pdl), case.sdpa)]
    plain, dependent, peer = replays(graphs, case.calls, how.rounds)
    chosen = Tile.of(batch, model.heads, tokens, model.size, case.q)
    row: dict[str, Any] = {
        "model": model.name, "B": batch, "tokens": tokens, "tile": short(chosen), "us": plain, "pdl": dependent,
        "SDPA": peer, "x SDPA": peer / min(plain, dependent), "error": found,
    }  # fmt: skip
    if how.sweep:
        choices = ((short(tile), case.all(how.pdl, tile)) for tile in TILES)
        row["best"], row["its us"] = fastest(choices, case.calls, how.rounds)
    return row


def short(tile: Tile) -> str:
    """A tile in a few letters: queries, keys, warps, stages."""
    return f"{tile.queries}x{tile.keys}w{tile.warps}s{tile.stages}"


def measured(only: str, how: Settings) -> dict[str, list[dict[str, Any]]]:
    """The rows of both tables for the models whose name matches ``only``."""
    with torch.inference_mode():
        decode = [
            decode_row(model, batch, context, how)
            for model in DECODERS
            if re.search(only, model.name)
            for batch in how.batches
            for context in model.contexts
        ]
        sequence = [
            sequence_row(model, batch, tokens, how)
            for model in ENCODERS
            if re.search(only, model.name)
            for batch in how.batches
            for tokens in model.tokens
        ]
    return {"decode": decode, "sequence": sequence}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="Times the attention kernels of the generic set at the shapes of known models.",
        epilog=MANUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16", help="default: fp16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences a call (default: 1)")
    parser.add_argument("--only", default="", metavar="REGEX", help="models whose name matches, such as 'Llama|XL'")
    parser.add_argument("--rounds", type=int, default=20, help="replays to take the median of (default: 20)")
    parser.add_argument("--sweep", action="store_true", help="look for better splits and tiles, see below")
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here: these figures mean nothing without one")
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    how = Settings(
        DTYPES[options.dtype], tuple(options.batch), options.rounds, options.sweep, dependent_launch(device),
        read_bandwidth(),
    )  # fmt: skip
    where = f"{torch.cuda.get_device_name(device)}, {how.bandwidth / 1e12:.2f} TB/s, {options.dtype}"
    tables = measured(options.only, how)
    for title, rows in tables.items():
        if rows:
            print(f"\n{title} attention, {where}")
            shown = [{key: cell for key, cell in row.items() if not (how.sweep and key in ASIDE)} for row in rows]
            print(tabulate(shown, headers="keys", floatfmt=".4g"))
    if options.json is not None:
        rows = [{"op": title, **row} for title, table in tables.items() for row in table]
        document = {"title": "attention", "gpu": where, "machine": machine(), "rows": rows}
        aside = options.json.with_suffix(options.json.suffix + ".part")
        aside.write_text(json.dumps(document, indent=2))
        aside.replace(options.json)


if __name__ == "__main__":
    main()
