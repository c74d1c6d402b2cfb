"""A checkpoint seen through a family: canonical names over whatever the files call their tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.families.base import Family, Slice, Source
from ops.spec import ModelSpec
from ops.weights import WeightSource

#: Names of norm parameters in checkpoints converted from TensorFlow.
OLD_NORM_NAMES = {"weight": "gamma", "bias": "beta"}
SHOWN = 10


@dataclass(frozen=True)
class Placed:
    """Where one canonical weight lies: a tensor, perhaps one of ``of`` slices of it, perhaps stored [in, out]."""

    tensor: str
    index: int = 0
    of: int = 1
    transposed: bool = False


class CanonicalSource:
    """A :class:`WeightSource` of canonical names. Building it checks every tensor's presence and shape at once.

    ``where`` is what messages call the checkpoint; ``spec`` is the given one, less an encoder's pooler where the
    checkpoint has none (masked LMs have none).
    """

    def __init__(self, source: WeightSource, family: Family, spec: ModelSpec, where: str = "the checkpoint") -> None:
        self._source, self._where = source, where
        self._placed: dict[str, Placed] = {}
        self.spec = _without_missing_pooler(spec, family, set(source.names()))
        self._check(family, self.spec)

    @property
    def version(self) -> int:
        """The underlying source's."""
        return self._source.version

    def names(self) -> Collection[str]:
        """Canonical names."""
        return self._placed.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical shape, [out, in] for a linear layer."""
        placed = self._placed[name]
        return _logical(self._source.shape(placed.tensor), placed)

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype."""
        return self._source.dtype(self._placed[name].tensor)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The weight or rows of it, [out, in]; a view where the stored tensor allows one."""
        placed = self._placed[name]
        total = self.shape(name)[0]
        start, stop, _ = (rows or slice(None)).indices(total)
        start, stop = start + placed.index * total, stop + placed.index * total
        if placed.transposed:
            return self._source.read(placed.tensor)[..., start:stop].t()
        if rows is None and placed.of == 1:
            return self._source.read(placed.tensor)
        return self._source.read(placed.tensor, slice(start, stop))

    def locate(self, name: str) -> str:
        """The file and tensor behind a canonical name."""
        return self._source.locate(self._placed[name].tensor)

    def _check(self, family: Family, spec: ModelSpec) -> None:
        there = set(self._source.names())
        base = _base_prefix(family, there)
        table = {name: _absolute(source, base) for name, source in _table(family, spec)}
        problems = []
        for name, shape in spec.weight_shapes().items():
            candidates = _candidates(table, name, family)
            found = next((c for c in candidates if c.tensor in there), None)
            if found is None:
                close = difflib.get_close_matches(candidates[0].tensor, there, n=1, cutoff=0.8)
                hint = f', is "{close[0]}" meant?' if close else ""
                problems.append(f"{self._where}: {candidates[0].tensor}: missing{hint}")
                continue
            actual = _logical(self._source.shape(found.tensor), found)
            if actual != shape:
                stored = list(self._source.shape(found.tensor))
                problems.append(
                    f"{self._source.locate(found.tensor)}: shape {stored}, but config.json calls for "
                    f"{_stored(shape, found)}"
                )
            dtype = self._source.dtype(found.tensor)
            if not dtype.is_floating_point:
                where = self._source.locate(found.tensor)
                problems.append(f"{where}: holds {dtype}, wanted floating point; quantized checkpoints are not read")
            self._placed[name] = found
        problems += self._surplus(family, spec, there, base)
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise CheckpointError("\n".join(problems[:SHOWN] + more))

    def _surplus(self, family: Family, spec: ModelSpec, there: set[str], base: str) -> Iterator[str]:
        """Tensors that no weight uses; another task's head, a tied head's copy and old buffers are no mistake."""
        used = {placed.tensor for placed in self._placed.values()}
        own: Mapping[str, Source] = family.heads[spec.head.task] if spec.head is not None else {}
        untied = {} if spec.head is not None and spec.head.tied else own
        heads = {_module(n) for head in family.heads.values() for s in head.values() for n in _names(s, base)}
        other_heads = heads - {_module(n) for s in untied.values() for n in _names(s, base)}
        ignored = [re.compile(f"(.*\\.)?{pattern}") for pattern in family.ignored]
        for name in sorted(there - used):
            if _module(name) in other_heads or any(p.fullmatch(name) for p in ignored):
                continue
            if any(name.startswith(f"{known}.") for known in OTHER_HEADS):
                continue
            yield f"{self._source.locate(name)}: this {family.name} model has no such weight"


def _without_missing_pooler(spec: ModelSpec, family: Family, there: set[str]) -> ModelSpec:
    if spec.head is None or spec.head.task != "embedding":
        return spec
    base = _base_prefix(family, there)
    names = [n for source in family.heads["embedding"].values() for n in _names(source, base)]
    return spec if any(f"{name}.weight" in there for name in names) else replace(spec, head=None)


#: Heads of Hugging Face classes that are not served here, left unread beside a body that is.
OTHER_HEADS = ("cls.seq_relationship", "cls.predictions", "multiple_choice_head", "score")


def _table(family: Family, spec: ModelSpec) -> Iterator[tuple[str, Source]]:
    for name, source in family.body.items():
        if "{}" not in name:
            yield name, _prefixed(source, "{base}")
            continue
        for layer in range(spec.layers):
            yield name.format(layer), _prefixed(source, "{base}", str(layer))
    if spec.head is not None:
        yield from family.heads[spec.head.task].items()


def _prefixed(source: Source, prefix: str, layer: str = "{}") -> Source:
    """``source`` behind the base model's prefix, its layer filled in."""
    if isinstance(source, Slice):
        return Slice(prefix + source.name.replace("{}", layer), source.index, source.of)
    if isinstance(source, tuple):
        return tuple(prefix + name.replace("{}", layer) for name in source)
    return prefix + source.replace("{}", layer)


