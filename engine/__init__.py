"""slipstream's engine: ``from engine import Engine``."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.inference.generation import Generation, Logprob, Piece

__all__ = ["Engine", "Generation", "Logprob", "Piece"]

_PUBLIC = {
    "Engine": "engine.engine",
    "Generation": "engine.inference.generation",
    "Logprob": "engine.inference.generation",
    "Piece": "engine.inference.generation",
}


def _refuse_strangers() -> None:
    """Raises if another distribution's package of one of our names would be imported in its stead (Canonical's
    ``ops``)."""
    here = Path(__file__).resolve().parent.parent
    for name in ("config_schema", "ops", "profiler"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec is not None and spec.origin else None
        if found != here:
            from importlib.metadata import packages_distributions

            owners = ", ".join(packages_distributions().get(name, ["another project"]))
            raise ImportError(
                f"the package {name!r} that Python finds ({found or 'nowhere'}) is not slipstream's: it comes from "
                f"{owners}. Uninstall that, or use an environment of its own for slipstream"
            )


_refuse_strangers()


def __getattr__(name: str) -> Any:
    """Imports the public names when they are first used: the command line's quick commands need no torch."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("slipstream-runtime")
        except PackageNotFoundError:  # run from a source tree
            return "unknown (not installed)"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
