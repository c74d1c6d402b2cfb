"""torch's streams as CuPy's."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def current_stream(device: torch.device) -> Any:
    """CuPy's object for the stream on which torch works now."""
    return _stream(torch.cuda.current_stream(device))


@lru_cache(maxsize=64)
def _stream(stream: torch.cuda.Stream) -> Any:
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream)
