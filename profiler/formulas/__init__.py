"""What operators cost: tables from an operator's plain name to a formula, one file for each family.

``cost_of`` looks at costs that were registered (``ops.costs``), then at these tables, then at formulas that others
registered with ``torch.utils.flop_counter``; views are known by what they return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import flop_registry

from ops.costs import COSTS, Cost
from profiler.formulas import attention, layers, pointwise, products, reductions
from profiler.formulas.call import Call, tensors_in, touched_bytes
from profiler.formulas.movement import FREE, MOVED

FORMULAS: dict[str, Callable[[Call], Cost]] = {
    **pointwise.FORMULAS,
    **reductions.FORMULAS,
    **products.FORMULAS,
    **attention.FORMULAS,
    **layers.FORMULAS,
}

#: Namespaces whose operators are named in the tables.
_NAMESPACES = frozenset(("aten", "prim", "prims", "mkldnn"))

#: Collectives: bytes that this process gives and gets; the sums of a reduction are not counted.
_COMMUNICATION = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd", "fsdp", "symm_mem"))


def has_formula(op: object) -> bool:
    """Whether an operator has a formula of its own, so that it is counted whole rather than by its parts."""
    packet = getattr(op, "_overloadpacket", op)
    return packet in COSTS or packet in flop_registry or (_ours(op) and Call(op, (), {}, None).name in FORMULAS)


def cost_of(call: Call) -> Cost | None:
    """The cost of a call with its bytes, or None if nobody said what the operator costs (its bytes are then those of
    its tensors, by ``Call.traffic``)."""
    cost = _work(call)
    if cost is None:
        return None
    read, written = (0, 0) if _ours(call.op) and call.name in FREE else call.traffic()
    return replace(
        cost,
        executed_flops=cost.flops if cost.executed_flops is None else cost.executed_flops,
        bytes_read=read if cost.bytes_read is None else cost.bytes_read,
        bytes_written=written if cost.bytes_written is None else cost.bytes_written,
    )


def _work(call: Call) -> Cost | None:
    packet = getattr(call.op, "_overloadpacket", call.op)
    if packet in COSTS:
        return COSTS[packet](call.result, *call.args, **call.kwargs)
    if _ours(call.op):
        if call.name in FORMULAS:
            return FORMULAS[call.name](call)
        if call.name in FREE or call.name in MOVED or _is_view(call):
            return Cost(0)
    elif getattr(call.op, "namespace", "") in _COMMUNICATION:  # whose signatures do not say what they write
        given, got = (sum(map(touched_bytes, tensors_in(value))) for value in ([call.args, call.kwargs], call.result))
        return Cost(0, bytes_read=given, bytes_written=got)
    return products.torch_product(call) if packet in flop_registry else None


def _is_view(call: Call) -> bool:
    """Whether all that is returned are views of what was given, and nothing is written: by the operator's signature,
    or, for those that it calls unsafe, by the storage."""
    if call.schema is None or call.schema.is_mutable or not call.schema.returns:
        return False
    signed = all(value.alias_info is not None for value in call.schema.returns)
    return signed or (call.outputs != [] and call.traffic() == (0, 0))


def _ours(op: object) -> bool:
    """Whether the tables mean this operator by its name."""
    if isinstance(op, torch._ops.HigherOrderOperator):
        return True
    return getattr(op, "namespace", "") in _NAMESPACES
