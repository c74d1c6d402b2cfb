"""Tables of tuned configs: what ships (package data, one file a GPU) and what this user's machine found.

A table is JSON: ``{"device": name, "version": 1, "configs": {key: {field: value}}}``, keys as
:func:`ops.gemm.config.key` gives them. The user's file lies in ``$SLIPSTREAM_CACHE`` (``~/.cache/slipstream``) and goes
before the shipped one; what is in neither is left to :func:`ops.gemm.config.heuristic`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ops.cache import cache_directory, write_aside
from ops.errors import KernelError
from ops.gemm.config import GemmConfig, heuristic, key

_LOG = logging.getLogger("slipstream.ops.gemm")
_VERSION = 1
SHIPPED = Path(__file__).parent / "tuned"


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name; "interpreter" for a CPU, on which kernels run in Triton's interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def table_name(device: str) -> str:
    """The file name of a GPU's table: ``nvidia_h200.json`` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def user_table(device: str) -> Path:
    """Where this user's table for a GPU lies."""
    return cache_directory() / "gemm" / table_name(device)


def read_table(path: Path) -> dict[str, GemmConfig]:
    """The configs in a file, none if there is no file.

    Raises:
        KernelError: the file cannot be read or is not a table of this version; the line names it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}, {_VERSION} is known")
        return {name: GemmConfig(**fields) for name, fields in document["configs"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, KernelError) as error:
        raise KernelError(f"{path}: not a table of GEMM configs ({error}). Delete it, and it is made anew") from error


def write_table(path: Path, device: str, configs: dict[str, GemmConfig]) -> None:
    """Writes a table, aside and renamed."""
    plain = GemmConfig("fma", 1, 8)
    lines = []
    for name in sorted(configs):
        fields = dataclasses.asdict(configs[name])
        kept = {
            field: value
            for field, value in fields.items()
            if field in ("kind", "block_n", "block_k") or value != getattr(plain, field)
        }
        lines.append(f"    {json.dumps(name)}: {json.dumps(kept)}")
    body = ",\n".join(lines)
    text = f'{{\n  "device": {json.dumps(device)},\n  "version": {_VERSION},\n  "configs": {{\n{body}\n  }}\n}}\n'
    write_aside(path, text.encode())


@cache
def _tuned(device: str, user: Path) -> dict[str, GemmConfig]:
    found = read_table(SHIPPED / table_name(device))
    try:
        found.update(read_table(user))
    except KernelError as error:
        _LOG.warning("the user's tuned configs are not used: %s", error)
    return found


def tuned(device: str) -> dict[str, GemmConfig]:
    """What is known of a GPU by its name: the shipped table under the user's. Read once a process."""
    return _tuned(device, user_table(device))


def remember(device: str, configs: dict[str, GemmConfig]) -> None:
    """Adds configs to the user's table. One that cannot be read is replaced, with a warning."""
    path = user_table(device)
    try:
        before = read_table(path)
    except KernelError as error:
        _LOG.warning("the user's tuned configs are begun anew: %s", error)
        before = {}
    write_table(path, device, {**before, **configs})
    _tuned.cache_clear()


def automatic(x: Tensor) -> bool:
    """Whether ``skinny_gemm`` may tune as it goes: ``SLIPSTREAM_TUNE=1``, on a GPU, outside of a capture."""
    return os.environ.get("SLIPSTREAM_TUNE") == "1" and x.is_cuda and not torch.cuda.is_current_stream_capturing()


def known(x: Tensor, columns: int, gated: bool, normed: bool) -> GemmConfig | None:
    """The tuned config for x [M, K] on its device: of this shape, else of the same without its norm, else of the other
    16-bit dtype, which takes the same time."""
    table = tuned(device_name(x.device))
    twins = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}
    for dtype in (x.dtype, twins.get(x.dtype, x.dtype)):
        for with_norm in (normed, False):
            found = table.get(key(dtype, x.shape[0], columns, x.shape[1], gated, with_norm))
            if found is not None:
                return found
    return None


def choose(x: Tensor, columns: int, gated: bool, normed: bool) -> GemmConfig:
    """The config to run x [M, K] with: tuned or, for a shape that nobody tuned, the heuristic's."""
    found = known(x, columns, gated, normed)
    return found or heuristic(x.dtype, x.shape[0], columns, x.shape[1], gated)
