# mypy: disallow-untyped-defs=False, disallow-untyped-decorators=False, disallow-untyped-calls=False
# mypy: disallow-incomplete-defs=False
"""Decode steps out of static device buffers, so that a step's launches can be captured in a CUDA graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ops.costs import Cost, priced
from ops.errors import KernelError
from ops.generic.launch import assert_indices, on, power_of_two
from ops.plan import CacheView, DecodeState, StepInputs, StepPlan


@triton.jit
def _place_kernel(positions, block_table, slots, context, rows, pages, page_size, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    mask = row < rows
    at = tl.load(positions + row, mask=mask, other=0)
    page = tl.load(block_table + row * pages + at // page_size, mask=mask, other=0).to(tl.int64)
    tl.store(slots + row, page * page_size + at % page_size, mask=mask)
    tl.store(context + row, at + 1, mask=mask)


@priced(lambda result, *_: Cost(0))
def place(positions: Tensor, block_table: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Slots [R] int64 and contexts [R] int32 (see :class:`ops.plan.CacheView`) of one new token a row.

    ``positions`` [R] int64 are the tokens' places, ``block_table`` [R, pages a sequence] int32 the rows' pages. Raises
    :class:`KernelError` for tensors that do not fit together.
    """
    rows = positions.shape[0]
    assert_indices("place", "positions", positions, positions, torch.int64, rows)
    if block_table.dim() != 2:
        raise KernelError(f"place: block_table has shape {list(block_table.shape)}, wanted [R, pages]")
    assert_indices("place", "block_table", block_table, positions, torch.int32, rows, block_table.shape[1])
    slots = torch.empty_like(positions)
    context = torch.empty_like(positions, dtype=torch.int32)
    if rows:
        with on(positions.device):
            _place_kernel[(1,)](
                positions, block_table, slots, context, rows, block_table.shape[1], page_size, BLOCK=power_of_two(rows)
            )
    return slots, context


class PlanDecoder:
    """Decode steps as runs of a plan over the buffers of one :class:`DecodeState`; the sampler chooses."""

    def __init__(self, plan: StepPlan, state: DecodeState) -> None:
        self.plan, self.state = plan, state

    def logits(self, longest: int) -> Tensor:
        """One step (see :class:`ops.plan.Decoder`): the logits [R, vocabulary] behind the rows' newest tokens."""
        state, rows = self.state, self.state.rows
        slots, context = place(state.positions, state.block_table, state.keys[0].shape[1])
        cache = CacheView(
            keys=state.keys,
            values=state.values,
            block_table=state.block_table,
            slots=slots,
            context=context,
            lengths=(longest,) * rows,
            starts=(None,) * rows,
        )
        result = self.plan.run(StepInputs(state.tokens, state.positions, (1,) * rows, None, cache))
        assert result.outputs is not None
        return result.outputs

    def greedy(self, out: Tensor) -> bool:
        """False: choosing is the sampler's part."""
        return False
