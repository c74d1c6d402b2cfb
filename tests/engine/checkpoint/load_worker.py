"""Copy every tensor of a checkpoint as :class:`ops.weights.Packer` does; print the peak of private memory as JSON.

``python -m tests.engine.checkpoint.load_worker DIRECTORY HOW [GGUF_FILE]`` does it once for each dtype, from the file
anew. ``HOW`` is ``source`` (the checkpoint's own source) or ``resident`` (every tensor is copied into memory first: the
measurement must notice).
"""

from __future__ import annotations

import importlib
import json
import sys

import psutil
import torch

from engine.checkpoint import StateDictSource, open_checkpoint
from ops.weights import WeightSource
from tests.engine.checkpoint.memory import PeakMemory


def _resident(source: WeightSource) -> WeightSource:
    return StateDictSource({name: source.read(name).clone() for name in source.names()})


def load(directory: str, dtype: torch.dtype, how: str, gguf_file: str | None) -> dict[str, int]:
    """``weights``: bytes of the copies; ``rise``: the peak; ``uss``: the rise of USS, mapped pages included."""
    uss = psutil.Process().memory_full_info().uss
    with PeakMemory() as memory:
        source = open_checkpoint(directory, gguf_file=gguf_file).source
        if how == "resident":
            source = _resident(source)
        packed = {}
        for name in source.names():
            packed[name] = torch.empty(source.shape(name), dtype=dtype)
            packed[name].copy_(source.read(name))
        memory.sample()
    rise = psutil.Process().memory_full_info().uss - uss
    return {"weights": sum(tensor.nbytes for tensor in packed.values()), "rise": memory.rise, "uss": rise}


if __name__ == "__main__":
    where, mode, *gguf = sys.argv[1:]
    for module in ("gguf", "transformers.models.llama.modeling_llama") * bool(gguf):
        importlib.import_module(module)  # what imports take is not measured
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    print(json.dumps({name: load(where, dtype, mode, gguf[0] if gguf else None) for name, dtype in dtypes.items()}))
