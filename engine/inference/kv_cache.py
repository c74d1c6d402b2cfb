"""The KV cache: one paged pool with fixed addresses, shared by every sequence of an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from engine.errors import EngineError
from ops.plan import CacheView
from ops.spec import ModelSpec


@dataclass(eq=False)
class Sequence:
    """A sequence's claim on the pool: its pages in order, and how many tokens they hold so far."""

    pages: list[int]
    page_size: int
    length: int = 0
    start: int | None = field(init=False)

    def __post_init__(self) -> None:
        first = self.pages[0]
        consecutive = all(page == first + i for i, page in enumerate(self.pages))
        self.start = first * self.page_size if consecutive else None

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return len(self.pages) * self.page_size

    def slots(self, new: int) -> list[int]:
        """Flat slots of the next ``new`` tokens."""
        size = self.page_size
        return [self.pages[at // size] * size + at % size for at in range(self.length, self.length + new)]


class PagedCache:
    """Pools of keys and values per layer, [pages, page_size, kv_heads, head_dim], and who holds which page.

    Memory is reserved at once and never moves, so that captured graphs stay valid while sequences grow. A sequence gets
    consecutive pages where there are enough, which lets the ``eager`` set read it as a view; else any free ones. One
    page more than asked for, ``scratch``, belongs to no sequence: rows that only fill a batch up write there.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        pages: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
        widest: int | None = None,
    ) -> None:
        """``pages`` in all, of which a sequence takes at most ``widest`` (all of them if it is None)."""
        shape = (pages + 1, page_size, spec.kv_heads, spec.head_dim)
        self.keys = tuple(_zeros(shape, dtype, device) for _ in range(spec.layers))
        self.values = tuple(_zeros(shape, dtype, device) for _ in range(spec.layers))
        self.page_size = page_size
        self.device = device
        self.scratch = pages
        self.widest = pages if widest is None else widest
        self._free = list(range(pages))

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that ``tokens`` take."""
        return -(-tokens // self.page_size)

    def allocate(self, tokens: int) -> Sequence:
        """Room for ``tokens`` tokens of a new sequence."""
        need = max(self.pages_for(tokens), 1)
        if need > len(self._free):
            raise EngineError(
                f"the KV cache has {len(self._free) * self.page_size} tokens free, {tokens} are needed: "
                "raise inference.max_tokens or inference.max_batch"
            )
        first = _first_run(self._free, need)
        pages = self._free[first : first + need]
        del self._free[first : first + need]
        return Sequence(pages, self.page_size)

    def release(self, sequence: Sequence) -> None:
        """Gives a sequence's pages back."""
        self._free = sorted(self._free + sequence.pages)
        sequence.pages = []

    def view(self, sequences: Seq[Sequence], new: Seq[int]) -> CacheView:
        """The view for a step that appends ``new[i]`` tokens to ``sequences[i]``; counts them as appended."""
        slots = [slot for sequence, count in zip(sequences, new, strict=True) for slot in sequence.slots(count)]
        for sequence, count in zip(sequences, new, strict=True):
            sequence.length += count
            assert sequence.length <= sequence.capacity, "a sequence outgrew the pages it was given"
        widest = max(len(sequence.pages) for sequence in sequences)
        table = [sequence.pages + [0] * (widest - len(sequence.pages)) for sequence in sequences]
        return CacheView(
            keys=self.keys,
            values=self.values,
            block_table=_on_device(table, torch.int32, self.device),
            slots=_on_device(slots, torch.int64, self.device),
            context=_on_device([sequence.length for sequence in sequences], torch.int32, self.device),
            lengths=tuple(sequence.length for sequence in sequences),
            starts=tuple(sequence.start for sequence in sequences),
        )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not garbage: what lies behind a sequence's end is masked, but NaN times zero is NaN.

    On a CPU NumPy asks the system for zeroed pages, which cost nothing until a sequence reaches them; ``torch.zeros``
    would write, and so take, the whole pool at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(shape)


def _first_run(free: Seq[int], need: int) -> int:
    """Index in the sorted ``free`` of the first ``need`` consecutive pages, or 0 if there is no such run."""
    run = 0
    for i, page in enumerate(free):
        run = run + 1 if i and page == free[i - 1] + 1 else 1
        if run == need:
            return i - need + 1
    return 0


def _on_device(values: list[list[int]] | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
