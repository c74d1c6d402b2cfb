"""A fence around tensors: kernels in Triton's interpreter may touch nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


def assert_within(addresses: Any, mask: Any, size: int, tensors: Iterable[Tensor], what: str) -> None:
    """Every address where ``mask`` is set has ``size`` bytes of one of the tensors behind it."""
    wanted = addresses[mask]
    inside = np.zeros(wanted.shape, dtype=bool)
    for tensor in tensors:
        start = np.uint64(tensor.data_ptr())
        end = np.uint64(tensor.data_ptr() + tensor.numel() * tensor.itemsize)
        inside |= (wanted >= start) & (wanted + np.uint64(size) <= end)
    assert inside.all(), f"{what} {int((~inside).sum())} elements out of bounds"


@contextmanager
def fence(reads: Iterable[Tensor | None], writes: Iterable[Tensor]) -> Iterator[None]:
    """Kernels within read only ``reads`` and ``writes`` (all contiguous) and write only ``writes``."""
    written = list(writes)
    known = [*(tensor for tensor in reads if tensor is not None), *written]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        assert_within(*np.broadcast_arrays(ptrs.data, mask.data), size, known, "read")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        assert_within(*np.broadcast_arrays(ptrs.data, mask.data), size, written, "wrote")
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield
