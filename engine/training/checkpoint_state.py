"""Nested state as JSON, with its tensors taken out: what lets a checkpoint be read without unpickling anything.

JSON has fewer kinds of values than Python, so the others are objects of one key: ``{"$tuple": [1, 2]}``,
``{"$dict": [[0, "a"]]}`` (keys that are no strings), ``{"$float": "nan"}``, ``{"$bytes": "..."}`` (base64) and
``{"$tensor": "name"}``. Floats are written with the digits that give the same number back.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engine.errors import EngineError

#: The keys and indices that lead to a value from the top of an object's state.
Path = tuple[Any, ...]
_MARK = "$"
_TENSORS = (Tensor, nn.Parameter, DTensor)
_MAPPINGS = {OrderedDict: "$ordered", Counter: "$counter"}


def show(path: Path) -> str:
    """``("state", 0, "exp_avg")`` as ``state/0/exp_avg``."""
    return "/".join(map(str, path))


class Encoder:
    """Turns state into JSON and gathers the tensors met on the way, by the names that stand for them.

    Two tensors that are the same memory (a tied embedding) are gathered once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[Any, str] = {}

    def encode(self, value: Any, path: Path) -> Any:
        """``value`` as JSON; ``path`` gives names and messages. Raises :class:`EngineError` for what cannot be
        written."""
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind in _TABLE:
            return _TABLE[kind](self, value, path)
        if isinstance(value, Tensor):
            raise EngineError(f"{show(path)}: a tensor of type {kind.__name__} cannot be saved: give a plain one")
        if kind.__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "shape", ()):
            return self.encode(value.item(), path)
        raise EngineError(
            f"{show(path)}: a value of type {kind.__module__}.{kind.__qualname__} cannot be saved: state is made of "
            "tensors, numbers, strings, bytes, None, and dicts, lists and tuples of them"
        )

    def _float(self, value: float, path: Path) -> Any:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def _bytes(self, value: bytes, path: Path) -> Any:
        return {"$bytes": base64.b64encode(value).decode()}

    def _list(self, value: list[Any], path: Path) -> Any:
        return [self.encode(item, (*path, index)) for index, item in enumerate(value)]

    def _tuple(self, value: tuple[Any, ...], path: Path) -> Any:
        return {"$tuple": self._list(list(value), path)}

    def _dict(self, value: dict[Any, Any], path: Path) -> Any:
        if type(value) is dict and all(type(key) is str and not key.startswith(_MARK) for key in value):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        # A key that holds a tensor would be a name nobody can look up again.
        pairs = [[self._key(key, path), self.encode(item, (*path, key))] for key, item in value.items()]
        return {_MAPPINGS.get(type(value), "$dict"): pairs}

    def _key(self, key: Any, path: Path) -> Any:
        if isinstance(key, Tensor):
            raise EngineError(f"{show(path)}: a dict with tensors as keys cannot be saved")
        return self.encode(key, (*path, "a key"))

    def _tensor(self, tensor: Tensor, path: Path) -> Any:
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise EngineError(
                f"{show(path)}: a {tensor.layout} tensor of dtype {tensor.dtype} on {tensor.device} cannot be saved"
            )
        memory = None
        if type(tensor) is not DTensor and tensor.numel():
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, path[0])
            if memory in self._seen:
                return {"$tensor": self._seen[memory]}
        name = show(path)
        while name in self.tensors:  # the keys 0 and "0", or a key with a slash
            name += "'"
        self.tensors[name] = tensor.detach()
        if memory is not None:
            self._seen[memory] = name
        return {"$tensor": name}


_TABLE: Mapping[type, Callable[[Encoder, Any, Path], Any]] = {
    float: Encoder._float,
    bytes: Encoder._bytes,
    list: Encoder._list,
    tuple: Encoder._tuple,
    torch.Size: Encoder._tuple,
    dict: Encoder._dict,
    OrderedDict: Encoder._dict,
    Counter: Encoder._dict,
    **dict.fromkeys(_TENSORS, Encoder._tensor),
}


def decode(node: Any, path: Path, tensor: Callable[[str, Path], Tensor]) -> Any:
    """The value that :class:`Encoder` turned into ``node``; ``tensor`` gives the one of a name and place.

    Raises ``ValueError`` if ``node`` is nothing that the encoder writes.
    """
    if isinstance(node, list):
        return [decode(item, (*path, index), tensor) for index, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    mark, content = next(iter(node.items()), ("", None))
    if not mark.startswith(_MARK):
        return {key: decode(item, (*path, key), tensor) for key, item in node.items()}
    if len(node) != 1 or mark not in _BACK:
        raise ValueError(f"{show(path)}: {mark} is no mark of this format")
    return _BACK[mark](content, path, tensor)


def _pairs(content: Any, path: Path, tensor: Callable[[str, Path], Tensor]) -> list[tuple[Any, Any]]:
    keys = [decode(key, path, tensor) for key, _ in content]
    return [(key, decode(item, (*path, key), tensor)) for key, (_, item) in zip(keys, content, strict=True)]


_BACK: Mapping[str, Callable[[Any, Path, Callable[[str, Path], Tensor]], Any]] = {
    "$tensor": lambda content, path, tensor: tensor(content, path),
    "$float": lambda content, path, tensor: float(content),
    "$bytes": lambda content, path, tensor: base64.b64decode(content),
    "$tuple": lambda content, path, tensor: tuple(decode(content, path, tensor)),
    "$dict": lambda content, path, tensor: dict(_pairs(content, path, tensor)),
    "$ordered": lambda content, path, tensor: OrderedDict(_pairs(content, path, tensor)),
    "$counter": lambda content, path, tensor: Counter(dict(_pairs(content, path, tensor))),
}


def tensors_in(value: Any, path: Path = ()) -> dict[Path, Tensor]:
    """Every tensor in nested dicts, lists and tuples, by its place."""
    if isinstance(value, Tensor):
        return {path: value}
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    return {place: found for key, item in items for place, found in tensors_in(item, (*path, key)).items()}
