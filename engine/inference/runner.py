"""Runs the steps of one packed model: lays sequences end to end, keeps their caches, and hands the steps to the
kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.inference.decode_step import DecodeStep
from engine.inference.inputs import Flat
from engine.inference.kv_cache import PagedCache, Sequence
from ops.collective import Collective
from ops.costs import region
from ops.errors import IdError
from ops.plan import Bucket, Decoder, DecodeState, KernelSet, StepInputs, StepPlan, StepResult
from ops.spec import ModelSpec
from ops.weights import ModelWeights

T = TypeVar("T")


class Runner:
    """One model on one device, behind its kernel set's plans."""

    def __init__(
        self, spec: ModelSpec, weights: ModelWeights, kernels: KernelSet, device: torch.device, group: Collective
    ) -> None:
        self.spec, self.weights, self.kernels, self.device, self.group = spec, weights, kernels, device, group
        self._plans: dict[str, StepPlan] = {}
        self._decode_steps: dict[tuple[int, int], DecodeStep] = {}
        self._places = torch.empty(0, dtype=torch.int64)

    @contextmanager
    def _region(self, kind: str) -> Iterator[None]:
        """Where a profiler finds the model's steps: whole sequences, prompts and single tokens apart."""
        head = self.spec.head
        with (
            region(self.spec.family, "embedding" if head is None else head.task),
            region(kind, kind) if kind != "encode" else nullcontext(),
        ):
            yield

    def _plan(self, bucket: Bucket) -> StepPlan:
        if bucket.kind not in self._plans:
            self._plans[bucket.kind] = self.kernels.plan(self.spec, self.weights, bucket, self.group)
        return self._plans[bucket.kind]

    def whole(
        self, rows: Seq[Seq[int]], token_types: Seq[Seq[int]] | None = None, wanted: Seq[int] | None = None
    ) -> StepResult:
        """Whole sequences at once, no cache: an encoder's forward, or every logit of a decoder. Rows must not be empty.

        ``wanted`` are the tokens, counted over the rows end to end, whose outputs are asked for (None: all).
        """
        self.check_ids(rows)
        self._check_types(token_types or ())
        lengths = tuple(len(row) for row in rows)
        positions = [at for length in lengths for at in range(length)]
        types = None if token_types is None else self._tensor([t for row in token_types for t in row])
        ends = None if wanted is None else self._tensor(list(wanted))
        tokens = self._tensor([t for row in rows for t in row])
        inputs = StepInputs(tokens, self._tensor(positions), lengths, types, rows=ends)
        with self._region("encode"):
            return self._plan(Bucket("encode")).run(inputs)

    def flat(self, batch: Flat, build: Callable[[StepResult], T]) -> T:
        """What ``build`` makes of the result of :meth:`whole`, for ids that lie on the device: nothing of them comes to
        the host unless one is wrong.

        A plan that guards its tables checks them as it runs, and ``build`` works while the device does; for others, the
        device is asked before.
        """
        if not 0 < min(batch.lengths) <= max(batch.lengths) <= self.spec.max_positions:
            self.check_ids(batch.rows().ids)
        plan = self._plan(Bucket("encode"))
        built: list[T] = []
        inputs = StepInputs(
            batch.ids,
            self._positions(batch.lengths),
            batch.lengths,
            batch.types,
            checked=False,
            meanwhile=lambda result: built.append(build(result)),
        )
        if not plan.guards(inputs):
            if not self._inside(batch.ids, self.spec.vocab_size) or not self._inside(
                batch.types, self.spec.token_types
            ):
                self._refuse(batch)
            inputs = replace(inputs, checked=True)
        try:
            with self._region("encode"):
                result = plan.run(inputs)
        except IdError:
            self._refuse(batch)
            raise
        return built[0] if built else build(result)

    @staticmethod
    def _inside(ids: Tensor | None, count: int) -> bool:
        """Whether all lie in a table of ``count`` rows; waits for the device."""
        if ids is None:
            return True
        low, high = torch.stack(torch.aminmax(ids)).tolist()
        return bool(0 <= low <= high < count)

    def _refuse(self, batch: Flat) -> None:
        """Raises with the sequence and the id that is wrong."""
        rows = batch.rows()
        self.check_ids(rows.ids)
        self._check_types(rows.types or ())

    def _positions(self, lengths: Seq[int]) -> Tensor:
        """[T] int64 on the device: 0, 1, ... for each sequence; pieces of one tensor that is kept."""
        if self._places.numel() < max(lengths):
            self._places = torch.arange(max(lengths), device=self.weights.embed.token.device)
        return self._places[: lengths[0]] if len(lengths) == 1 else torch.cat([self._places[:n] for n in lengths])

    def prefill(self, cache: PagedCache, sequences: Seq[Sequence], rows: Seq[Seq[int]], chunk: int) -> Tensor:
        """Appends each sequence's prompt to its cache, at most ``chunk`` tokens of it a step.

        Returns the logits [B, vocabulary] behind each prompt's last token.
        """
        logits: list[Tensor | None] = [None] * len(rows)
        done = 0
        while any(out is None for out in logits):
            active = [i for i, row in enumerate(rows) if done < len(row)]
            pieces = [rows[i][done : done + chunk] for i in active]
            ends = [i for i in active if len(rows[i]) <= done + chunk]
            out = self._append(
                Bucket("prefill"), cache, [sequences[i] for i in active], pieces, [active.index(i) for i in ends]
            )
            for i, row in zip(ends, out, strict=True):
                logits[i] = row
            done += chunk
        return torch.stack([out for out in logits if out is not None])

    def decode(self, cache: PagedCache, sequences: Seq[Sequence], tokens: Seq[int]) -> Tensor:
        """Appends one token to each sequence; returns the logits [B, vocabulary] behind it."""
        return self._append(Bucket("decode"), cache, sequences, [[t] for t in tokens], None)

    @staticmethod
    def batch_bucket(rows: int) -> int:
        """The batch in which so many rows decode on the device: the next power of two."""
        return 1 << (rows - 1).bit_length()

    def decode_step(self, cache: PagedCache, rows: int) -> DecodeStep | None:
        """The device's own decode step for ``rows`` rows over ``cache``, or None where the host drives each step."""
        key = (id(cache), self.batch_bucket(rows))
        if key not in self._decode_steps:

            def decoder_of(state: DecodeState) -> Decoder | None:
                return self.kernels.decoder(self.spec, self.weights, state, self.group)

            self._decode_steps[key] = DecodeStep(decoder_of, cache, key[1], lambda: self._region("decode"))
        step = self._decode_steps[key]
        return None if step.decoder is None else step

    def _append(
        self,
        bucket: Bucket,
        cache: PagedCache,
        sequences: Seq[Sequence],
        pieces: Seq[Seq[int]],
        wanted: Seq[int] | None,
    ) -> Tensor:
        """One step over the cache; ``wanted`` are the sequences whose last token's logits are asked for (None: all)."""
        lengths = [len(piece) for piece in pieces]
        positions = [
            at for s, piece in zip(sequences, pieces, strict=True) for at in range(s.length, s.length + len(piece))
        ]
        view = cache.view(sequences, lengths)
        rows = None
        if bucket.kind == "prefill":
            ends = [sum(lengths[: i + 1]) - 1 for i in (range(len(lengths)) if wanted is None else wanted)]
            rows = self._tensor(ends)
        tokens = self._tensor([t for piece in pieces for t in piece])
        inputs = StepInputs(tokens, self._tensor(positions), tuple(lengths), None, view, rows)
        with self._region(bucket.kind):
            result = self._plan(bucket).run(inputs)
        assert result.outputs is not None
        return result.outputs

    def _check_types(self, rows: Seq[Seq[int]]) -> None:
        for index, row in enumerate(rows):
            if row and not 0 <= min(row) <= max(row) < self.spec.token_types:
                raise EngineError(
                    f"sequence {index}: this model's token types go from 0 to {self.spec.token_types - 1}"
                )

    def check_ids(self, rows: Iterable[Seq[int]], what: str = "sequence") -> None:
        """Raises if a row is empty, longer than the model's positions, or holds an id outside the vocabulary; messages
        call the rows ``what``."""
        for index, row in enumerate(rows):
            if not row:
                raise EngineError(f"{what} {index} is empty: give at least one token")
            if len(row) > self.spec.max_positions:
                raise EngineError(
                    f"{what} {index} has {len(row)} tokens, this model takes {self.spec.max_positions}: shorten it"
                )
            low, high = min(row), max(row)
            if low < 0 or high >= self.spec.vocab_size:
                wrong = low if low < 0 else high
                raise EngineError(
                    f"{what} {index}: token id {wrong} is outside the vocabulary of {self.spec.vocab_size}"
                )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
