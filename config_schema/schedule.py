"""The section "schedule": the learning rate by step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, Section


class Schedule(Section):
    """How the learning rate rises and falls: after the warm-up it is the optimizer's "lr"."""

    type: Literal["constant", "linear", "cosine", "one_cycle"] = "constant"
    """After the warm-up: the same rate, or one that falls to 0 in a line or along a cosine (one_cycle: nearly to 0)."""

    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Optimizer steps in which the rate rises to its highest."""

    total_steps: Literal["auto"] | Count = "auto"
    """Where the rate ends; "auto" is the end of the training."""
