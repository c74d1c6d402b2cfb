"""An optimizer by its name and parameters, with weight decay where it belongs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import EngineError
from ops.optimizers import LAMB, OneBitAdam, OneBitLamb, ZeroOneAdam

#: By the name that a configuration gives; in lower case, because DeepSpeed's users write them in several.
OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "lamb": LAMB,
    "onebitadam": OneBitAdam,
    "onebitlamb": OneBitLamb,
    "zerooneadam": ZeroOneAdam,
}
#: Devices on which torch has one kernel for a whole AdamW step.
FUSED = ("cuda", "cpu")


def build_optimizer(
    model: nn.Module, name: str, params: Mapping[str, Any] | None = None, *, decay_all: bool = False
) -> Optimizer:
    """The optimizer called ``name`` ("AdamW", "LAMB", "OneBitAdam" ...) over the trained parameters of ``model``, with
    ``params`` as its keyword arguments.

    Weight decay leaves out biases and norm weights (everything of fewer than two dimensions), as BERT and GPT-2 were
    trained, unless ``decay_all``. AdamW is torch's fused one where all parameters allow it and nothing else is asked
    for.

    Raises :class:`EngineError` for an unknown name or parameter, a value that the optimizer refuses, and a model of
    which nothing is trained.
    """
    kind = OPTIMIZERS.get(name.lower())
    if kind is None:
        raise EngineError(f"no optimizer {name!r}: there are {', '.join(one.__name__ for one in OPTIMIZERS.values())}")
    given = dict(params or {})
    known = [key for key in inspect.signature(kind).parameters if key != "params"]
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, 1)
            meant = f', did you mean "{near[0]}"?' if near else f": it has {', '.join(known)}"
            raise EngineError(f'{name} has no parameter "{key}"{meant}')
    trained = [(path, parameter) for path, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise EngineError("nothing to train: no parameter of the model requires a gradient")
    if kind is torch.optim.AdamW and not {"fused", "foreach", "capturable", "differentiable"} & set(given):
        # The fused kernels know no CPU half precision worth having, and no mixture of devices.
        devices = {parameter.device.type for _, parameter in trained}
        given["fused"] = len(devices) == 1 and devices <= set(FUSED)
    try:
        return kind(_groups(trained, decay_all), **given)
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix(f"{kind.__name__}: ")
        raise EngineError(f"{name}: {said}") from None


def _groups(trained: list[tuple[str, nn.Parameter]], decay_all: bool) -> list[dict[str, Any]]:
    """Parameters with weight decay, then those without; named, so that messages and checkpoints can name them."""
    kept = [(path, parameter) for path, parameter in trained if not decay_all and parameter.ndim < 2]
    decayed = [(path, parameter) for path, parameter in trained if decay_all or parameter.ndim >= 2]
    groups: list[dict[str, Any]] = []
    if decayed:
        groups.append({"params": decayed})
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return groups
