"""The launches of one bucket of an encoder, over buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ops.costs import region
from ops.generic.attention import sequence_attention
from ops.generic.encoder_graph import Place, StepBuffers
from ops.generic.launch import power_of_two
from ops.spec import ALiBiPositions, LearnedPositions, ModelSpec
from ops.specialized.addresses import linear_parts
from ops.specialized.encoder_rows import Tables, embed_sequences, norm_rows
from ops.specialized.tile_gemm import FoldedNorm, RowNorm, Statistics, Workspace, fold, tile_gemm
from ops.specialized.tile_table import Tile
from ops.triton_support import dependent_launch
from ops.weights import Embeddings, Linear, ModelWeights, Norm, model_parameters

#: No tile has fewer columns.
NARROWEST = 16
#: Where norms are computed. ``fused``: in the products that read them, as they read. ``folded``: there too, their
#: weights multiplied into copies of the products' weights, which leaves only mean and deviation for the end.
#: ``separate``: in launches of their own.
Norms = Literal["fused", "folded", "separate"]
#: Chooses the tile for [m, k] times [n, k] transposed: (m, n, k, dtype).
TileChoice = Callable[[int, int, int, torch.dtype], Tile]
Folded = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Room:
    """The buffers that all the buckets of a model share, and what is derived from its weights once.

    streams:    raw sums behind the attention's half of a layer and behind the other [tokens + 1, hidden]. The row in
                excess is where the starts of sequences that are not there point.
    statistics: of each of the two, flat fp32.
    folded:     by the id of a :class:`Linear`, what :func:`fold` made of it.
    """

    streams: tuple[Tensor, Tensor]
    statistics: tuple[Tensor, Tensor]
    normed: Tensor
    hidden: Tensor
    qkv: Tensor
    up: Tensor
    workspace: Workspace
    slopes: Tensor | None
    folded: dict[int, Folded]

    @classmethod
    def of(cls, spec: ModelSpec, weights: ModelWeights, tokens: int, norms: Norms, tiles: TileChoice) -> Room:
        """Buffers for steps of up to ``tokens`` tokens."""
        like = weights.embed.table
        device = like.device

        def rows(n: int) -> Tensor:
            return torch.zeros(tokens + 1, n, dtype=like.dtype, device=device)

        def partials() -> Tensor:
            return torch.zeros(2 * tokens * -(-spec.hidden // NARROWEST), dtype=torch.float32, device=device)

        slopes = spec.positions.slopes if isinstance(spec.positions, ALiBiPositions) else None
        return cls(
            streams=(rows(spec.hidden), rows(spec.hidden)),
            statistics=(partials(), partials()),
            normed=rows(spec.hidden),
            hidden=rows(spec.hidden),
            qkv=rows(spec.q_size + 2 * spec.kv_size),
            up=rows(spec.ffn),
            workspace=_workspace(spec, tokens, tiles, like),
            slopes=None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device),
            folded=_folded(spec, weights) if norms == "folded" else {},
        )


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """[N, K] of a layer's products."""
    return {
        "qkv": (spec.q_size + 2 * spec.kv_size, spec.hidden),
        "out": (spec.hidden, spec.q_size),
        "up": (spec.ffn, spec.hidden),
        "down": (spec.hidden, spec.ffn),
    }


