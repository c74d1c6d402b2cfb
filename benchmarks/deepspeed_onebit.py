"""DeepSpeed's 1-bit optimizers, for the benchmarks that stand ours beside them. 0.19.6 is the last release with them.

On GPUs they run as they are: its engine, NCCL, CuPy. None of its four backends runs on a CPU ("nccl" and "mpi" need
CuPy and a GPU, "hccl" another accelerator, "compressed" a packing op that its CPU build lacks). There "nccl" runs over
Gloo with two stand-ins, neither of which does arithmetic of the optimizer: a module ``cupy`` that gives numpy's
``packbits``, ``unpackbits``, ``split`` and ``zeros`` on the same memory, and an ``all_gather`` that takes its 0-dim
scale as one element, because Gloo compares shapes.
"""

from __future__ import annotations

import logging
import os
import sys
import types
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

VERSION = "0.19.6"


def missing(device: str) -> str | None:
    """What is not there, in one line; None where all is."""
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        found = "not importable"
    if found != VERSION:
        return (
            f"deepspeed is {found}: install deepspeed=={VERSION}, the last with 1-bit optimizers, in an environment "
            f"of its own beside torch, pydantic and tabulate (DS_BUILD_OPS=0 pip install deepspeed=={VERSION})"
        )
    if device == "cuda" and util.find_spec("cupy") is None:
        return "cupy is not importable, and DeepSpeed packs signs with it on a GPU: pip install cupy-cuda13x (or 12x)"
    return None


class _Silent:
    """A device or stream with nothing to choose and nothing to wait for."""

    def __init__(self, *_: object) -> None:
        pass

    def use(self) -> None:
        """Nothing."""

    def synchronize(self) -> None:
        """Nothing."""


def _numpy_as_cupy() -> types.ModuleType:
    """The parts of CuPy that DeepSpeed calls, on arrays of numpy."""
    module: Any = types.ModuleType("cupy")
    module.from_dlpack = lambda capsule: np.from_dlpack(torch.from_dlpack(capsule))
    module.packbits, module.unpackbits, module.split, module.zeros = np.packbits, np.unpackbits, np.split, np.zeros
    module.cuda = types.SimpleNamespace(Device=_Silent, get_current_stream=_Silent)
    return module  # type: ignore[no-any-return]


def start(device: str) -> Any:
    """The package, on the process group that is there."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        sys.modules["cupy"] = _numpy_as_cupy()
    import deepspeed
    from deepspeed import comm

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="This overload of add_ is deprecated")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False)
    if device == "cpu":
        gather = comm.all_gather

        def shaped(parts: Sequence[Tensor], part: Tensor, group: Any = None) -> Any:
            return gather(parts, part.reshape(parts[0].shape), group=group)

        comm.all_gather = shaped
    return deepspeed


def backend(device: str) -> Any:
    """Its compressed all-reduce: ``compressed_allreduce(buffer, worker_error, server_error, local_rank)``."""
    start(device)
    from deepspeed.runtime.comm.nccl import NcclBackend

    return NcclBackend()


class Trainer:
    """A model in DeepSpeed's engine. ``options`` are those of the optimizer, in DeepSpeed's names."""

    def __init__(self, deepspeed: Any, model: nn.Module, kind: str, options: Mapping[str, Any], half: bool) -> None:
        chosen = {**options, "comm_backend_name": "nccl"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 1 << 30,
            "gradient_clipping": 0.0,  # 1.0 where nothing is said
            "optimizer": {"type": kind, "params": chosen},
            # 0 is a scale that changes, without which it takes no LAMB: it begins at 2^0 and stays for 1,000 steps.
            "fp16": {"enabled": half, "loss_scale": 0, "initial_scale_power": 0},
        }
        self.engine, *_ = deepspeed.initialize(config=config, model=model, model_parameters=model.parameters())
        wrapped = self.engine.optimizer
        self._optimizer = getattr(wrapped, "optimizer", wrapped)

    @property
    def model(self) -> nn.Module:
        """The model, with the weights as they stand."""
        return self.engine.module  # type: ignore[no-any-return]

    def begin(self, x: Tensor, y: Tensor) -> None:
        """Its first ``step()`` only makes state and moves nothing (in fp16 its engine has made it already). That call
        is not to count as a step of its schedules."""
        if not self._optimizer.initialize:
            self.step(x, y)
        for state in self._optimizer.state.values():
            state["step"] = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on this rank's samples."""
        self.engine.backward(self.engine(x, y))
        self.engine.step()
