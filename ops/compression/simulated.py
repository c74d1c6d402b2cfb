"""Virtual ranks in one process: the arithmetic of several ranks without their processes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ops.compression.collective import Pending, Sent, all_finite, flattened, put_back
from ops.compression.errors import Errors, check
from ops.compression.parts import cut, parts_of
from ops.compression.phases import Phases
from ops.errors import KernelError


class SimulatedCollective:
    """``size`` virtual ranks. Give :attr:`ranks` one each to whatever takes a collective.

    A mean is computed when the last rank asks for it. In one thread, let every rank ask before any waits; where a call
    waits by itself (an optimizer's step), run each rank in a thread. A ``wait`` that lacks a rank's call raises
    :class:`KernelError` after ``timeout`` seconds, and so does every other wait for that call.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        if size < 1:
            raise KernelError(f"SimulatedCollective: {size} ranks, wanted at least 1")
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()
        self._calls: dict[int, _Call] = {}
        self.ranks = [VirtualRank(self, rank) for rank in range(size)]

    def call(self, at: int, rank: int, asked: _Asked) -> _Call:
        """Rank's call number ``at``; the last rank's computes."""
        with self.changed:
            call = self._calls.setdefault(at, _Call(self))
            call.asked[rank] = asked
            if len(call.asked) == self.size:
                del self._calls[at]
                call.compute()
                self.changed.notify_all()
        return call


#: Tensors whose mean is asked for; or a buffer, its errors and its parts.
_Compressed = tuple[Tensor, Errors, tuple[int, ...]]
_Asked = list[Tensor] | _Compressed


class _Call:
    """The same call of all ranks."""

    def __init__(self, collective: SimulatedCollective) -> None:
        self._collective = collective
        self.asked: dict[int, _Asked] = {}
        self._sound: Tensor | None = None
        self._fault: Exception | None = None

    @torch.no_grad()
    def compute(self) -> None:
        """Once all have asked. What fails is raised by every rank's wait."""
        asked = [self.asked[rank] for rank in range(self._collective.size)]
        try:
            if all(isinstance(each, tuple) for each in asked):
                self._sound = _compressed([each for each in asked if isinstance(each, tuple)])
            elif not any(isinstance(each, tuple) for each in asked):
                self._sound = _full([each for each in asked if not isinstance(each, tuple)])
            else:
                raise KernelError("SimulatedCollective: some ranks ask for mean, others for compressed_mean")
        except Exception as fault:  # raised by wait, on every rank
            self._fault = fault

    def wait(self) -> Tensor:
        """As :meth:`Pending.wait`."""
        with self._collective.changed:
            if not self._collective.changed.wait_for(self._over, self._collective.timeout):
                lacking = sorted(set(range(self._collective.size)) - set(self.asked))
                self._fault = KernelError(
                    f"SimulatedCollective: ranks {lacking} made no call in {self._collective.timeout} s: let every "
                    "rank ask before one waits, or run each in a thread"
                )
                self._collective.changed.notify_all()
        if self._fault is not None:
            raise self._fault
        assert self._sound is not None
        return self._sound

    def _over(self) -> bool:
        return self._sound is not None or self._fault is not None


class VirtualRank:
    """One rank of a :class:`SimulatedCollective`, a :class:`GradientCollective`."""

    def __init__(self, collective: SimulatedCollective, rank: int) -> None:
        self._collective, self.rank, self.size = collective, rank, collective.size
        self.sent = Sent()
        self._calls = 0

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """As :meth:`GradientCollective.mean`."""
        for tensor in tensors:
            if not tensor.dtype.is_floating_point:
                raise KernelError(f"mean: a tensor is {tensor.dtype}: only floating-point tensors have a mean")
            self.sent.count_full(tensor.numel() * tensor.element_size(), self.size)
        return self._ask(list(tensors))

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """As :meth:`GradientCollective.compressed_mean`."""
        check(buffer, errors, self.rank, self.size)
        found = parts_of(buffer.numel(), parts)
        self.sent.count_compressed(cut(found, self.size))
        return self._ask((buffer, errors, found))

    def _ask(self, asked: _Asked) -> _Call:
        self._calls += 1
        return self._collective.call(self._calls, self.rank, asked)


def _full(asked: Sequence[Sequence[Tensor]]) -> Tensor:
    ranks = [list(flattened(tensors, len(asked))) for tensors in asked]
    sums = []
    for same in zip(*ranks, strict=True):
        total = same[0][1]
        for _, flat in same[1:]:
            total += flat
        sums.append(total)
        for group, _ in same:
            put_back(group, total)
    return all_finite(sums)


def _compressed(asked: Sequence[_Compressed]) -> Tensor:
    first, _, parts = asked[0]
    if any(buffer.shape != first.shape or buffer.dtype != first.dtype for buffer, _, _ in asked):
        raise KernelError("SimulatedCollective: the ranks' buffers differ in size or dtype")
    if any(each != parts for _, _, each in asked):
        raise KernelError("SimulatedCollective: the ranks' buffers differ in their parts")
    if not first.numel():
        return torch.tensor(True, device=first.device)
    found = cut(parts, len(asked))
    phases = [Phases(buffer.detach(), errors, found, rank) for rank, (buffer, errors, _) in enumerate(asked)]
    scales = torch.stack([each.scales() for each in phases])
    packed = torch.stack([each.signs(scales) for each in phases])
    served = torch.stack([each.serve(packed[:, rank].contiguous()) for rank, each in enumerate(phases)])
    return torch.stack([each.finish(served) for each in phases]).all()
