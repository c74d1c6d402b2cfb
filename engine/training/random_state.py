"""The random number generators that a training step draws from, as one object with state."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

log = logging.getLogger("slipstream.training")


class RandomState:
    """Python's ``random``, NumPy's global one if NumPy is imported, torch's on the CPU and on this process's GPU.

    Each rank has its own. Generators that other objects hold (a sampler's, say) are theirs to save.
    """

    #: Saved for each rank; a rank that the saving run did not have keeps what it has.
    per_rank: ClassVar[bool] = True

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors and numbers."""
        version, words, gauss = random.getstate()
        state: dict[str, Any] = {
            "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
            "torch": torch.get_rng_state(),
        }
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            name, key, position, has_gauss, cached = numpy.random.get_state()
            state["numpy"] = {
                "name": name,
                "key": torch.tensor(key.tolist()),
                "position": position,
                "has_gauss": has_gauss,
                "cached": cached,
            }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes :meth:`state_dict`'s result back. A GPU's state is left out where there is no GPU, and that is told."""
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        torch.set_rng_state(state["torch"])
        if "numpy" in state:
            import numpy

            found = state["numpy"]
            key = numpy.array(found["key"].tolist(), dtype=numpy.uint32)
            numpy.random.set_state((found["name"], key, found["position"], found["has_gauss"], found["cached"]))
        if "cuda" in state:
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(state["cuda"])
            else:
                log.warning("the checkpoint has the random state of a GPU, and here is none: it is left out")
