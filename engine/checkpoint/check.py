"""Does a checkpoint hold the tensors that a model needs? Everything wrong at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping

from engine.errors import CheckpointError
from ops.weights import WeightSource

SHOWN = 10
"""How many tensors one error lists; the rest are counted."""

_CANDIDATES = 2000


def check_tensors(
    source: WeightSource,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Collection[re.Pattern[str]] = (),
    *,
    where: str = "checkpoint",
) -> None:
    """Raise one ``CheckpointError`` that lists all missing, misshapen, mistyped and surplus tensors of ``source``.

    ``expected`` maps the names the model reads to their shapes; they must be of a floating-point dtype. A tensor that
    is not expected is surplus unless one of ``ignored`` is found in its name (``re.search``, Hugging Face's convention
    for ``_keys_to_ignore_on_load_unexpected``). The first line counts, headed by ``where`` (the directory, say); one
    line each follows for the first :data:`SHOWN` tensors, missing ones first, with the closest name of the surplus.
    """
    names = frozenset(source.names())
    missing = [name for name in expected if name not in names]
    present = [name for name in expected if name in names]
    misshapen = [name for name in present if source.shape(name) != tuple(expected[name])]
    mistyped = [name for name in present if not source.dtype(name).is_floating_point]
    surplus = [name for name in source.names() if name not in expected and not _matches(name, ignored)]
    found = {"missing": missing, "of another shape": misshapen, "of another dtype": mistyped, "surplus": surplus}
    total = sum(map(len, found.values()))
    if not total:
        return
    explain = {
        "missing": lambda name: f"{name}: missing (shape {list(expected[name])}){_suggestion(source, name, surplus)}",
        "of another shape": lambda name: (
            f"{source.locate(name)}: shape {_shape(source, name)}, expected {list(expected[name])}"
        ),
        "of another dtype": lambda name: (
            f"{source.locate(name)}: {source.dtype(name)}, expected floating-point numbers"
        ),
        "surplus": lambda name: (
            f"{source.locate(name)}: surplus (shape {_shape(source, name)}): the model has no such tensor"
        ),
    }
    lines = [(kind, name) for kind, group in found.items() for name in group]
    shown = [explain[kind](name) for kind, name in lines[:SHOWN]]
    if total > SHOWN:
        shown.append(f"... and {total - SHOWN} more")
    counts = ", ".join(f"{len(group)} {kind}" for kind, group in found.items() if group)
    raise CheckpointError("\n  ".join([f"{where}: its tensors are not those of the model: {counts}", *shown]))


def _shape(source: WeightSource, name: str) -> list[int]:
    return list(source.shape(name))


def _matches(name: str, patterns: Iterable[re.Pattern[str]]) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _suggestion(source: WeightSource, name: str, surplus: list[str]) -> str:
    """The surplus name that differs by a prefix, or else the most similar one."""
    prefixed = [other for other in surplus if other.endswith(f".{name}") or name.endswith(f".{other}")]
    close = prefixed[:1] or difflib.get_close_matches(name, surplus[:_CANDIDATES], n=1, cutoff=0.8)
    return f"; did you mean {source.locate(close[0])}?" if close else ""
