"""Compressed means over a process group of ``torch.distributed``: NCCL, or Gloo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ops.compression.collective import Errors, Pending, average, first_half, settle


class TorchCollective:
    """The processes of a group (None: all). Exchanges begin at once and end with :meth:`Pending.wait`, so several are
    on their
    way at a time. ``sent`` counts what this process sends: a ring's share of an all-reduce, and all of a gather."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0

    def mean(self, tensors: Sequence[Tensor]) -> Pending:
        """One all-reduce for each dtype and device among them."""
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel():
                alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        started = []
        for some in alike.values():
            flat = _flatten_dense_tensors([tensor.detach() for tensor in some])
            flat /= self.size  # before the sum, which fp16 might not hold
            self.sent += 2 * (self.size - 1) * flat.numel() * flat.element_size() // self.size
            started.append((some, flat, dist.all_reduce(flat, group=self.group, async_op=True)))

        def finish() -> None:
            for some, flat, work in started:
                work.wait()
                for tensor, part in zip(some, _unflatten_dense_tensors(flat, some), strict=True):
                    tensor.copy_(part)

        return Pending(finish)

    def compressed_mean(self, buffer: Tensor, errors: Errors) -> Pending:
        """Chunks of signs to their servers, and their means to all."""
        own = first_half(buffer, errors, self.size)
        received, scales = torch.empty_like(own.packed), buffer.new_empty(self.size, dtype=torch.float32)
        works = [
            dist.all_to_all_single(received, own.packed, group=self.group, async_op=True),
            dist.all_gather_into_tensor(scales, own.scale.reshape(1), group=self.group, async_op=True),
        ]
        chunk = own.packed.numel() // self.size
        self.sent += 2 * (self.size - 1) * (chunk + 4)

        def finish() -> None:
            for work in works:
                work.wait()
            mean = average(received.chunk(self.size), scales, errors, self.rank) if chunk else own
            whole, sizes = torch.empty_like(own.packed), torch.empty_like(scales)
            second = [
                dist.all_gather_into_tensor(whole, mean.packed, group=self.group, async_op=True),
                dist.all_gather_into_tensor(sizes, mean.scale.reshape(1), group=self.group, async_op=True),
            ]
            for work in second:
                work.wait()
            if chunk:
                settle(buffer, whole.chunk(self.size), sizes, scales, errors, own, mean)

        return Pending(finish)
