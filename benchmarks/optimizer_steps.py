"""Steps of an optimizer on several hosts, without a backward pass: gradients exchanged, parameters moved.

    python -m benchmarks.slow_network --hosts 2 --rate 100mbit,1gbit -- \\
        python -m benchmarks.optimizer_steps --optimizer LAMB
    python -m benchmarks.slow_network --hosts 2 --rate 100mbit,1gbit -- \\
        python -m benchmarks.optimizer_steps --optimizer OneBitLamb

Parameters are BERT's; each rank has gradients of its own, in the parameters' dtype. AdamW and LAMB get their mean by an
all-reduce in --dtype. The others exchange signs: they are measured behind two steps that warm up, then the variance is
frozen. What the second of these sent is told, and what a run sends of which it is 15%, beside all-reduces in fp16.
0/1 Adam is given the interval that it comes to, --local-steps; a step is then a mean over as many. With --compression
auto the optimizer measures both exchanges itself, before it compresses, and what it found is told.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.network_steps import DTYPES, interface_bytes, measure
from ops.compression import TorchCollective
from ops.optimizers import LAMB, OneBitAdam, OneBitLamb, ZeroOneAdam

OPTIMIZERS = ("AdamW", "LAMB", "OneBitAdam", "OneBitLamb", "ZeroOneAdam")


#: Share of the steps that warm up, in what is told of a whole run.
WARM_UP = 0.15


def parameters(layers: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """BERT's, without a head: 109 million elements by default."""
    generator = torch.Generator().manual_seed(0)
    square, vector = (hidden, hidden), (hidden,)
    attention = [shape for _ in range(4) for shape in (square, vector)]
    layer = [
        *attention,
        vector,
        vector,
        (4 * hidden, hidden),
        (4 * hidden,),
        (hidden, 4 * hidden),
        vector,
        vector,
        vector,
    ]
    shapes = [(vocabulary, hidden), (512, hidden), (2, hidden), vector, vector, *layers * layer]
    weights = [torch.randn(shape, generator=generator).mul_(0.02).to(dtype) for shape in shapes]
    return [weight.requires_grad_() for weight in weights]


def full_mean(grads: list[Tensor], dtype: torch.dtype) -> None:
    """One all-reduce in ``dtype`` of all gradients end to end, as data-parallel training without overlap would do."""
    flat = torch.cat([grad.reshape(-1).to(dtype) for grad in grads]).div_(dist.get_world_size())
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def step_of(chosen: argparse.Namespace, params: list[Tensor]) -> tuple[Callable[[], object], Any]:
    """A step of the optimizer that was asked for, and the optimizer."""
    lr, kind = 1e-4, chosen.optimizer
    grads = [param.grad for param in params if param.grad is not None]
    if kind in ("AdamW", "LAMB"):
        # torch's own keeps no fp32 weights beside 16-bit ones, so it does less then than the others.
        optimizer: Any = torch.optim.AdamW(params, lr=lr, fused=True) if kind == "AdamW" else LAMB(params, lr)

        def full() -> None:
            full_mean(grads, DTYPES[chosen.dtype])
            optimizer.step()

        return full, optimizer
    collective, longest = TorchCollective(), chosen.local_steps if kind == "ZeroOneAdam" else 1
    options = {"collective": collective, "compression": chosen.compression}
    if kind == "ZeroOneAdam":
        # After two local steps the interval is what it stays at.
        frozen = {"var_freeze_step": 2, "local_step_scaler": 1, "local_step_clipper": longest}
        optimizer = ZeroOneAdam(params, lr, **options, **frozen)
    else:
        made = OneBitAdam if kind == "OneBitAdam" else OneBitLamb
        optimizer = made(params, lr, **options, freeze_step=2)

    def several() -> None:
        for _ in range(longest if optimizer.frozen else 1):
            optimizer.step()

    return several, optimizer


def sent_in(step: Callable[[], object]) -> int:
    """Bytes that a step sends through the interface."""
    dist.barrier()
    before = interface_bytes()[0]
    step()
    return interface_bytes()[0] - before


def main() -> int:
    """Prints what one step takes on this rank; the table is that of :mod:`benchmarks.slow_network`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of the all-reduce of AdamW and LAMB (fp16)")
    parser.add_argument("--parameters", choices=DTYPES, default="fp32", help="their dtype (fp32)")
    parser.add_argument("--local-steps", type=int, default=1, help="of 0/1 Adam, from one exchange to the next (1)")
    parser.add_argument("--compression", choices=("always", "auto"), default="always", help="of signs (always)")
    parser.add_argument("--layers", type=int, default=12, help="(12)")
    parser.add_argument("--hidden", type=int, default=768, help="(768)")
    parser.add_argument("--vocabulary", type=int, default=30522, help="(30522)")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    dist.init_process_group("gloo")
    params = parameters(chosen.layers, chosen.hidden, chosen.vocabulary, DTYPES[chosen.parameters])
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).mul_(1e-3).to(param.dtype)
    (step, optimizer), signs = step_of(chosen, params), chosen.optimizer not in ("AdamW", "LAMB")
    step()
    warm = sent_in(step) if signs else 0
    for _ in range(2 if chosen.optimizer == "ZeroOneAdam" or chosen.compression == "auto" else 0):
        step()  # where 0/1 Adam's interval grows, and both exchanges are measured
    found = measure(step, chosen.rounds)
    if dist.get_rank() == 0:
        count, seconds = sum(param.numel() for param in params), statistics.median(found["seconds"])
        sent = found["sent"][-1]
        print(f"{chosen.optimizer}, {count / 1e6:.1f}M elements: {seconds:.3f} s, {sent / 1e6:.1f} MB sent")
        if signs and chosen.compression == "auto":
            print(f"auto: {optimizer.verdict}")
        elif signs:
            ranks, steps = dist.get_world_size(), chosen.local_steps
            full = 2 * (ranks - 1) / ranks * 2 * count
            less, whole = full * steps / sent, full / (WARM_UP * warm + (1 - WARM_UP) * sent / steps)
            print(
                f"warm-up: {warm / 1e6:.1f} MB sent; than {full / 1e6:.1f} MB of fp16 {less:.1f} times less by signs, "
                f"{whole:.1f} with {WARM_UP:.0%} warm-up"
            )
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
