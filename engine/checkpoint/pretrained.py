"""A directory's model as transformers builds it, in fp32, also where the weights are DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.checkpoint.directory import deepspeed_weights
from engine.errors import CheckpointError

T = TypeVar("T")


def pretrained(kind: Any, directory: Path, **options: Any) -> Any:
    """What ``kind.from_pretrained`` makes of a local directory, on the CPU.

    kind: an Auto class of transformers. options: ``config``, ``gguf_file``.

    Weights come as they are stored, then fp32: left alone, transformers 5 rounds them to the dtype that config.json
    names. Where DeepSpeed alone wrote some, which transformers cannot read, they are given to it. Raises
    :class:`CheckpointError` in one line.
    """
    foreign = None if "gguf_file" in options else deepspeed_weights(directory)
    options |= {"trust_remote_code": False, "torch_dtype": torch.float32}
    if foreign is None:
        return of_transformers(directory, lambda: kind.from_pretrained(str(directory), **options))

    def build() -> Any:
        options.pop("trust_remote_code")
        config = options.pop("config", None) or _config(directory)
        with torch.device("meta"):
            named = type(kind.from_config(config))  # an Auto class takes no weights without a path
        state = {name: foreign.read(name) for name in foreign.names()}
        return named.from_pretrained(None, config=config, state_dict=state, **options)

    return of_transformers(directory, build)


def _config(directory: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(str(directory), trust_remote_code=False)


def of_transformers(directory: Path, make: Callable[[], T]) -> T:
    """What transformers makes of a directory, or its error in one line."""
    try:
        return make()
    except Exception as error:  # of many kinds; the directory is what the user can act on
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{directory}: transformers cannot load it: {reason[0] if reason else type(error).__name__}"
        ) from error
