"""Training on several processes: joining them, and the average of their gradients."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from engine.errors import EngineError
from engine.training.block_stack import find_stack
from engine.training.failures import begin_pulse
from engine.training.feature import Feature, Progress
from engine.training.gradient_exchange import Exchange, exchange_by
from engine.training.ranks import in_seconds, ranks
from engine.training.workers import live
from ops.compression.collective import all_finite

#: Bytes of gradients that are averaged at a time.
BUCKET_BYTES = 25 * 2**20
#: For all processes to come; as long as torch waits.
JOIN = timedelta(minutes=30)


def launched() -> int | None:
    """How many processes somebody has started to train together, by torchrun's environment or by the group that is
    there; None: nobody has. Workers that another engine of this process has started do not count."""
    if not dist.is_available():
        return None
    if dist.is_initialized():
        return None if live() else dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def join(device: torch.device, timeout: float | None = None) -> torch.device:
    """Joins the processes that torchrun started, if it did; this process's device. A GPU each, NCCL; on CPUs Gloo.
    ``timeout``: seconds of an exchange, None for torch's own."""
    if not dist.is_available():
        return device
    others = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if others and device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise EngineError(f"local rank {local} has no GPU: there are {torch.cuda.device_count()}; start as many")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if others and not dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", timeout)
    if dist.is_initialized():
        begin_pulse()
    return device


def _join(backend: str, timeout: float | None) -> None:
    """All are waited for before their exchanges' timeout counts: each has much to import."""
    if timeout is None:
        dist.init_process_group(backend)
        return
    store, rank, world = next(rendezvous("env://"))
    store.set(f"slipstream/joined/{rank}", "")
    store.wait([f"slipstream/joined/{each}" for each in range(world)], JOIN)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=in_seconds(timeout))


def mean_of(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in the tensor itself; all of them call it."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


class Means:
    """The mean of a step's losses over all processes; NaN where one has NaN. A wish to stop travels with them, so that
    all processes stop behind the same step.

    asked: whether this process is to stop. stop: whether any is, as of the last exchange. check: raises where what was
    exchanged means nothing, because a process has failed meanwhile.
    """

    def __init__(self) -> None:
        self.asked = self.stop = False
        self.check: Callable[[], None] = lambda: None

    def __call__(self, losses: Tensor) -> Tensor:
        """``losses``: [N] float64; as many from each process."""
        if not dist.is_available() or not dist.is_initialized():
            self.stop = self.asked
            return losses
        values = torch.cat([losses, losses.new_tensor([float(self.asked)])])
        dist.all_reduce(values)
        self.stop = bool(values[-1] > 0)
        self.check()
        return values[:-1] / dist.get_world_size()


class Replicas(Feature):
    """Averages gradients over the processes behind a step's last micro-batch.

    Where blocks are left out at random (layer drop) ``DistributedDataParallel`` would not do: a block that is left out
    in the last micro-batch only is unused to it, and its gradient would stay each process's own.
    """

    name: ClassVar[str] = "replicas"
    saved: ClassVar[bool] = False

    def backward_end(self, progress: Progress) -> None:
        """Before gradients are unscaled, so that an overflow in one process is one in all."""
        if progress.micro_batch < progress.micro_batches - 1:
            return
        found = [p.grad for p in progress.model.parameters() if p.grad is not None]
        for grads in _buckets(found):
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))


class Overflows(Feature):
    """Makes an overflow in one process one in all, where their gradients stay apart: all skip the step, or none."""

    name: ClassVar[str] = "overflows"
    saved: ClassVar[bool] = False

    def backward_end(self, progress: Progress) -> None:
        """Behind a step's last micro-batch, before gradients are unscaled: that is where overflows are looked for."""
        grads = [p.grad for p in progress.model.parameters() if p.grad is not None]
        if progress.micro_batch < progress.micro_batches - 1 or not grads:
            return
        overflow = (~all_finite(grads)).float()
        dist.all_reduce(overflow, dist.ReduceOp.MAX)
        min(grads, key=Tensor.numel).add_(torch.where(overflow > 0, torch.inf, 0.0))


