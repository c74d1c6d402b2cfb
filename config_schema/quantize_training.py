"""The section "quantize_training" (MoQ), with the names of DeepSpeed's keys where it has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, NonEmptyText, Section
from config_schema.training import Positive, Seed

Bits = Annotated[int, Field(ge=1, le=16)]
Patterns = NonEmptyText | Annotated[tuple[NonEmptyText, ...], Field(min_length=1)]


class QuantizeRule(Section):
    """Bits of some modules; what it does not say stays as in the section."""

    modules: Patterns
    """Names of modules as the model has them; "*" stands for any characters."""

    start_bits: Bits | None = None
    """Bits at first."""

    target_bits: Bits | None = None
    """Bits in the end."""

    quantize_period: Count | None = None
    """Optimizer steps until the first bit is lost."""


class Eigenvalue(Section):
    """The largest eigenvalue of each block's Hessian, by power iteration on the loss of a micro-batch: the larger, the
    longer the block keeps its bits."""

    enabled: bool = True
    """Whether periods follow them."""

    max_iter: Count = 100
    """Iterations at most."""

    tol: Positive = 0.01
    """Relative change of an eigenvalue at which its iteration ends."""

    stability: Positive = 1e-6
    """Added to what is divided by."""

    layer_name: NonEmptyText | None = None
    """Where the model keeps its blocks ("encoder.layer"); null finds them."""


class QuantizeTraining(Section):
    """Weights are rounded to fewer and fewer bits while training, so that they can be served in so few."""

    enabled: bool = True
    """Whether weights are rounded."""

    start_bits: Bits = 16
    """Bits at first."""

    target_bits: Bits = 8
    """Bits in the end; the same as start_bits is plain quantize-aware training."""

    quantize_period: Count = 100
    """Optimizer steps until the first bit is lost; each further one takes twice as many in all."""

    schedule_offset: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Optimizer steps before rounding begins."""

    group_size: Count | None = None
    """Columns of a row that share a scale; null is the whole row."""

    quantize_groups: Count | None = None
    """In the place of group_size: DeepSpeed's number of groups of a whole weight. Groups of whole rows become rows."""

    q_type: Literal["symmetric", "asymmetric"] = "symmetric"
    """Levels on both sides of zero, or between the smallest and the largest weight."""

    rounding: Literal["nearest", "stochastic"] = "nearest"
    """To the nearest level, or to one of the two beside it by chance."""

    quantize_change_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """Weights are mixed with their rounded values, by so much more a step since the last lost bit; null mixes nothing
    (DeepSpeed's fp16_mixed_quantize)."""

    embedding: bool = True
    """Whether the token embedding is rounded, and with it an output layer that is tied to it."""

    head: bool = True
    """Whether the output layers behind a Hugging Face model's body are rounded too."""

    exclude: tuple[NonEmptyText, ...] = ()
    """Names of modules that are not rounded; "*" stands for any characters."""

    rules: tuple[QuantizeRule, ...] = ()
    """Bits of single modules; the last that names a module decides."""

    eigenvalue: Eigenvalue | None = Field(default=None, title="Eigenvalue")
    """Second order: blocks with a steeper loss keep their bits longer."""

    seed: Seed = 0
    """Of stochastic rounding and of the power iteration."""
