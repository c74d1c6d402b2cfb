"""What an optimizer updates together: the tensors of some parameters side by side, in the arithmetic's precision."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Too coarse to be updated in place: a step of a thousandth of a weight is less than half of bf16's spacing.
HALF = (torch.bfloat16, torch.float16)
#: What can be trained; anything else is refused when it is added.
TRAINABLE = (torch.float32, torch.float64, *HALF)
#: Elements that one multi-tensor update takes at a time, which bounds its temporaries: three tensors of this many (192
#: MiB in fp32), or of the largest parameter. A launch still has enough to do.
BATCH_ELEMENTS = 1 << 24
#: Elements of momenta that are exchanged together. Several such buckets are on their way at a time.
BUCKET_ELEMENTS = 1 << 24
#: Elements of a tensor that a CPU takes through many operations at a time: what is made of them stays in its cache.
PIECE_ELEMENTS = 1 << 18


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """A new tensor of all elements, end to end."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def end_to_end(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, to be read only: a single tensor's own where it is contiguous, else as :func:`flattened`."""
    return tensors[0].reshape(-1) if len(tensors) == 1 else flattened(tensors)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of moments and arithmetic: fp32, and fp64 for fp64 parameters."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


@dataclass
class Batch:
    """Parameters of one group with gradients: parallel lists, on one device and of one dtype.

    parameters:  the parameters, as the optimizer was given them.
    params:      the same (this process's part of them, if they are sharded).
    grads:       their gradients, as they came.
    weights:     what the arithmetic updates: the parameters themselves, or their fp32 master copies.
    exp_avgs, exp_avg_sqs: first and second moments, in :func:`compute_dtype`.
    trust_ratios: 0-dim tensors that show the last ratio.
    steps:       updates of each parameter, this one included (a parameter without a gradient is not updated).
    groups:      process groups over which the parameters are sharded; sums over a whole tensor are reduced over each.
    """

    parameters: list[Tensor] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    trust_ratios: list[Tensor] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    groups: tuple[dist.ProcessGroup, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where all of it is."""
        return self.params[0].device

    def append(self, parameter: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        """Takes one more parameter with its gradient and its state (:func:`ensure_state`)."""
        local = local_part(parameter)
        master = state.get("master_weight")
        if master is not None:
            master = local_part(master)
            follow(master, local)
        self.parameters.append(parameter)
        self.params.append(local)
        self.grads.append(local_part(grad))
        self.weights.append(local if master is None else master)
        self.exp_avgs.append(local_part(state["exp_avg"]))
        self.exp_avg_sqs.append(local_part(state["exp_avg_sq"]))
        self.trust_ratios.append(state["trust_ratio"])
        self.steps.append(float(state["step"]))


def ensure_state(state: dict[str, Any], parameter: Tensor) -> None:
    """Adds what is missing of a parameter's state: nothing is moved or cast.

    step: updates so far, a 0-dim fp32 tensor on the CPU (so counting needs no device, as in torch.optim). exp_avg and
    exp_avg_sq: the moments. trust_ratio: the last ratio, 0-dim, on the parameter's device. master_weight: the weights
    of a bf16 or fp16 parameter in fp32.
    """
    dtype = compute_dtype(parameter)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    for name in ("exp_avg", "exp_avg_sq"):
        if name not in state:
            state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    if "trust_ratio" not in state:
        state["trust_ratio"] = torch.ones((), dtype=dtype, device=parameter.device)
    if parameter.dtype in HALF and "master_weight" not in state:
        state["master_weight"] = parameter.detach().to(dtype, copy=True)


def follow(master: Tensor, parameter: Tensor) -> None:
    """Makes ``master`` equal to ``parameter`` wherever the parameter is not ``master`` rounded: someone else wrote it.

    Without this the next step would undo a loaded checkpoint, a clamp or a mask. The device decides; nothing waits. On
    a CPU looking is cheaper than writing: almost always all of it is equal.
    """
    if master.device.type == "cpu" and master.is_contiguous() and parameter.is_contiguous():
        parts = zip(master.view(-1).split(PIECE_ELEMENTS), parameter.view(-1).split(PIECE_ELEMENTS), strict=True)
        if all(torch.equal(_bits(mine.to(parameter.dtype)), _bits(theirs)) for mine, theirs in parts):
            return
    master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter))


def _bits(half: Tensor) -> Tensor:
    """Of a flat tensor of 16-bit numbers, as integers: four at a time where that can be, which compares fastest."""
    return half.view(torch.int16 if half.numel() % 4 or half.storage_offset() % 4 else torch.int64)


def batches(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], limit: int = BATCH_ELEMENTS
) -> Iterator[Batch]:
    """Splits parameters with gradients into batches of up to ``limit`` elements; a larger parameter is one by itself.

    With ``limit`` 0 every parameter is. Empty parameters are in no batch. Sharded parameters count with their whole
    size, so that every process makes the same batches.
    """
    alike: dict[Hashable, list[int]] = {}
    for index, parameter in enumerate(parameters):
        if parameter.numel():
            assert parameter.grad is not None
            key = (parameter.device, parameter.dtype, parameter.grad.dtype, shard_groups(parameter))
            alike.setdefault(key, []).append(index)
    for indices in alike.values():
        batch, elements = Batch(groups=shard_groups(parameters[indices[0]])), 0
        for index in indices:
            parameter = parameters[index]
            if batch.params and elements + parameter.numel() > limit:
                yield batch
                batch, elements = Batch(groups=batch.groups), 0
            batch.append(parameter, gradient(parameter), states[index])
            elements += parameter.numel()
        yield batch


@dataclass(frozen=True)
class Piece:
    """Some of the elements of a batch, as views: on a CPU of one parameter, elsewhere all of them.

    where: of the batch's parameters. at: of all elements end to end. span: of the one parameter's; None is all.
    """

    batch: Batch
    where: slice
    at: slice
    span: slice | None = None

    def of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What belongs here of other tensors, one for each parameter of the batch and laid out as it is."""
        found = list(tensors[self.where])
        return found if self.span is None else [tensor.view(-1)[self.span] for tensor in found]


def pieces(batch: Batch) -> Iterator[Piece]:
    """All of a batch. Operations follow each other on a piece: on a CPU they find it in the cache then, and need no
    room for intermediate results of whole parameters."""
    sizes = [moment.numel() for moment in batch.exp_avgs]
    if batch.device.type != "cpu":
        yield Piece(batch, slice(0, len(sizes)), slice(0, sum(sizes)))
        return
    offset = 0
    for index, size in enumerate(sizes):
        lists = (batch.params, batch.grads, batch.weights, batch.exp_avgs, batch.exp_avg_sqs)
        flat = all(tensors[index].is_contiguous() for tensors in lists)
        for start in range(0, size, PIECE_ELEMENTS if flat else size):
            stop = min(start + PIECE_ELEMENTS, size) if flat else size
            where, at = slice(index, index + 1), slice(offset + start, offset + stop)
            yield _piece(batch, where, at, slice(start, stop) if flat else None)
        offset += size


def _piece(batch: Batch, where: slice, at: slice, span: slice | None) -> Piece:
    whole = Piece(batch, where, at, span)
    params = whole.of(batch.params)
    own = batch.weights[where.start] is batch.params[where.start]
    part = Batch(
        parameters=batch.parameters[where],
        params=params,
        grads=whole.of(batch.grads),
        weights=params if own else whole.of(batch.weights),
        exp_avgs=whole.of(batch.exp_avgs),
        exp_avg_sqs=whole.of(batch.exp_avg_sqs),
        trust_ratios=batch.trust_ratios[where],
        steps=batch.steps[where],
        groups=batch.groups,
    )
    return Piece(part, where, at, span)


def gradient(parameter: Tensor) -> Tensor:
    """The gradient, sharded as the parameter is."""
    grad = parameter.grad
    assert grad is not None
    if is_sharded(parameter) and grad.placements != parameter.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return grad


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its memory; any other tensor itself. To be called without autograd."""
    if is_sharded(tensor):
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return part
    return tensor


def shard_groups(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which a tensor is cut; none for one that is whole in every process."""
    if not is_sharded(parameter):
        return ()
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())
