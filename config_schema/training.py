"""The section "training": how an engine trains. Where it is missing, an engine infers and nothing else."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, FilePath, Section

Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class LossScale(Section):
    """Dynamic loss scaling in fp16: losses are multiplied by a number that keeps small gradients above zero."""

    initial: Positive = 65536.0
    """The scale of the first step."""

    growth_interval: Count = 2000
    """Steps without an overflow after which the scale is doubled; an overflow halves it, and the step is skipped."""


class PowerSGD(Section):
    """Gradients of matrices travel as products of two thin ones (arXiv 1905.13727), and what these miss is carried to
    the next step."""

    rank: Count = 1
    """Columns of the thin matrices: more are nearer to the gradient, and more bytes."""

    start_step: Annotated[int, Field(ge=2, le=2**31 - 1)] = 1000
    """Steps before it, in which gradients travel in full."""


class Training(Section):
    """The training loop: batch sizes, length, what is written where."""

    train_batch_size: Count | None = None
    """Samples of an optimizer step, over all processes: micro_batch_size x accumulation_steps x processes."""

    micro_batch_size: Count | None = None
    """Samples that a process computes at a time."""

    accumulation_steps: Count | None = None
    """Micro-batches whose gradients make one optimizer step."""

    max_steps: Count | None = None
    """Optimizer steps to train."""

    epochs: Positive | None = None
    """Times to go through the data; give this or max_steps."""

    clip_norm: Positive | None = None
    """Largest L2 norm of all gradients together; longer ones are shortened to it."""

    seed: Seed = 0
    """Of the order of the data, of masks, of dropout, and of weights that are initialized."""

    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""

    compile: bool = False
    """Train through torch.compile."""

    processes: Count | Literal["auto"] | None = None
    """Processes that train together, which a plain python starts by itself; "auto" is one for each visible GPU (one on
    a CPU). Without it one, or as many as torchrun has started."""

    exchange_timeout: Positive | None = None
    """Seconds that a process waits for the others in an exchange before the run ends; longer than all that one does by
    itself between two. Without it torch's: 1800 on CPUs (Gloo), 600 on GPUs (NCCL)."""

    data_parallel: Literal["auto", "replicate", "shard"] = "auto"
    """With several processes: a copy of the model each, or a part of each weight (FSDP2)."""

    gradient_exchange: Literal["full", "bf16", "PowerSGD"] = "full"
    """With copies of the model: how their gradients travel. "bf16" rounds them to half the bytes of fp32, "PowerSGD"
    sends matrices of low rank."""

    power_sgd: PowerSGD | None = Field(default=None, title="PowerSGD")
    """For gradient_exchange PowerSGD; its defaults where it is missing."""

    loss_scale: LossScale | None = Field(default=None, title="Loss Scale")
    """For precision fp16; its defaults where it is missing."""

    output: FilePath | None = None
    """Directory of metrics and checkpoints; fit() and `slipstream run` need one."""

    checkpoint_every: Count | None = None
    """Optimizer steps from one checkpoint to the next; one is written at the end in any case."""

    keep_checkpoints: Count = 3
    """How many checkpoints stay, the last ones."""

    resume: bool = True
    """Go on from the last checkpoint in output, if there is one."""

    evaluate_every: Count | None = None
    """Optimizer steps from one evaluation to the next; the end is evaluated in any case where there are data for it."""

    log_every: Count = 1
    """Optimizer steps from one line of metrics to the next; a line is of its step alone."""

    tensorboard: bool = False
    """Write TensorBoard's event files beside metrics.jsonl."""