def _workspace(spec: ModelSpec, tokens: int, tiles: TileChoice, like: Tensor) -> Workspace:
    """Room for the largest split of any bucket."""
    partials, counters = 0, 0
    for rows in range(NARROWEST, tokens + 1, NARROWEST):
        for n, k in _shapes(spec).values():
            tile = tiles(rows, n, k, like.dtype)
            if tile.split > 1:
                blocks = tile.blocks(rows, n)
                partials = max(partials, blocks * tile.rows * tile.columns)
                counters = max(counters, blocks // tile.split)
    return Workspace(
        torch.empty(partials, dtype=torch.float32, device=like.device),
        torch.zeros(counters, dtype=torch.int32, device=like.device),
    )


def _folded(spec: ModelSpec, weights: ModelWeights) -> dict[int, Folded]:
    """The products that read a norm, with the norm folded in."""
    found = {}
    for index, layer in enumerate(weights.layers):
        before, between = _pending(spec, weights, index)
        for linear, norm in ((layer.qkv, before), (layer.up, between)):
            if norm is not None:
                assert isinstance(linear.weight, Tensor)
                found[id(linear)] = fold(linear.weight, linear.bias, norm.weight, norm.bias)
    return found


def _pending(spec: ModelSpec, weights: ModelWeights, index: int) -> tuple[Norm | None, Norm | None]:
    """The norms that stand before the two halves of a layer, or behind the halves in front of them (post-norm)."""
    layer = weights.layers[index]
    if spec.placement == "pre":
        return layer.attn_norm, layer.ffn_norm
    return (weights.layers[index - 1].ffn_norm if index else weights.embed.norm), layer.attn_norm


def embed_step(
    spec: ModelSpec,
    embed: Embeddings,
    buffers: StepBuffers,
    place: Place,
    *,
    out: Tensor,
    statistics: Statistics,
    pdl: bool = False,
) -> None:
    """The sums of embeddings of a step's rows into ``out`` [rows, hidden], with their ``statistics``."""
    learned = spec.positions if isinstance(spec.positions, LearnedPositions) else None
    tables = Tables(
        embed.table,
        embed.position if learned is not None else None,
        learned.offset if learned is not None else 0,
        embed.token_type,
        spec.embedding_scale,
    )
    embed_sequences(
        buffers.ids[: place.rows],
        buffers.types[: place.rows] if place.typed and embed.token_type is not None else None,
        buffers.starts[: power_of_two(place.sequences + 1)],
        tables,
        out=out,
        statistics=statistics,
        wrong=buffers.wrong,
        pdl=pdl,
    )


@dataclass(frozen=True)
class _Stream:
    """The residual stream: a raw sum, its statistics if they are known, and the norm that its consumer applies; or that
    norm's value, where it had a launch of its own."""

    raw: Tensor
    statistics: Statistics | None
    pending: Norm | None
    normed: Tensor | None = None


class Forward:
    """The launches for one :class:`Place`: enqueues them when called, so that a graph can capture them."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        buffers: StepBuffers,
        room: Room,
        place: Place,
        norms: Norms,
        tiles: TileChoice,
    ) -> None:
        self.spec, self.weights, self.buffers, self.room, self.place = spec, weights, buffers, room, place
        self.norms, self.tiles = norms, tiles
        self._parameters = model_parameters(spec, weights)
        self._pdl = dependent_launch(buffers.ids.device)

    def __call__(self) -> Tensor:
        """The hidden states behind the last norm [rows, hidden], in a buffer that the next call overwrites."""
        spec, room, part = self.spec, self.room, self._part
        with part("embed"):
            stream = self._embed()
        for index, layer in enumerate(self.weights.layers):
            between = _pending(spec, self.weights, index)[1]
            last = index + 1 == spec.layers
            behind = self._last_norm() if last else _pending(spec, self.weights, index + 1)[0]
            with part(f"layers.{index}.qkv"):
                qkv = self._product(stream, layer.qkv, room.qkv)
            with part(f"layers.{index}.attend"):
                attended = self._attend(index, qkv)
            with part(f"layers.{index}.attention_out"):
                stream = self._add(attended, layer.out, stream, 0, between)
            with part(f"layers.{index}.ffn_up"):
                up = self._product(stream, layer.up, room.up, activate=True)
            with part(f"layers.{index}.ffn_down"):
                stream = self._add(up, layer.down, stream, 1, behind, last)
        with part("final"):
            return self._final(stream)

    def _part(self, name: str) -> AbstractContextManager[None]:
        """A part of the model, as the walk names it."""
        return region(name, name.rpartition(".")[2], self._parameters[name])

    def first_rows(self) -> Tensor:
        """The first row of each sequence behind the last norm; of sequences that are not there, rows of no meaning."""
        hidden = self.room.streams[1] if self._last_norm() is None else self.room.hidden
        return hidden.index_select(0, self.buffers.starts[: self.place.sequences])

    def _last_norm(self) -> Norm | None:
        return self.weights.final_norm if self.spec.placement == "pre" else self.weights.layers[-1].ffn_norm

    def _embed(self) -> _Stream:
        spec, pending = self.spec, _pending(self.spec, self.weights, 0)[0]
        # As wide as those that later layers leave, so that one compiled kernel reads both.
        statistics = self._statistics(1, self._tile(spec.hidden, spec.ffn).columns)
        out = self.room.streams[1][: self.place.rows]
        embed_step(spec, self.weights.embed, self.buffers, self.place, out=out, statistics=statistics, pdl=self._pdl)
        return self._left(_Stream(out, statistics, pending))

    def _attend(self, index: int, qkv: Tensor) -> Tensor:
        spec = self.spec
        heads = qkv.view(-1, spec.heads + 2 * spec.kv_heads, spec.head_dim)
        queries, keys, values = heads.split((spec.heads, spec.kv_heads, spec.kv_heads), dim=1)
        return sequence_attention(
            queries,
            keys,
            values,
            self.buffers.starts[: self.place.sequences + 1],
            longest=self.place.longest,
            causal=spec.causal,
            scale=spec.attention_scale,
            window=spec.window(index),
            softcap=spec.attention_softcap,
            slopes=self.room.slopes,
            pdl=self._pdl,
        )

    def _product(self, stream: _Stream, linear: Linear, room: Tensor, *, activate: bool = False) -> Tensor:
        """``norm(stream) W^T + b``, activated if asked."""
        weight, bias = linear_parts(linear)
        out = room[: self.place.rows]
        x, norm = stream.raw, self._row_norm(stream)
        folded: FoldedNorm | None = None
        if stream.normed is not None:
            x = stream.normed
        elif norm is not None and id(linear) in self.room.folded:
            weight, bias, sums = self.room.folded[id(linear)]
            folded = FoldedNorm(norm.kind, norm.eps, sums, norm.statistics)
        return tile_gemm(
            x,
            weight,
            bias,
            norm=folded or norm,
            activation=self.spec.activation if activate else None,
            tile=self._tile(*weight.shape),
            workspace=self.room.workspace,
            out=out,
            pdl=self._pdl,
        )

    def _add(
        self, x: Tensor, linear: Linear, stream: _Stream, which: int, pending: Norm | None, last: bool = False
    ) -> _Stream:
        """The residual plus ``x W^T + b``: a new stream in buffer ``which``. The last one's norm reads whole rows."""
        weight, bias = linear_parts(linear)
        post = self.spec.placement == "post"
        tile = self._tile(*weight.shape)
        statistics = None
        if pending is not None and not last and self.norms != "separate":
            statistics = self._statistics(which, tile.columns)
        out = self.room.streams[which][: self.place.rows]
        tile_gemm(
            x,
            weight,
            bias,
            residual=stream.normed if post and stream.normed is not None else stream.raw,
            residual_norm=self._row_norm(stream) if post else None,
            statistics=statistics,
            tile=tile,
            workspace=self.room.workspace,
            out=out,
            pdl=self._pdl,
        )
        found = _Stream(out, statistics, pending)
        return found if last else self._left(found)

    def _left(self, stream: _Stream) -> _Stream:
        """The stream as its producer leaves it: with its norm computed, if norms are launches of their own."""
        if self.norms != "separate" or stream.pending is None:
            return stream
        normed = self.room.normed[: self.place.rows]
        self._norm(stream, normed)
        return _Stream(stream.raw, None, stream.pending, normed)

    def _norm(self, stream: _Stream, out: Tensor) -> None:
        norm = stream.pending
        assert norm is not None
        norm_rows(stream.raw, norm.weight, norm.bias, self.spec.norm, self.spec.norm_eps, out=out, pdl=self._pdl)

    def _final(self, stream: _Stream) -> Tensor:
        if stream.pending is None or stream.normed is not None:
            return stream.raw if stream.normed is None else stream.normed
        hidden = self.room.hidden[: self.place.rows]
        self._norm(stream, hidden)
        return hidden

    def _row_norm(self, stream: _Stream) -> RowNorm | None:
        """The pending norm where it is still to be computed."""
        norm = stream.pending
        if norm is None or stream.normed is not None:
            return None
        assert stream.statistics is not None
        return RowNorm(self.spec.norm, self.spec.norm_eps, norm.weight, norm.bias, stream.statistics)

    def _tile(self, n: int, k: int) -> Tile:
        return self.tiles(self.place.rows, n, k, self.room.qkv.dtype)

    def _statistics(self, which: int, width: int) -> Statistics:
        rows, parts = self.place.rows, -(-self.spec.hidden // width)
        return Statistics(self.room.statistics[which][: 2 * rows * parts].view(2, rows, parts), width)
