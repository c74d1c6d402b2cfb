"""``Call``: one call of an operator as formulas see it, with its tensors and the bytes they touch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

#: In-place operators, without their underscore, that do not read what they overwrite.
_OVERWRITES = frozenset(
    ("copy", "fill", "zero", "normal", "uniform", "bernoulli", "random", "exponential", "cauchy", "geometric")
) | {"log_normal", "trunc_normal"}
#: Operators that read only as much of their first tensor (by name: of that argument) as they return.
_GATHERS = {
    "embedding": "weight",
    "_embedding_bag": "weight",
    "_embedding_bag_forward_only": "weight",
    "index": "self",
    "_unsafe_index": "self",
    "index_select": "self",
    "gather": "self",
    "take": "self",
    "masked_select": "self",
}
#: In-place operators that touch only as much of ``self`` as they are given: the argument that says how much.
_SCATTERS = {
    "index_put": "values",
    "_index_put_impl": "values",
    "_unsafe_index_put": "values",
    "index_copy": "source",
    "index_add": "source",
    "scatter": "index",
    "scatter_add": "index",
    "scatter_reduce": "index",
    "put": "source",
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, also in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def touched_bytes(tensor: Tensor) -> int:
    """Bytes of storage that reading every element of ``tensor`` touches: what ``expand`` repeats counts once.

    Exact for what ``expand``, slices and permutations make; for windows that overlap (``as_strided``, ``unfold``) the
    smaller of the elements and the stretch of memory they lie in. Sparse tensors: values and indices.
    """
    if tensor.layout == torch.sparse_coo:
        return touched_bytes(tensor._values()) + touched_bytes(tensor._indices())
    if tensor.layout != torch.strided or tensor.is_nested:
        return tensor.numel() * tensor.element_size()
    elements = extent = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride or not size:
            elements *= size
        extent += (size - 1) * stride
    return min(elements, max(extent, 0)) * tensor.element_size()


def storage_key(tensor: Tensor) -> int:
    """What tells one storage from another among tensors that are alive; 0 for tensors without one."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided and not tensor.is_nested else 0


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same view of the same memory."""
    storage = storage_key(tensor)
    return (storage, tensor.storage_offset(), tensor.shape, tensor.stride()) if storage else (id(tensor),)


def _indexed(target: Tensor, indices: Sequence[Tensor | None]) -> int:
    """Elements that ``target[indices]`` has; all that a mask covers, whose values are not looked at."""
    given = [index for index in indices if index is not None]
    if any(index.dtype == torch.bool for index in given):
        return target.numel()
    rest = [size for axis, size in enumerate(target.shape) if axis >= len(indices) or indices[axis] is None]
    return int(prod(torch.broadcast_shapes(*(index.shape for index in given)))) * prod(rest)


class Call:
    """One call: the operator, its arguments by their names in the schema, and what it returned."""

    def __init__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.op = op
        self.args = args
        self.kwargs = kwargs
        self.result = result
        #: The plain name: ``add`` for ``aten.add_.Tensor`` and for ``aten._foreach_add``.
        self.name = plain_name(getattr(op, "_overloadpacket", op).__name__)
        #: None for what the dispatcher knows no signature of: higher-order operators and plain functions.
        self.schema: torch.FunctionSchema | None = getattr(op, "_schema", None)

    def __getitem__(self, name: str) -> Any:
        """The argument of that name, or its default."""
        return self._named[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument of that name, or ``default`` if the operator has none such."""
        return self._named.get(name, default)

    @cached_property
    def _named(self) -> dict[str, Any]:
        return {argument.name: value for argument, value in self._bound}

    @cached_property
    def _bound(self) -> list[tuple[Any, Any]]:
        """Schema arguments with their values; nothing without a schema."""
        return [
            (
                argument,
                self.args[place] if place < len(self.args) else self.kwargs.get(argument.name, argument.default_value),
            )
            for place, argument in enumerate(self.schema.arguments if self.schema else ())
        ]

    @property
    def inputs(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return list(tensors_in([self.args, self.kwargs]))

    @property
    def outputs(self) -> list[Tensor]:
        """Every tensor that was returned; of an operator that returns nothing, what it wrote."""
        found = list(tensors_in(self.result))
        return found or [tensor for argument, value in self._written() for tensor in tensors_in(value)]

    @property
    def output(self) -> Tensor:
        """The first of ``outputs``."""
        return self.outputs[0]

    def _written(self) -> list[tuple[Any, Any]]:
        return [pair for pair in self._bound if pair[0].alias_info is not None and pair[0].alias_info.is_write]

    @property
    def floating(self) -> bool:
        """Whether a floating point (or complex) number takes part."""
        return any(tensor.is_floating_point() or tensor.is_complex() for tensor in [*self.inputs, *self.outputs])

    def traffic(self) -> tuple[int, int]:
        """Bytes read and written: each operand and each result once, where storage is really touched; (0, 0) for a
        view. The same view of the same memory given twice is read once."""
        if self.schema is None:
            return sum(map(touched_bytes, self.inputs)), sum(map(touched_bytes, tensors_in(self.result)))
        written = [tensor for _, value in self._written() for tensor in tensors_in(value)]
        known = {storage_key(tensor) for tensor in self.inputs} - {0}
        fresh = [tensor for tensor in tensors_in(self.result) if storage_key(tensor) not in known]
        if not written and not fresh:
            # A view returns its operand's storage; what returns no tensor (``item``) reads all the same.
            return (0, 0) if self.outputs else (self._read(), 0)
        share = self._scattered()
        if share is not None:
            return self._read() - share[0], share[1] + sum(map(touched_bytes, fresh))
        return self._read(), sum(map(touched_bytes, [*written, *fresh]))

    def _scattered(self) -> tuple[int, int] | None:
        """Of an in-place scatter: bytes of ``self`` that ``_read`` counts too much, and bytes that it writes."""
        amount = _SCATTERS.get(self.name)
        if amount is None or not self._written():
            return None
        target = self["self"]
        elements = _indexed(target, self["indices"]) if amount == "values" else self[amount].numel()
        touched = min(elements * target.element_size(), touched_bytes(target))
        adds = bool(self.get("accumulate", False)) or self.name in ("scatter_add", "index_add", "scatter_reduce")
        return touched_bytes(target) - touched * adds, touched

    def _read(self) -> int:
        """Bytes of what is read: every operand but those that are only written."""
        if self.name.startswith("new_") or self.name.endswith("_like"):
            return 0  # only the shape is asked for
        seen = set()
        total = 0
        gathered = _GATHERS.get(self.name)
        for argument, value in self._bound:
            if self._only_written(argument):
                continue
            for tensor in tensors_in(value):
                place = _place(tensor)
                if place in seen:
                    continue
                seen.add(place)
                size = touched_bytes(tensor)
                total += min(size, self._gathered_bytes(tensor)) if argument.name == gathered else size
        return total

    def _gathered_bytes(self, table: Tensor) -> int:
        if self.name.startswith("_embedding_bag"):
            return int(self["indices"].numel()) * table.shape[-1] * table.element_size()
        return self.output.numel() * table.element_size()

    def _only_written(self, argument: Any) -> bool:
        if argument.alias_info is None or not argument.alias_info.is_write:
            return False
        return bool(argument.is_out) or self.name in _OVERWRITES


def plain_name(name: str) -> str:
    """Without what says how an operator runs: the underscore of in-place ones, ``_foreach_``."""
    name = name.removeprefix("_foreach_")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
