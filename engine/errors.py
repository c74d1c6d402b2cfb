"""Errors of the engine."""

from __future__ import annotations

from config_schema.errors import SlipstreamError


class EngineError(SlipstreamError):
    """The engine cannot do what was asked of it: the message says why, and what to change."""


def is_of_exchange(error: BaseException) -> bool:
    """Whether it is torch's of an exchange between processes, which failed because of another process or the network.
    Needs no torch."""
    text = str(error)
    network = any(one.__name__ == "DistError" for one in type(error).__mro__)
    return network or "/gloo/" in text or "caused pair closure" in text


class CheckpointError(SlipstreamError):
    """A checkpoint that cannot be used: the message names the file and the tensor."""
