"""Model families: one file each, found by itself. The one door through which Hugging Face's configs enter."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from engine.errors import CheckpointError
from engine.families.base import Family, HFConfig
from ops.spec import ModelSpec, Task

__all__ = ["Family", "HFConfig", "families", "family_for", "spec_from_hf"]


@cache
def families() -> tuple[Family, ...]:
    """Every family: the ``FAMILY`` of each module of this package, by module name."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        family = getattr(module, "FAMILY", None)
        if isinstance(family, Family):
            found.append(family)
    return tuple(found)


def family_for(config: HFConfig) -> Family:
    """The family that reads this config; an unknown one is refused with the list of those that are here."""
    model_type = config.get(str, "model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in families() for name in family.model_types))
    raise CheckpointError(
        f"{config.where}: model_type: no family {model_type!r} here; there are: {known} "
        "(docs/adding_a_family.md adds one)"
    )


def spec_from_hf(values: Mapping[str, Any], task: Task | None, where: str) -> tuple[Family, ModelSpec]:
    """The family and the facts of a Hugging Face config; ``task`` None takes the checkpoint's own."""
    config = HFConfig(values, where)
    family = family_for(config)
    own = config.task()
    chosen = task or (own if own in family.tasks else None) or (family.tasks[0] if own in (None, "embedding") else own)
    if chosen not in family.tasks:
        raise CheckpointError(f"{where}: family {family.name} serves {', '.join(family.tasks)}, not {chosen}")
    try:
        return family, family.spec(config, chosen)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