def _absolute(source: Source, base: str) -> Source:
    if isinstance(source, Slice):
        return Slice(source.name.replace("{base}", base), source.index, source.of)
    if isinstance(source, tuple):
        return tuple(name.replace("{base}", base) for name in source)
    return source.replace("{base}", base)


def _names(source: Source, base: str) -> tuple[str, ...]:
    absolute = _absolute(source, base)
    if isinstance(absolute, Slice):
        return (absolute.name,)
    return absolute if isinstance(absolute, tuple) else (absolute,)


def _base_prefix(family: Family, there: set[str]) -> str:
    """The base model's prefix, or nothing in a checkpoint of the bare model."""
    return family.prefix if any(name.startswith(family.prefix) for name in there) else ""


def _candidates(table: Mapping[str, Source], name: str, family: Family) -> list[Placed]:
    """Where a canonical weight may lie, the usual place first."""
    module, _, leaf = name.rpartition(".")
    whole = name in table
    source = table[name] if whole else table[module]
    transposed = leaf == "weight" and name.startswith("layers.") and module.rpartition(".")[2] in family.transposed
    if isinstance(source, Slice):
        return [Placed(f"{source.name}.{leaf}", source.index, source.of, transposed)]
    names = source if isinstance(source, tuple) else (source,)
    leaves = ("",) if whole else (f".{leaf}", f".{OLD_NORM_NAMES.get(leaf, leaf)}")
    return [Placed(f"{n}{end}", transposed=transposed) for n in names for end in leaves]


def _logical(stored: tuple[int, ...], placed: Placed) -> tuple[int, ...]:
    shape = tuple(reversed(stored)) if placed.transposed else stored
    if placed.of == 1 or not shape:
        return shape
    return (shape[0] // placed.of if shape[0] % placed.of == 0 else -1, *shape[1:])


def _stored(shape: tuple[int, ...], placed: Placed) -> list[int]:
    whole = (shape[0] * placed.of, *shape[1:])
    return list(reversed(whole)) if placed.transposed else list(whole)


def _module(name: str) -> str:
    """The name without its leaf (``weight``, ``bias``)."""
    head, _, leaf = name.rpartition(".")
    return head if leaf in ("weight", "bias", "gamma", "beta") else name
