"""The section "progressive_layer_drop" (PLD, arXiv 2010.13369)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, NonEmptyText, Section
from config_schema.training import Positive, Seed


class ProgressiveLayerDrop(Section):
    """Residual blocks are left out at random while training, more of them late and deep, so that a step costs less."""

    enabled: bool = True
    """Whether blocks are dropped."""

    theta: Annotated[float, Field(gt=0, le=1)] = 0.5
    """What theta(t) falls to from 1; the deepest layer is kept with this probability in the end."""

    gamma: Positive | None = None
    """How fast theta falls: theta(t) = (1 - theta) exp(-gamma t) + theta after t steps; null follows total_steps."""

    total_steps: Literal["auto"] | Count = "auto"
    """Where gamma is null: gamma is 100 over this; "auto" is the length of the training."""

    paths: NonEmptyText | Annotated[tuple[NonEmptyText, ...], Field(min_length=1)] | None = None
    """Where the model keeps its blocks ("encoder.layer"), one path or several; null finds them."""

    seed: Seed = 0
    """Of the gates."""
