"""Errors of the engine."""

from __future__ import annotations

from config_schema.errors import SlipstreamError


class EngineError(SlipstreamError):
    """The engine cannot do what was asked of it: the message says why, and what to change."""


class CheckpointError(SlipstreamError):
    """A checkpoint that cannot be used: the message names the file and the tensor."""