class Overlapped(Feature):
    """``DistributedDataParallel`` or FSDP2: gradients are exchanged with a step's last micro-batch alone."""

    name: ClassVar[str] = "data_parallel"
    saved: ClassVar[bool] = False

    def __init__(self, wrapped: nn.Module) -> None:
        self.wrapped = wrapped

    @contextmanager
    def forward_context(self, progress: Progress) -> Iterator[None]:
        """No exchange but behind the last one."""
        last = progress.micro_batch == progress.micro_batches - 1
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(last)
            yield
            return
        try:
            with nullcontext() if last else self.wrapped.no_sync():  # type: ignore[operator]
                yield
        except RuntimeError as error:
            if "finished reduction" not in str(error):
                raise
            raise EngineError(
                "the loss does not depend on some of the model's parameters, for whose gradients the processes would "
                'wait: requires_grad_(False) them, or set $.training.data_parallel to "shard"'
            ) from error


def spread(
    model: nn.Module,
    how: Literal["replicate", "shard"],
    layer_drop: bool,
    device: torch.device,
    exchange: Exchange = "full",
) -> tuple[nn.Module, tuple[Feature, ...]]:
    """What to call for a forward pass, and the features that exchange gradients; the model itself for one process.

    ``exchange`` says how copies' gradients travel; the other two know one way alone.
    "shard" changes the model's parameters (``fully_shard``, over each block of its stack and the rest).
    """
    if not dist.is_available() or not dist.is_initialized():
        return model, ()
    assert_alike(model)
    if how == "replicate" and not layer_drop:
        wrapped = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
        return wrapped, (Overlapped(wrapped), *exchange_by(wrapped, exchange))
    share(model)  # as the wrapper above does
    if how == "shard":
        for block in find_stack(model).blocks:
            fully_shard(block)
        fully_shard(model)
        return model, (Overlapped(model),)
    return model, (Replicas(),)


def keep_apart(model: nn.Module, scaled: bool) -> tuple[Feature, ...]:
    """Gives all processes the weights of the first, and leaves each its own gradients, for an optimizer that exchanges
    them itself. The features that this needs, ``scaled``: by a loss scale, whose overflows are common."""
    if not dist.is_available() or not dist.is_initialized():
        return ()
    assert_alike(model)
    share(model)
    return (Overflows(),) if scaled else ()


def share(model: nn.Module) -> None:
    """Gives all processes the weights of the first."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)


def assert_alike(model: nn.Module) -> None:
    """Raises :class:`EngineError` in all processes where the model of one of them is another one than the first's."""
    team, own = ranks(), _facts(model)
    first = team.first(lambda: own)
    for rank, found in enumerate(team.every(lambda: _difference(own, first))):
        if found is not None:
            raise EngineError(f"the model of rank {rank} is not that of rank 0: {found}; build the same one in each")


def fingerprint(model: nn.Module) -> str:
    """Of what the processes' models must have in common."""
    return hashlib.sha256(repr(_facts(model)).encode()).hexdigest()


def _facts(model: nn.Module) -> dict[str, str]:
    """Of each tensor its shape, its dtype, and whether it is trained."""
    found = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        trained = "trained" if tensor.requires_grad else "not trained"
        found[name] = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {trained}"
    return found


def _difference(own: dict[str, str], first: dict[str, str]) -> str | None:
    """Where ``own`` facts differ from those of the first process."""
    for name in (*first, *own):
        if name not in own:
            return f"it has no {name}"
        if name not in first:
            return f"it has {name} as well"
        if own[name] != first[name]:
            return f"{name} is {own[name]}, and {first[name]} there"
    return None if list(own) == list(first) else "its tensors come in another order"


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype, so many that they fill a bucket."""
    for dtype in dict.fromkeys(grad.dtype for grad in grads):
        bucket: list[Tensor] = []
        size = 0
        for grad in grads:
            if grad.dtype != dtype:
                continue
            bucket.append(grad)
            size += grad.numel() * grad.element_size()
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
