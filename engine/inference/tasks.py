"""From an encoder's outputs to answers: labels, spans and fillings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass(frozen=True)
class Label:
    """A label with its probability."""

    label: str
    score: float
