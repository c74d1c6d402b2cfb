"""The collective over ``torch.distributed``: NCCL for GPU tensors; Gloo for CPU tensors, and for GPU tensors by way of
the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor

from ops.compression.collective import Done, Pending, Sent, all_finite, flattened, put_back
from ops.compression.errors import Errors, check
from ops.compression.parts import cut, parts_of
from ops.compression.phases import Phases
from ops.errors import KernelError

#: torch 2.13 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Waits for an exchange and gives what came.
Arrival = Callable[[], Tensor]
Stages = Iterator[None]


class _Flight:
    """One mean in flight: its stages each end with an exchange on its way."""

    def __init__(self, collective: TorchCollective, device: torch.device) -> None:
        self._collective, self._device = collective, device
        self._event: torch.cuda.Event | None = None
        self.stages: Stages = iter(())
        self.sound: Tensor | None = None

    def advance(self) -> bool:
        """Goes on to the next exchange; whether there was one."""
        stream = self._collective.stream(self._device)
        with _within(stream):
            flying = next(self.stages, self) is None
            if not flying and stream is not None:
                self._event = stream.record_event()
        return flying

    def wait(self) -> Tensor:
        """As :meth:`Pending.wait`."""
        self._collective.land(self)
        if self.sound is None:
            raise KernelError("a mean in flight was lost when an exchange failed: end this process")
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            self.sound.record_stream(current)
        return self.sound


class TorchCollective:
    """The ranks of a process group (the default group if None). A group of one compresses as well: for
    nothing to be compressed, take :class:`SingleProcess`.

    Means in flight are a pipeline: each call takes the earlier ones a stage further before it starts its own, and a
    ``wait`` takes all of them on until its own is there; the order depends on the calls alone, so it is the same on all
    ranks. On a GPU all of it runs on a stream of its own beside what follows.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise KernelError("TorchCollective: no process group: call torch.distributed.init_process_group first")
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise KernelError("TorchCollective: this process is not in the group: make it on the group's ranks only")
        self.sent = Sent()
        self._flying: list[_Flight] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        config = str(dist.get_backend_config(group))
        self._backends = dict(pair.split(":", 1) for pair in config.split(",") if ":" in pair)

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """As :meth:`GradientCollective.mean`. Tensors are on one device."""
        if not tensors:
            return Done(torch.tensor(True))
        device = tensors[0].device
        for tensor in tensors:
            if not tensor.dtype.is_floating_point:
                raise KernelError(f"mean: a tensor is {tensor.dtype}: only floating-point tensors have a mean")
            if tensor.device != device:
                raise KernelError(f"mean: a tensor is on {tensor.device}, the first on {device}: move it")
        for tensor in tensors:
            self.sent.count_full(tensor.numel() * tensor.element_size(), self.size)
        return self._start(device, tensors, lambda flight: self._full(tensors, flight))

    def compressed_mean(self, buffer: Tensor, errors: Errors, parts: Sequence[int] | None = None) -> Pending:
        """As :meth:`GradientCollective.compressed_mean`."""
        check(buffer, errors, self.rank, self.size)
        found = cut(parts_of(buffer.numel(), parts), self.size)
        if not buffer.numel():
            return Done(torch.tensor(True, device=buffer.device))
        self.sent.count_compressed(found)
        phases = Phases(buffer.detach(), errors, found, self.rank)
        used = (buffer, errors.worker, errors.server)
        return self._start(buffer.device, used, lambda flight: self._compressed(phases, flight))

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Where means of tensors on ``device`` are computed, None on a CPU."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def land(self, flight: _Flight) -> None:
        """Takes all in flight on, the oldest first, until ``flight`` is there."""
        while flight in self._flying:
            self._advance()

    def _advance(self) -> None:
        # Should an exchange fail, the ranks are no longer in step: nothing in flight can go on.
        flying, self._flying = self._flying, []
        self._flying = [flight for flight in flying if flight.advance()]

    def _start(self, device: torch.device, used: Sequence[Tensor], stages: Callable[[_Flight], Stages]) -> Pending:
        self._advance()
        stream = self.stream(device)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
            for tensor in used:
                tensor.record_stream(stream)
        flight = _Flight(self, device)
        flight.stages = stages(flight)
        if flight.advance():
            self._flying.append(flight)
        return flight

    @torch.no_grad()
    def _full(self, tensors: Sequence[Tensor], flight: _Flight) -> Stages:
        arrivals = [(group, self._sum(flat)) for group, flat in flattened(tensors, self.size)]
        yield
        sound = []
        for group, arrived in arrivals:
            flat = arrived()
            put_back(group, flat)
            sound.append(all_finite([flat]))
        flight.sound = torch.stack(sound).all()

    @torch.no_grad()
    def _compressed(self, phases: Phases, flight: _Flight) -> Stages:
        arrived = self._gather(phases.scales())
        yield
        arrived = self._all_to_all(phases.signs(arrived().view(self.size, -1)))
        yield
        arrived = self._gather(phases.serve(arrived()))
        yield
        flight.sound = phases.finish(arrived().view(self.size, -1))

    def _wire(self, tensor: Tensor) -> Tensor:
        """The tensor where its backend takes it: Gloo does not exchange all with all on a GPU."""
        by_host = tensor.device.type == "cuda" and self._backends.get("cuda", "nccl") == "gloo"
        return tensor.cpu() if by_host else tensor

    def _sum(self, flat: Tensor) -> Arrival:
        wire = self._wire(flat)
        work = dist.all_reduce(wire, group=self._group, async_op=True)
        return _arrival(work, wire, (), flat.device)

    def _gather(self, part: Tensor) -> Arrival:
        wire = self._wire(part)
        out = wire.new_empty(self.size * wire.numel())
        work = _all_gather(out, wire, group=self._group, async_op=True)
        return _arrival(work, out, (wire,), part.device)

    def _all_to_all(self, parts: Tensor) -> Arrival:
        wire = self._wire(parts)
        out = torch.empty_like(wire)
        work = dist.all_to_all_single(out, wire, group=self._group, async_op=True)
        return _arrival(work, out, (wire,), parts.device)


def _arrival(work: dist.Work | None, out: Tensor, kept: tuple[Tensor, ...], device: torch.device) -> Arrival:
    """``kept`` are tensors that must live until the exchange is over."""

    def arrived() -> Tensor:
        assert work is not None, kept
        work.wait()
        return out.to(device)

    return arrived


def _within(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
